"""Scores count what they say, held-out faces are held out, and back ends are timed in turn."""

import json

import pytest
import torch

from tests.tiny import SIZE, TOKENS, tiny_pipeline
from unif2ace.config import preset
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.avatars import split_of
from unif2ace.data.language import full_caption
from unif2ace.errors import UserError
from unif2ace.evaluation import metrics, speed
from unif2ace.evaluation.faces import held_out_faces
from unif2ace.ops import default_backend
from unif2ace.pipeline import UniF2acePipeline


@pytest.fixture(scope="module")
def table():
    return held_out_faces(6, size=SIZE)


class Oracle:
    """A pipeline and judge that are always right, or wrong in ways that a test chooses."""

    def __init__(self, table):
        self.table, self.config = table, tiny_pipeline().parts.judge.config
        self.names = list(ATTRIBUTES)
        self.wrong_label = self.wrong_answer = None
        self.faces = [image.tobytes() for image in metrics.to_images(table, len(table))]

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, prompts, **options):
        assert prompts == [captions[0].text for captions in self.table.captions[: len(prompts)]]
        return metrics.to_images(self.table, len(prompts))

    def predict(self, images):
        labels = self.table.labels[: len(images)].clamp(min=0)
        if self.wrong_label is not None:
            column = self.names.index(self.wrong_label)
            labels[:, column] = (labels[:, column] + 1) % len(ATTRIBUTES[self.wrong_label].values)
        return labels

    def answer(self, images, questions, **options):
        known = {
            (face, item.question): item.answer
            for face, items in zip(self.faces, self.table.questions, strict=True)
            for item in items
        }
        answers = [known[image.tobytes(), text] for image, text in zip(images, questions, strict=True)]
        return ["?" if "hair" in text and self.wrong_answer else a for a, text in zip(answers, questions, strict=True)]

    def caption(self, images, **options):
        seen = [self.table.attributes[self.faces.index(image.tobytes())] for image in images]
        return [full_caption({**face, "skin": "blue"} if self.wrong_answer else face) for face in seen]


def test_held_out_faces_are_of_the_test_split_and_repeatable(table):
    again = held_out_faces(3, size=SIZE)
    assert torch.equal(again.images, table.images[:3])
    assert again.questions == table.questions[:3]
    assert not torch.equal(held_out_faces(3, size=SIZE, seed=1).images, again.images)
    for seen in table.attributes:  # hidden attributes have no part in the split, so any value does
        assert split_of({name: seen.get(name, attribute.values[0]) for name, attribute in ATTRIBUTES.items()}) == "test"
    with pytest.raises(UserError, match="faces: expected at least 1"):
        held_out_faces(0)


def test_a_perfect_model_scores_one(table):
    oracle = Oracle(table)
    drawn, real = metrics.evaluate_generation(oracle, oracle, table)
    scores = [drawn, real, metrics.evaluate_answers(oracle, table), metrics.evaluate_captions(oracle, table)]
    assert [(score.macro, score.overall) for score in scores] == [(1.0, 1.0)] * 4
    assert drawn.counts == {
        name: count
        for name in ATTRIBUTES
        if (count := sum(name in captions[0].attributes for captions in table.captions))
    }
    assert scores[2].items == sum(len(questions) for questions in table.questions)


def test_mistakes_lower_their_attribute_alone(table):
    oracle = Oracle(table)
    oracle.wrong_label, oracle.wrong_answer = "mouth", True
    drawn, _ = metrics.evaluate_generation(oracle, oracle, table, 4)
    assert drawn.items == 4
    assert {name for name, value in drawn.per_attribute.items() if value < 1} == {"mouth"}
    assert drawn.macro == pytest.approx(1 - 1 / len(drawn.per_attribute))
    answers = metrics.evaluate_answers(oracle, table)
    assert answers.per_attribute["eyes"] == 1.0
    assert answers.per_attribute["hair"] < 1
    captions = metrics.evaluate_captions(oracle, table)
    assert {name for name, value in captions.per_attribute.items() if value < 1} == {"skin"}


def test_a_random_model_can_be_scored(table):
    pipe, calls = tiny_pipeline(), []
    drawn, _ = metrics.evaluate_generation(pipe, pipe.parts.judge, table, 2, steps=1)
    answers = metrics.evaluate_answers(pipe, table, 2, on_answer=lambda *call: calls.append(call))
    captions = metrics.evaluate_captions(pipe, table, 2)
    for score in (drawn, answers, captions):
        assert 0 <= score.overall < 1
        assert score.to_dict()["items"] == score.items
    assert calls[-1] == (answers.items, answers.items)
    text = metrics.score_table({"generation": drawn, "answers": answers, "captions": captions})
    lines = text.splitlines()
    assert lines[0].split() == ["attribute", "generation", "answers", "captions"]
    assert lines[-2].startswith("mean over attributes")
    assert len({len(line) for line in lines}) == 1  # aligned


