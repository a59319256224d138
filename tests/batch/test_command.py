"""Runs that are interrupted, killed, divided: the same bytes as from one process that was left in peace."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.batch.results import read_lines, result
from tests.tiny import tiny_pipeline
from unif2ace.batch.command import shard
from unif2ace.errors import UserError
from unif2ace.generation.engine import GenerationEngine

ROWS = [{"prompt": "a smiling person"}, {"prompt": "a sad man", "num_images": 2}, {"prompt": ""}, {"prompt": "a face"}]
KILLS = 3


class Crash(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


# --------------------------------------------------------------------------------------------------- one process, again


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("suffix", ["", ".parquet"])
def test_a_run_goes_on_after_a_crash_at_any_write(table, generate, tmp_path, monkeypatch, call, suffix):
    prompts, real = table(*ROWS), getattr(os, call)
    assert generate(prompts, tmp_path / f"whole{suffix}") == 1

    def read(out):
        return result(out) if out.is_dir() else out.read_bytes()

    for point in range(1, 100):
        out, calls = tmp_path / f"{point}{suffix}", 0

        def crash(*arguments, limit=point):
            nonlocal calls
            calls += 1
            if calls >= limit:
                raise Crash
            return real(*arguments)

        monkeypatch.setattr(os, call, crash)
        try:
            generate(prompts, out, "--batch-size", "2")
        except Crash:
            assert not (out / "manifest.jsonl" if out.is_dir() else out).exists()
        else:
            break
        finally:
            monkeypatch.setattr(os, call, real)
        assert generate(prompts, out) == 1
        assert read(out) == read(tmp_path / f"whole{suffix}")
    assert point > 5


def test_what_is_recorded_is_not_drawn_again(table, generate, tmp_path, monkeypatch, capsys):
    prompts = table(*({"prompt": "a face"} for _ in range(6)))
    assert generate(prompts, tmp_path / "whole") == 0
    step, steps = GenerationEngine.step, 0

    def interrupted(self):
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(GenerationEngine, "step", interrupted)
    assert generate(prompts, tmp_path / "out", "--batch-size", "2") == 130
    assert "unif2ace: 4 of 6 images are recorded; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(GenerationEngine, "step", step)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(times) == 4
    parts = tmp_path / "out" / "parts"
    (parts / "partial-00005").write_bytes(b"half a pic")  # of another process, and of a driver of Ray
    (parts / "tasks").mkdir()
    (parts / "tasks" / "00000000.jsonl").write_text("{}")
    assert generate(prompts, tmp_path / "out") == 0
    assert "6 images, 4 were done before; 2 made in " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {path.name for path in parts.iterdir()} == {"00000.jsonl", "run.json", "run.lock", "finish.lock"}
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    next(iter(times)).unlink()  # a picture that was lost is drawn again
    assert generate(prompts, tmp_path / "out") == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_another_model_table_or_setting_is_refused_with_what_differs(table, generate, tmp_path, capsys):
    assert generate(table({"prompt": "a face"}), tmp_path / "out") == 0
    before = result(tmp_path / "out")
    other = tiny_pipeline()
    model = tmp_path / "other"
    other.save_pretrained(model)
    (model / "generation_config.json").write_text(
        json.dumps({**json.loads((model / "generation_config.json").read_text()), "remask_tau": 2.0})
    )
    for rows, options, sentence in [
        ({"prompt": "a face"}, ["--steps", "3"], "(steps was 2, is 3)"),
        ({"prompt": "a face"}, ["--seed", "1", "--guidance", "1"], "(guidance was 3.0, is 1.0; seed was 0, is 1)"),
        ({"prompt": "a face"}, ["--model", str(model)], "(model_sha256 was '"),
        ({"prompt": "another"}, [], "(table_sha256 was '"),
    ]:
        assert generate(table(rows), tmp_path / "out", *options) == 2
        assert sentence in capsys.readouterr().err
    assert result(tmp_path / "out") == before


def test_json_tells_what_was_done(table, generate, tmp_path, capsys):
    assert generate(table(*ROWS), tmp_path / "out", "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["done_before"], facts["failed"], facts["finished"]) == (5, 0, 1, True)
    assert facts["out"] == str(tmp_path / "out" / "manifest.jsonl")


def test_what_has_failed_counts_as_tried_but_not_as_made(table, generate, tmp_path, capsys):
    prompts = table({"prompt": "a face"}, {"prompt": ""}, {"prompt": ""})
    assert generate(prompts, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "manifest.jsonl: 3 images; 1 made in " in captured.out
    assert f"unif2ace: {prompts}:2 (row 1): prompt: expected some text, got an empty string\n" in captured.err
    assert [line["row"] for line in read_lines(tmp_path / "out" / "manifest.jsonl")] == [0, 1, 2]
    assert generate(prompts, tmp_path / "out", "--json") == 1  # tries the two again
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["done_before"], facts["made"], facts["failed"]) == (3, 1, 0, 2)
    assert facts["images_per_second"] == 0


# -------------------------------------------------------------------------------------------------------------- shards


def test_shards_give_what_one_process_gives(table, generate, tmp_path, capsys):
    prompts = table(*ROWS)
    assert generate(prompts, tmp_path / "one") == 1
    capsys.readouterr()
    assert generate(prompts, tmp_path / "two", shard=(1, 2)) == 0  # not the last: says nothing about failures
    captured = capsys.readouterr()
    assert "3 images; 3 made in " in captured.out
    assert "; other processes are still at work" in captured.out
    assert captured.err == ""
    assert not (tmp_path / "two" / "manifest.jsonl").exists()
    assert generate(prompts, tmp_path / "two", shard=(0, 2)) == 1
    assert result(tmp_path / "two") == result(tmp_path / "one")
    assert {path.name for path in (tmp_path / "two" / "parts").glob("*.jsonl")} == {"00000.jsonl", "00001.jsonl"}


def test_a_run_goes_on_with_another_number_of_shards(table, generate, tmp_path):
    prompts = table(*ROWS)
    assert generate(prompts, tmp_path / "one.parquet") == 1
    assert generate(prompts, tmp_path / "more.parquet", shard=(2, 3)) == 0
    assert generate(prompts, tmp_path / "more.parquet") == 1
    assert (tmp_path / "more.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("0", "two"), ("", "1")])
def test_ranks_that_are_none_are_refused(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=r"RANK, WORLD_SIZE: expected integers with RANK below WORLD_SIZE, got "):
        shard()


# -------------------------------------------------------------------------------------------- programs that are killed


def program(*arguments, module="unif2ace", **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def kill_and_finish(recorded, total, *options):
    """Kill the program several times while it works, then leave it in peace: nothing recorded is made again."""
    random.seed(0)
    for _ in range(KILLS):
        before = recorded.stat().st_size if recorded.exists() else 0
        run = program(*options)
        while run.poll() is None and not (recorded.exists() and recorded.stat().st_size > before):
            time.sleep(0.005)
        time.sleep(random.random() * 0.1)
        assert run.poll() is None, "the table is too short to be killed in"
        run.kill()
        run.communicate()
    done = len(recorded.read_bytes().splitlines()) - 1
    run = program(*options)
    text, error = run.communicate(timeout=300)
    assert (run.returncode, error) == (0, "")
    assert done <= int(text.split("s, ")[1].split(" were done before")[0]) < total
    assert not list(recorded.parent.glob("partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("out", ["faces", "faces.parquet"])
def test_kill_9_while_it_draws(table, generate, tmp_path, model, out):
    prompts = table(*({"prompt": f"a face {i}", "num_images": 8} for i in range(60)))
    options = ["generate", "--prompts", prompts, "--out", str(tmp_path / out), "--model", model, "--steps", "6"]
    parts = tmp_path / ("faces/parts" if out == "faces" else "faces.parquet.parts")
    kill_and_finish(parts / "00000.jsonl", 480, *options)
    assert generate(prompts, tmp_path / "whole" / out, "--steps", "6") == 0
    if out == "faces":
        assert result(tmp_path / out) == result(tmp_path / "whole" / out)
    else:
        assert (tmp_path / out).read_bytes() == (tmp_path / "whole" / out).read_bytes()


def write_questions(table, folder, number):
    for index, face in enumerate(tiny_pipeline().generate("a face", num_images_per_prompt=3, steps=1)):
        face.save(folder / f"{index}.png")
    return table(*({"image": f"{i % 3}.png", "question": f"How are the {i % 17} eyes, {i}?"} for i in range(number)))


@pytest.mark.slow
def test_kill_9_while_it_answers(table, ask, tmp_path, model):
    questions, out = write_questions(table, tmp_path, 800), tmp_path / "answers.jsonl"
    options = ["ask", "--questions", questions, "--out", str(out), "--model", model, "--batch-size", "8"]
    kill_and_finish(tmp_path / "answers.jsonl.parts" / "00000.jsonl", 800, *options)
    assert ask(questions, tmp_path / "whole.jsonl") == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_an_interrupt_from_the_keyboard(table, tmp_path, model):
    prompts = table(*({"prompt": f"a face {i}", "num_images": 8} for i in range(1000)))
    run = program("generate", "--prompts", prompts, "--out", str(tmp_path / "out"), "--model", model)
    part = tmp_path / "out" / "parts" / "00000.jsonl"
    while run.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert error.splitlines()[-1] == "unif2ace: interrupted"
    assert "of 8000 images are recorded; the same command goes on" in error
    recorded = read_lines(part)
    pictures = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/images/*/*.png")}
    assert {line["file"] for line in recorded} <= pictures
    assert all(Image.open(tmp_path / "out" / name).load() for name in pictures)
    assert len(recorded) >= 1


def torchrun(*options):
    launcher = ["--nproc-per-node", "2", "--standalone", "-m", "unif2ace"]
    run = program(*launcher, *options, module="torch.distributed.run")
    _, error = run.communicate(timeout=300)
    return run.returncode, error


@pytest.mark.slow
def test_torchrun_draws(table, generate, tmp_path, model):
    """The failed row belongs to process 0: torchrun must not end process 1 for it."""
    rows = [{"prompt": ""}] + [{"prompt": f"a face {i}", "num_images": 1 + i % 2 * 9} for i in range(7)]
    prompts = table(*rows)
    status, error = torchrun(
        "generate", "--prompts", prompts, "--out", str(tmp_path / "two"), "--model", model, "--steps", "2"
    )
    assert status == 1
    assert "unif2ace: 1 of 35 images failed" in error
    assert generate(prompts, tmp_path / "one") == 1
    assert result(tmp_path / "two") == result(tmp_path / "one")


@pytest.mark.slow
def test_torchrun_answers(table, ask, tmp_path, model):
    questions = write_questions(table, tmp_path, 101)
    assert torchrun("ask", "--questions", questions, "--out", str(tmp_path / "two.jsonl"), "--model", model)[0] == 0
    assert ask(questions, tmp_path / "one.jsonl") == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert len(read_lines(tmp_path / "two.jsonl.parts" / "00001.jsonl")) == 50
