"""Tables of questions: the answers of a pipeline, rows that fail alone."""

import json
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.batch.results import json_values, read_lines
from tests.bits import needs_native
from tests.tiny import SIZE, tiny_pipeline
from unif2ace.batch.answers import COLUMNS, Answers, AnswerTask
from unif2ace.batch.table import Row
from unif2ace.pipeline import UniF2acePipeline


@pytest.fixture
def pictures(tmp_path):
    faces = tiny_pipeline().generate("a face", num_images_per_prompt=2, seed=1, steps=1)
    for index, face in enumerate(faces):
        face.save(tmp_path / f"{index}.png")
    Image.new("RGBA", (70, 50), "red").save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    return faces


def test_answers_are_those_of_the_pipeline(table, ask, tmp_path, pictures):
    rows = [
        {"image": "0.png", "question": "How are the eyes?"},
        {"image": str(tmp_path / "1.png"), "question": "Is there a beard?", "id": "b"},
        {"image": "0.png", "caption": True},
        {"image": "1.png", "question": "What color is the hair?", "caption": False},
    ]
    assert ask(table(*rows), tmp_path / "out.jsonl", "--batch-size", "3") == 0
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == ["0", "b", "2", "3"]
    for line, picture in zip(lines, (0, 1, 0, 1), strict=True):
        question = line["question"] or "Describe the face."
        assert line["answer"] == tiny_pipeline().answer(pictures[picture], question)[0]
    assert ask(table(*rows), tmp_path / "out.parquet") == 0
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == lines


