"""The same table on two workers of a Ray cluster on this machine, one of which is killed."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.batch.results import read_lines, result
from tests.tiny import tiny_pipeline
from unif2ace.batch import ray as on_ray
from unif2ace.batch.faces import FaceTask
from unif2ace.cli import main

REPOSITORY = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'unif2ace[ray]'")


def start(*arguments):
    """The program, with two workers."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "unif2ace", *arguments, "--engine", "ray", "--workers", "2"],
        env={
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": "local",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def descendants(pid):
    """Process id -> command line of everything that `pid` has started."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
    found, new = {}, {pid}
    while new := {child for child, parent in parents.items() if parent in new and child not in found}:
        found.update({child: commands.get(child, "") for child in new})
    return found


def kill_a_worker(run, part):
    """End one as soon as something is recorded; how many results are by then."""
    while run.poll() is None:
        time.sleep(0.02)
        if part.exists() and part.stat().st_size:
            for pid in [pid for pid, command in descendants(run.pid).items() if "MapWorker" in command][:1]:
                os.kill(pid, signal.SIGKILL)
                return part.read_bytes().count(b"\n")
    pytest.fail(f"ended before a worker could be killed: {run.communicate()}")


@needs_ray
@pytest.mark.slow
def test_faces_by_two_workers_one_of_which_is_killed(table, generate, tmp_path, model):
    rows = [{"prompt": ""}] + [{"prompt": f"a face {i}", "num_images": 8} for i in range(60)]
    prompts = table(*rows)
    options = ["--model", model, "--steps", "6"]
    run = start("generate", "--prompts", prompts, "--out", str(tmp_path / "ray"), *options)
    recorded = kill_a_worker(run, tmp_path / "ray" / "parts" / "00000.jsonl")
    _, error = run.communicate(timeout=300)
    assert run.returncode == 1, error
    assert "unif2ace: 1 of 481 images failed" in error
    assert recorded < 481
    assert generate(prompts, tmp_path / "one", "--steps", "6") == 1
    assert result(tmp_path / "ray") == result(tmp_path / "one")
    assert not (tmp_path / "ray" / "parts" / "tasks").exists()


@needs_ray
@pytest.mark.slow
def test_answers_by_two_workers_one_of_which_is_killed(table, ask, tmp_path, model):
    for index, face in enumerate(tiny_pipeline().generate("a face", num_images_per_prompt=3, steps=1)):
        face.save(tmp_path / f"{index}.png")
    rows = [{"image": f"{i % 3}.png", "question": f"How are the {i % 17} eyes, {i}?"} for i in range(2000)]
    rows[7] = {"image": "none.png", "question": "Why?"}
    rows[1500] = {"image": "0.png"}
    rows[1999] = {"image": "1.png", "caption": True}
    questions = table(*rows)
    run = start("ask", "--questions", questions, "--out", str(tmp_path / "ray.jsonl"), "--model", model, "--json")
    recorded = kill_a_worker(run, tmp_path / "ray.jsonl.parts" / "00000.jsonl")
    text, error = run.communicate(timeout=300)
    assert run.returncode == 1, error
    assert json.loads(text)["failed"] == 2  # Ray's own words about the worker go elsewhere
    assert f"unif2ace: {questions}:8 (row 7): none.png: expected a picture file, found none" in error
    assert "unif2ace: 2 of 2000 answers failed" in error
    assert recorded < 2000
    assert ask(questions, tmp_path / "one.jsonl") == 1
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not (tmp_path / "ray.jsonl.parts" / "tasks").exists()


@needs_ray
@pytest.mark.slow
def test_a_mistake_of_a_worker_is_one_sentence(table, tmp_path, model):
    options = ["--model", model, "--backend", "triton"]
    prompts = table({"prompt": "a face"})
    run = start("generate", "--prompts", prompts, "--out", str(tmp_path / "out"), *options)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 2
    assert "Traceback" not in error
    assert re.match(r"unif2ace: error: \w+: back end 'triton' cannot run this call: ", error.splitlines()[-1])


def test_tasks_are_divided_into_files(tmp_path):
    tasks = [FaceTask(list(range(3 * i, 3 * i + 3)), i, str(i), "a face", [0, 1, 2], 2, 3.0, 1.0) for i in range(7)]
    paths = list(on_ray.write_chunks(tasks, 7, tmp_path))
    assert [len(read_lines(path)) for path in paths] == [2, 2, 2, 1]
    assert [FaceTask(**line) for path in paths for line in read_lines(path)] == tasks


def test_without_ray_it_is_named(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["generate", "--prompts", table({"prompt": "a face"}), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--engine", "ray"]) == 2
    assert "--engine ray: needs Ray: pip install 'unif2ace[ray]'" in capsys.readouterr().err


def test_ray_and_shards_do_not_mix(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["generate", "--prompts", table({"prompt": "a face"}), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--engine", "ray"]) == 2
    assert "--engine ray: expected a single process, got WORLD_SIZE > 1" in capsys.readouterr().err