def test_unusable_tables_and_judges_are_refused(table):
    with pytest.raises(UserError, match="faces: expected at least 1, got 0"):
        metrics.evaluate_captions(tiny_pipeline(), table, 0)
    with pytest.raises(UserError, match="expected faces with labelled attributes"):
        metrics.Score.of([], 0, 0.0)
    other = Oracle(table)
    other.config = type("Config", (), {"classes": {"skin": 2}})
    with pytest.raises(UserError, match="judge: expected one trained on the attributes of this version"):
        metrics.judge_labels(other, table.images, 2)


def test_back_ends_are_timed_in_turn():
    pipe, rounds = tiny_pipeline(), []
    work = [speed.drawing(pipe, 2, steps=1), speed.answering(pipe, 2)]
    speeds = speed.compare_backends(pipe, work, rounds=2, on_round=lambda *call: rounds.append(call))
    assert [entry.backend for entry in speeds] == ["reference", "auto"]
    assert all(rate > 0 for entry in speeds for rate in entry.rates.values())
    assert set(speeds[0].ops.values()) == {"reference"}
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    lines = speed.speed_table(speeds).splitlines()
    assert lines[0].split()[:4] == ["back", "end", "faces/s", "answers/s"]
    assert "1.00x, 1.00x" in lines[1]


def test_a_workload_runs_on_the_back_end_it_is_bound_to():
    seen = []
    work = speed.Workload("calls", 1, lambda: seen.append(default_backend()))
    speed.on_backend("reference", work.call)()
    work.call()
    assert seen == ["reference", "auto"]


def test_training_is_timed_without_changing_the_model():
    pipe = tiny_pipeline()
    before = pipe.model.head.weight.clone()
    work = speed.training(pipe, (2, 2))
    (entry,) = speed.compare_backends(pipe, [work], ["reference"], rounds=1)
    assert work.items > 4 * TOKENS
    assert entry.rates["tokens/s"] > 0
    assert torch.equal(pipe.model.head.weight, before)


def test_traces_hold_every_workload_on_every_back_end(tmp_path):
    pipe = tiny_pipeline()
    path = tmp_path / "trace.json"
    speed.trace_backends(pipe, [speed.drawing(pipe, 1, steps=1)], ["reference", "auto"], path)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"faces: reference", "faces: auto"} <= names


def test_what_cannot_be_compared_is_refused():
    pipe = UniF2acePipeline(tiny_pipeline().parts, backend="reference")
    with pytest.raises(UserError, match="expected a pipeline with backend='auto', got 'reference'"):
        speed.compare_backends(pipe, [])
    with pytest.raises(UserError, match="unknown back end 'magic'; expected one of auto, reference, native, triton"):
        speed.compare_backends(tiny_pipeline(), [], ["magic"])


def test_a_random_model_stands_between_the_parts_of_the_bundled_one(monkeypatch):
    monkeypatch.setitem(speed.RANDOM_MODELS, "random-tiny", ("avatars-tiny", {}))
    bundled, pipe = speed.load("avatars-tiny", "cpu"), speed.load("random-tiny", "cpu")
    assert pipe.model.config == bundled.model.config
    assert not torch.equal(pipe.model.head.weight, bundled.model.head.weight)
    assert torch.equal(pipe.model.head.weight, speed.load("random-tiny", "cpu").model.head.weight)
    assert len(pipe.generate("a face", steps=1)) == 1
    assert speed.size_of("random-tiny") == speed.RANDOM_SIZE != speed.size_of("avatars-tiny")
    for name, parameters in (("random-100m", 1e8), ("random-1.8b", 1.8e9)):
        base, changes = speed.RANDOM_MODELS[name]
        assert preset(base, **changes).num_parameters() == pytest.approx(parameters, rel=0.07)


def test_the_large_random_model_brings_codec_and_encoders_of_its_own(monkeypatch):
    base, changes = speed.RANDOM_MODELS["random-1.8b"]
    small = {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "ffn_width": 64}
    monkeypatch.setitem(speed.RANDOM_MODELS, "random-1.8b", (base, {**changes, **small}))
    pipe = speed.load("random-1.8b", "cpu")
    assert pipe.model.config.num_image_tokens == 256
    assert [face.size for face in speed.drawing(pipe, 2, 2).call()] == [(128, 128)] * 2
    assert len(speed.answering(pipe, 1).call()) == len(speed.QUESTIONS)
    speed.training(pipe, (2, 1), update=False).call()
