"""Tables of prompts: the pictures a pipeline draws, their manifest, rows that fail alone."""

import hashlib
import json
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.batch.results import json_values, read_lines, result
from tests.tiny import tiny_pipeline
from unif2ace.batch.faces import COLUMNS, Faces, FaceTask, encode_png
from unif2ace.batch.table import Row
from unif2ace.bundle import model_sha256

ROWS = [
    {"prompt": "a smiling person"},
    {"prompt": "a sad man", "num_images": 3, "id": "sad"},
    {"prompt": "a face", "seed": 2**64 - 1, "num_images": 2, "steps": 3, "guidance": 0, "temperature": 0.5, "id": 7},
    {"prompt": "a face with a beard"},
]


def test_pictures_are_those_of_the_pipeline(table, generate, tmp_path, model, capsys):
    assert generate(table(*ROWS), tmp_path / "out", "--seed", "10") == 0
    lines = read_lines(tmp_path / "out" / "manifest.jsonl")
    assert [line["seed"] for line in lines] == [10, 11, 12, 13, 2**64 - 1, 0, 16]
    assert [line["number"] for line in lines] == list(range(7))
    assert [line["row"] for line in lines] == [0, 1, 1, 1, 2, 2, 3]
    assert [line["id"] for line in lines] == ["0", "sad", "sad", "sad", "7", "7", "3"]
    assert {line["model_sha256"] for line in lines} == {model_sha256(Path(model))}
    for line in lines:
        path = tmp_path / "out" / line["file"]
        drawn = tiny_pipeline().generate(
            line["prompt"],
            seed=line["seed"],
            steps=line["steps"],
            guidance_scale=line["guidance"],
            temperature=line["temperature"],
        )[0]
        assert Image.open(path).tobytes() == drawn.tobytes()
        assert hashlib.sha256(path.read_bytes()).hexdigest() == line["sha256"]
    settings = [(line["steps"], line["guidance"], line["temperature"]) for line in lines]
    assert settings == [(2, 3.0, 1.0)] * 4 + [(3, 0.0, 0.5)] * 2 + [(2, 3.0, 1.0)]
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'out' / 'manifest.jsonl'}: 7 images; 7 made in ")
    assert captured.err == ""


def test_formats_and_batches_change_nothing(table, generate, tmp_path):
    prompts = ["a smiling person", "a sad man", "a face"]
    (tmp_path / "table.txt").write_text("\n".join(prompts))
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "table.parquet")
    tables = [table(*({"prompt": prompt} for prompt in prompts)), *map(str, tmp_path.glob("table.[tp]*"))]
    for index, (path, size) in enumerate(zip(tables, (1, 2, 3), strict=True)):
        assert generate(path, tmp_path / f"out{index}", "--batch-size", str(size)) == 0
    assert result(tmp_path / "out0") == result(tmp_path / "out1") == result(tmp_path / "out2")


def test_bad_rows_fail_alone(table, generate, tmp_path, capsys):
    bad = [
        ({"prompt": ""}, "prompt: expected some text, got an empty string"),
        ({"prompt": 7}, "prompt: expected a string, got int"),
        ({"id": "x"}, "prompt: expected a sentence, got none"),
        ({"prompt": "very " * 200}, "prompt: expected at most 120 tokens, got "),
        ('{"prompt": "a fa', "expected a JSON object, got a broken one: Unterminated string"),
        ({"prompt": "a face", "seed": -1}, "seed: expected an integer from 0 to 2^64 - 1, got -1"),
        ({"prompt": "a face", "seed": [3]}, "seed: expected an integer from 0 to 2^64 - 1, got [3]"),
        ({"prompt": "a face", "guidance": 10**400}, "guidance: expected a number from 0 to 100, got 1000"),
        ({"prompt": "a face", "seed": True}, "seed: expected an integer from 0 to 2^64 - 1, got True"),
        ({"prompt": "a face", "steps": 2.5}, "steps: expected an integer from 1 to 1024, got 2.5"),
        ({"prompt": "a face", "guidance": float("nan")}, "guidance: expected a number from 0 to 100, got nan"),
        ({"prompt": "a face", "temperature": "hot"}, "temperature: expected a number from 0 to 100, got 'hot'"),
        ({"prompt": "a face", "num_images": 0}, "num_images: expected an integer of at least 1, got 0"),
        ({"prompt": "a face", "num_images": 10**9}, "num_images: expected at most 1000000, got 1000000000"),
        ({"prompt": "a face", "id": [1]}, "id: expected text or an integer, got [1]"),
        ({"prompt": "a\0f"}, "prompt: expected plain text, got a null character"),
        ({"prompt": "\ud800"}, "prompt: expected Unicode text, got bytes that are none at 0"),
    ]
    prompts = table({"prompt": "a face"}, *(row for row, _ in bad), {"prompt": "a face"})
    for out in (tmp_path / "out", tmp_path / "out.parquet"):
        assert generate(prompts, out, "--num", "1") == 1
        captured = capsys.readouterr()
        assert f"unif2ace: {len(bad)} of {len(bad) + 2} images failed; see {out}" in captured.err
    lines = read_lines(tmp_path / "out" / "manifest.jsonl")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [line["error"] for line in lines] == [row["error"] for row in rows]
    assert [line["error"] is None for line in lines] == [True] + [False] * len(bad) + [True]
    for line, (_, reason) in zip(lines[1:-1], bad, strict=True):
        assert line["error"].startswith(reason)
        assert line["file"] is None
    assert lines[-1]["seed"] == len(bad) + 1  # a row that fails keeps its number
    assert {path.name for path in (tmp_path / "out" / "images").rglob("*.png")} == {"00000000.png", "00000018.png"}


