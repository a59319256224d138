"""Every GPU kernel of the package compiles for A100 and Hopper, without spills and within what a block can have.

The kernels are compiled in a process of their own: here Triton's interpreter may be on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unif2ace import resources
from unif2ace.cli import main
from unif2ace.resources import cuda
from unif2ace.resources.cubin import Facts
from unif2ace.resources.kernel import Kernel

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "unif2ace", "doctor", "--kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def row(**changes: object) -> Kernel:
    facts = Facts(registers=128, shared_bytes=1024, spill_bytes=0, loads=4, wide_loads=4, matrix="")
    facts = facts._replace(**{name: value for name, value in changes.items() if name in Facts._fields})
    kernel = Kernel("routing", "_route", "triton", 80, "float32", "training", {}, 256, facts)
    return kernel._replace(**{name: value for name, value in changes.items() if name in Kernel._fields})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes per thread"),
        ({"shared_bytes": 200 * 1024}, "wants 204800 bytes of shared memory, sm_80 has 166912"),
        ({"shared_bytes": 200 * 1024, "capability": 90}, None),
        ({"registers": 255, "threads": 512}, "wants 255 registers for 512 threads, a block has 65536"),
    ],
)
def test_problems_of_a_kernel(changes, problem):
    assert row(**changes).problems() == ([] if problem is None else [problem])


def test_the_table_ends_with_a_verdict(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    for spills, status, verdict in (
        (0, 0, "1 kernels: no spills,"),
        (8, 1, "NOT good:\nrouting: _route on sm_80: spills"),
    ):
        monkeypatch.setattr(resources, "kernels", lambda ops, spills=spills: [row(spill_bytes=spills)])
        assert main(["doctor", "--kernels"]) == status
        assert verdict in capsys.readouterr().out
    monkeypatch.setattr(cuda, "why_not", lambda: "nvcc is not installed")
    assert resources.format_kernels([row()]).endswith("\nwithout the CUDA sources: nvcc is not installed\n")


def test_cuda_flags_are_those_of_setup():
    text = (Path(__file__).parents[1] / "setup.py").read_text()
    line = next(line for line in text.splitlines() if line.startswith("NVCC_FLAGS"))
    target = next(line for line in text.splitlines() if line.startswith("TORCH_TARGET")).split('"')[1]
    flags = eval(line.split("=", 1)[1], {"TORCH_TARGET": target})
    assert tuple(flags) == cuda.FLAGS


@needs_triton
def test_unknown_op():
    done = doctor("dream")
    assert done.returncode == 2
    assert "no GPU kernels of 'dream'" in done.stderr


@needs_triton
def test_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "unif2ace", "doctor", "--kernels"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert "without TRITON_INTERPRET=1" in done.stderr


# Streams of the preset's sizes: each must move 16 bytes a thread in its main loads. What else they load is small.
STREAMS = {
    ("sampling", "_sample_kernel", "plain"),
    ("sampling", "_sample_kernel", "guided"),
    ("sampling", "_fold_kernel", "head"),
    ("sequence_mix", "_mix_kernel", "generation"),
    ("sequence_mix", "_mix_backward_kernel", "generation"),
    ("diffusion_loss", "_statistics_kernel", "D3Diff, codes"),
    ("diffusion_loss", "_gradients_kernel", "D3Diff, codes"),
    ("rotary", "_forward_kernel", "text to face"),
    ("rotary", "_backward_kernel", "text to face"),
    ("experts", "combine_kernel", "training, gelu_tanh"),
}


@pytest.mark.slow
@needs_triton
def test_every_kernel_is_within_the_limits_and_works_as_it_should():
    done = doctor("--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["kernels"]
    assert [f"{row['name']} {row['arch']}: {row['problems']}" for row in rows if row["problems"]] == []
    matrix = {"sm_80": "mma", "sm_90a": "wgmma"}  # of 16-bit numbers; float32 multiplies exactly, without tensor cores
    short = [row for row in rows if row["matrix"] and row["dtype"] in ("bfloat16", "float16")]
    assert {row["arch"] for row in short} == matrix.keys()
    assert [row for row in short if row["matrix"] != matrix[row["arch"]]] == []
    streams = [row for row in rows if (row["op"], row["name"], row["call"]) in STREAMS and row["dtype"] == "bfloat16"]
    assert {(row["op"], row["name"], row["call"]) for row in streams} == STREAMS
    assert [row for row in streams if not row["wide_loads"]] == []
    if cuda.why_not() is None:
        assert {row["op"] for row in rows if row["source"] == "cuda"} == {"routing", "sampling"}
        assert any(row["wide_loads"] for row in rows if row["source"] == "cuda" and row["op"] == "sampling")
