"""Training of the small encoders on a handful of drawn faces: it runs, learns, saves, and restarts."""

import numpy as np
import pytest
import torch

from unif2ace.data.attributes import ATTRIBUTES, labels, visible
from unif2ace.data.avatars import draw_face, sample_face
from unif2ace.data.language import caption
from unif2ace.data.loader import FaceTable
from unif2ace.data.text import TextTokenizer
from unif2ace.errors import UserError
from unif2ace.model.features import SmallClipEncoder, SmallFaceEncoder
from unif2ace.training import encoders
from unif2ace.training.encoders import ClipTraining, FaceTraining, train_clip, train_face

SIZE = 32


def faces(count: int, seed: int) -> FaceTable:
    drawn = [sample_face(np.random.default_rng([seed, index])) for index in range(count)]
    return FaceTable(
        images=torch.from_numpy(np.stack([np.asarray(draw_face(face, SIZE)) for face in drawn])),
        labels=torch.tensor([labels(face) for face in drawn]),
        attributes=[visible(face) for face in drawn],
        captions=[[caption(face, np.random.default_rng([seed, index]))] for index, face in enumerate(drawn)],
        questions=[[] for _ in drawn],
    )


@pytest.fixture(scope="module")
def tables() -> tuple[FaceTable, FaceTable]:
    return faces(48, 1), faces(24, 2)


def test_clip_learns_and_restarts(tables, tmp_path):
    train, val = tables
    tokenizer = TextTokenizer.train([captions[0].text for captions in train.captions], 300)
    settings = ClipTraining(
        steps=30, batch_size=24, evaluate_every=30, checkpoint_every=15, text_width=32, warmup_steps=5
    )
    encoder, scores = train_clip(settings, train, val, tokenizer, tmp_path)
    # Held-out faces, so chance is 1 / 24; thirty steps on 48 faces already beat it.
    assert scores["image_to_text"] > 2 / 24
    again = SmallClipEncoder.from_pretrained(tmp_path)
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(again.encode(images), encoder.encode(images), rtol=0, atol=0.02)
    _, repeated = train_clip(settings, train, val, tokenizer, tmp_path)  # nothing left to do
    assert repeated == scores


def test_face_separates_identities(tables, tmp_path):
    train, val = tables
    settings = FaceTraining(steps=30, batch_size=24, evaluate_every=30, warmup_steps=5, val_identities=24)
    encoder, scores = train_face(settings, train, val, tmp_path)
    assert scores["people"] == 24
    assert scores["separation"] > 0.7
    assert SmallFaceEncoder.from_pretrained(tmp_path).config == encoder.config
    with pytest.raises(UserError, match="held-out"):
        train_face(FaceTraining(val_identities=1), train, val, tmp_path)


def test_a_second_picture_keeps_what_makes_the_person(tables, monkeypatch):
    train, _ = tables
    drawn = []

    def record(face: dict[str, str], size: int) -> np.ndarray:
        drawn.append(face)
        return np.asarray(draw_face(face, size))

    monkeypatch.setattr(encoders, "draw_face", record)
    assert encoders.second_pictures(train, 20, 7).shape == (20, SIZE, SIZE, 3)
    changed = 0
    for before, after in zip(train.attributes[:20], map(visible, drawn), strict=True):
        for name in encoders.IDENTITY:
            assert before.get(name) == after.get(name)
        changed += sum(before.get(name) != after.get(name) for name in ATTRIBUTES)
    assert changed > 60  # seven more attributes each, redrawn independently


def test_identity_keys_join_equal_people(tables):
    train, _ = tables
    doubled = FaceTable(train.images[:2], train.labels[:2], [train.attributes[0]] * 2, [], [])
    assert encoders.identity_keys(doubled, 2).tolist() == [0, 0]
    assert len(encoders.identity_keys(train, 48).unique()) > 40


def test_supervised_contrastive_by_hand():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), dim=1)
    keys = torch.tensor([0, 0, 1])
    first = torch.log_softmax(vectors[0] @ vectors[1:].T / 0.5, 0)[0]
    second = torch.log_softmax(vectors[1] @ vectors[[0, 2]].T / 0.5, 0)[0]
    found = encoders.supervised_contrastive(vectors, keys, 0.5)
    torch.testing.assert_close(found, -(first + second) / 3)  # the third face has no partner


def test_ranked_above_and_padding():
    assert encoders.ranked_above(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.75
    assert encoders.padded([[5, 6], [7]]).tolist() == [[5, 6], [7, -1]]


def test_text_tower_ignores_padding_and_hears_the_order():
    torch.manual_seed(0)
    tower = encoders.TextTower(10, 16, 8).eval()
    alone, beside = tower(encoders.padded([[1, 2, 3]])), tower(encoders.padded([[1, 2, 3], [4, 5, 6, 7, 8]]))
    torch.testing.assert_close(alone[0], beside[0])
    assert not torch.allclose(alone, tower(encoders.padded([[3, 2, 1]])))
