"""`make gpu` without a GPU: the dry run goes through every step, and failures of any step are failures of the whole."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, run, shapes

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_a" name="test_one"/>
<testcase classname="tests.ops.test_a" name="test_two"><failure>off by one</failure></testcase>
<testcase classname="tests.ops.test_a" name="test_three"><skipped/></testcase>
<testcase classname="tests.ops.test_b" name="test_four"><error>no kernel</error></testcase>
</testsuite></testsuites>"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_dry_run_goes_through_every_step(tmp_path):
    path = tmp_path / "dry.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", path],
        cwd=run.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device here" in done.stdout
    record = json.loads(path.read_text())
    assert record["steps"]["tests"]["ok"]
    assert record["benchmarks"]
    assert record["red"] == record["skipped"] == []
    assert "roofline" in done.stdout or "matplotlib" in record["absent"]
    assert "| route" in done.stdout.rpartition("all of it took")[2]  # the table is last


def test_failed_tests_are_named():
    found = gpu.read_tests(JUNIT)
    assert found["summary"] == "1 passed, 2 failed, 1 skipped"
    assert found["failed"] == ["tests.ops.test_a::test_two", "tests.ops.test_b::test_four"]
    assert not found["ok"]


def test_no_test_is_no_proof():
    assert not gpu.read_tests("<testsuites><testsuite/></testsuites>")["ok"]


def test_tests_that_do_not_run_are_a_failure():
    found = gpu.test(gpu.Plan("cpu", ("tests/no_such_file.py",), (), (), 60, 60))
    assert not found["ok"]


def test_tests_that_take_too_long_are_stopped():
    found = gpu.test(gpu.Plan("cpu", ("tests/ops",), (), (), 0.2, 1))
    assert not found["ok"]
    assert "stopped" in found["summary"]


@pytest.mark.parametrize("plan", [gpu.FULL, gpu.QUICK, gpu.DRY])
def test_plans_name_what_exists(plan):
    known = {name for table in vars(shapes).values() if isinstance(table, dict) for name in table}
    assert set(plan.ops) <= set(run.known_ops())
    assert set(plan.shapes) <= known
    assert plan.test_seconds < plan.seconds < 540