@needs_native
def test_batches_and_shards_give_the_same_bytes(table, ask, tmp_path, pictures):
    words = ("eyes", "hair", "mouth", "clothing", "beard or moustache")
    rows = [{"image": f"{i % 2}.png", "question": f"How is the {words[i % 5]}{' now' * (i % 7)}?"} for i in range(20)]
    rows += [{"image": "0.png", "caption": True}, {"image": "1.png", "caption": True}]
    questions = table(*rows)
    assert ask(questions, tmp_path / "one.jsonl") == 0
    for size in (1, 3):
        assert ask(questions, tmp_path / f"by-{size}.jsonl", "--batch-size", str(size)) == 0
        assert (tmp_path / f"by-{size}.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    for rank in (2, 1, 0):
        assert ask(questions, tmp_path / "shards.jsonl", shard=(rank, 3)) == 0
    assert (tmp_path / "shards.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert len({line["answer"] for line in read_lines(tmp_path / "one.jsonl")}) > 3


def test_bad_rows_fail_alone_and_are_asked_again(table, ask, tmp_path, pictures, capsys):
    good = {"image": "0.png", "question": "How are the eyes?"}
    bad = [
        ({"image": "later.png", "question": "Why?"}, "later.png: expected a picture file, found none"),
        ({"image": "a\nb.png", "question": "Why?"}, "a\nb.png: expected a picture file, found none"),
        ({"image": "broken.png", "question": "Why?"}, "broken.png: expected a readable picture"),
        ({"image": "wide.png", "question": "Why?"}, "wide.png: expected an RGB picture of 32 x 32 pixels, got RGBA"),
        ({"image": "a\0b.png", "question": "Why?"}, "expected a readable picture, got: embedded null byte"),
        ({"image": 3, "question": "Why?"}, "image: expected the path of a picture file, got int"),
        ({"image": "", "question": "Why?"}, "image: expected the path of a picture file, got an empty string"),
        ({"question": "Why?"}, "image: expected a picture file, got none"),
        ({"image": "0.png"}, "question: expected a question or caption = true, got neither"),
        ({"image": "0.png", "question": "Why?", "caption": True}, "question: expected a question or caption = true"),
        ({"image": "0.png", "caption": "yes"}, "caption: expected true or false, got 'yes'"),
        ({"image": "0.png", "question": ""}, "question: expected some text, got an empty string"),
        ({"image": "0.png", "question": "why " * 200}, "question: expected at most 120 tokens, got "),
        ("why", "expected a JSON object"),
    ]
    questions = table(good, *(row for row, _ in bad), good)
    assert ask(questions, tmp_path / "out.jsonl") == 1
    error = capsys.readouterr().err
    assert f"{len(bad)} of {len(bad) + 2} answers failed" in error
    assert all(line.startswith("unif2ace: ") for line in error.splitlines())
    lines = read_lines(tmp_path / "out.jsonl")
    assert lines[0]["answer"] == lines[-1]["answer"] == tiny_pipeline().answer(pictures[0], good["question"])[0]
    for line, (_, reason) in zip(lines[1:-1], bad, strict=True):
        assert reason in line["error"]
        assert line["answer"] is None
    assert lines[1]["error"].startswith("later.png: ")  # not where the table happens to lie

    pictures[0].save(tmp_path / "later.png")
    assert ask(questions, tmp_path / "out.jsonl") == 1
    captured = capsys.readouterr()
    assert f"{len(bad) + 2} answers, 2 were done before; 1 made in " in captured.out
    assert f"{len(bad) - 1} of {len(bad) + 2} answers failed" in captured.err
    assert read_lines(tmp_path / "out.jsonl")[1]["answer"] == tiny_pipeline().answer(pictures[0], "Why?")[0]


@given(st.dictionaries(st.sampled_from(COLUMNS), json_values))
def test_no_row_breaks_the_run(values):
    (task,) = Answers(Path(), False, "hash", 4).tasks(Row(3, values), 3, [3])
    assert AnswerTask(**json.loads(json.dumps(asdict(task)))) == task
    assert task.error is not None or (task.image is not None and (task.question is None) == task.caption)


def test_fit_takes_any_picture_and_is_a_setting(table, ask, tmp_path, pictures, capsys):
    questions = table({"image": "wide.png", "question": "Why?"})
    assert ask(questions, tmp_path / "out.jsonl", "--fit") == 0
    fitted = Image.new("RGB", (SIZE, SIZE), "red")
    assert read_lines(tmp_path / "out.jsonl")[0]["answer"] == tiny_pipeline().answer(fitted, "Why?")[0]
    assert ask(questions, tmp_path / "out.jsonl") == 2
    assert "(fit was True, is False)" in capsys.readouterr().err


def test_a_batch_beyond_memory_is_asked_one_by_one(table, ask, tmp_path, pictures, monkeypatch):
    answer = UniF2acePipeline.answer

    def small(self, images, questions, **options):
        if len(questions) > 1 or "beard" in questions[0]:
            raise torch.OutOfMemoryError("out of memory\nmore")
        return answer(self, images, questions, **options)

    monkeypatch.setattr(UniF2acePipeline, "answer", small)
    rows = [{"image": "0.png", "question": text} for text in ("Why?", "Is there a beard?", "How?")]
    assert ask(table(*rows), tmp_path / "out.jsonl") == 1
    assert [line["error"] for line in read_lines(tmp_path / "out.jsonl")] == [None, "out of memory", None]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--out", "answers.txt"], "--out: expected a file ending in .jsonl or .parquet, got answers.txt"),
        (["--questions", "q.txt"], "--questions: expected a table with columns, .jsonl or .parquet, got q.txt"),
        (["--caption"], "ask: expected --questions without --caption, got both"),
        (["face.png"], "ask: expected --questions without image, got both"),
    ],
)
def test_mistakes_are_one_sentence(table, ask, tmp_path, capsys, options, sentence):
    assert ask(table({"image": "0.png", "caption": True}), tmp_path / "out.jsonl", *options) == 2
    assert sentence in capsys.readouterr().err


def test_a_result_without_its_record_is_left_alone(table, ask, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("precious")
    assert ask(table({"image": "0.png", "caption": True}), tmp_path / "out.jsonl") == 2
    assert "out.jsonl: exists, but not its record" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def test_memory_does_not_grow_with_the_table(table, ask, tmp_path, pictures, monkeypatch):
    """Rows, pictures, answers and lines are held for one batch; of a whole table, 18 bytes per row."""
    monkeypatch.setattr(
        UniF2acePipeline, "answer", lambda self, images, questions: ["a long answer" * 20] * len(images)
    )
    peaks = []
    for number in (200, 3200):
        questions = table(*({"image": f"{i % 2}.png", "question": f"How are the eyes, {i}?"} for i in range(number)))
        tracemalloc.start()
        assert ask(questions, tmp_path / f"{number}.jsonl") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3000 * 30