def test_a_folder_may_have_a_dot_in_its_name(table, generate, tmp_path):
    (tmp_path / "faces-1.5").mkdir()
    assert generate(table({"prompt": "a face"}), tmp_path / "faces-1.5") == 0
    assert len(read_lines(tmp_path / "faces-1.5" / "manifest.jsonl")) == 1


def test_parquet_holds_the_same_pictures(table, generate, tmp_path, capsys):
    prompts = table(*ROWS)
    assert generate(prompts, tmp_path / "out") == generate(prompts, tmp_path / "out.parquet") == 0
    lines = read_lines(tmp_path / "out" / "manifest.jsonl")
    for line, row in zip(lines, pq.read_table(tmp_path / "out.parquet").to_pylist(), strict=True):
        name = line.pop("file")
        assert row.pop("image") == {"bytes": (tmp_path / "out" / name).read_bytes(), "path": name.split("/")[-1]}
        assert row == line
    before = (tmp_path / "out.parquet").read_bytes()
    assert not (tmp_path / "out.parquet.parts" / "images").exists()
    capsys.readouterr()
    assert generate(prompts, tmp_path / "out.parquet") == 0
    assert "7 images, 7 were done before; 0 made in " in capsys.readouterr().out
    assert (tmp_path / "out.parquet").read_bytes() == before
    (tmp_path / "out.parquet").unlink()  # without it, all is drawn again
    assert generate(prompts, tmp_path / "out.parquet") == 0
    assert (tmp_path / "out.parquet").read_bytes() == before


def test_a_row_of_many_pictures_is_divided():
    job = Faces(tiny_pipeline().defaults, 1, 5, "hash", None, 4)
    row = Row(2, {"prompt": "a face", "num_images": 600})
    assert job.count(row) == 600
    tasks = list(job.tasks(row, 100, list(range(100, 700))))
    assert [len(task.numbers) for task in tasks] == [256, 256, 88]
    assert [seed for task in tasks for seed in task.seeds] == list(range(105, 705))
    assert all(json.loads(json.dumps(vars(task))) == vars(task) for task in tasks)


@given(st.dictionaries(st.sampled_from(COLUMNS), json_values), st.integers(0, 5))
def test_no_row_breaks_the_run(values, first):
    job = Faces(tiny_pipeline().defaults, 2, 5, "hash", None, 4)
    row = Row(first, values)
    numbers = list(range(first, first + min(job.count(row), 600)))
    tasks = list(job.tasks(row, first, numbers))
    assert [number for task in tasks for number in task.numbers] == numbers
    for task in tasks:
        assert FaceTask(**json.loads(json.dumps(asdict(task)))) == task
        assert (task.error is None) == (task.seeds is not None)


def test_png_bytes_depend_on_pixels_only():
    image = tiny_pipeline().generate("a face", seed=1, steps=1)[0]
    copy = Image.frombytes("RGB", image.size, image.tobytes())
    copy.info["Comment"] = "elsewhere"
    assert encode_png(copy) == encode_png(image)


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"prompt": "a"}, {"promt": "b"}], [], "table.jsonl:2 (row 1): expected columns among prompt, id, "),
        ([], [], "table.jsonl: expected at least one row, got an empty table"),
        ([{"prompt": "a"}], ["--mask", "x.png"], "generate: expected --prompts without --mask, got both"),
        ([{"prompt": "a"}], ["a face"], "generate: expected --prompts without prompt, got both"),
        ([{"prompt": "a"}], ["--out", "face.png"], "--out: expected a folder or a file ending in .parquet, got face"),
        ([{"prompt": "a"}], ["--steps", "0"], "steps: expected an integer from 1 to 1024, got 0"),
        ([{"prompt": "a"}], ["--seed", "-1"], "seed: expected an integer from 0 to 2^64 - 1, got -1"),
        ([{"prompt": "a"}], ["--out", "/proc/nothing"], "cannot write into /proc/nothing/parts: "),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(table, generate, tmp_path, capsys, rows, options, sentence):
    assert generate(table(*rows), tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("unif2ace: error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_table(table, generate, tmp_path):
    """Requests, pictures and lines are held for one batch. What is held for longer would hold the ids too."""
    peaks = []
    for number in (50, 450):
        prompts = table(*({"prompt": f"a face {i % 3}", "id": "x" * 4000} for i in range(number)))
        tracemalloc.start()
        assert generate(prompts, tmp_path / f"{number}", "--batch-size", "16", "--guidance", "0", "--steps", "1") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 400 * 2000
