"""The judge: shapes, masked labels, agreement, storage, and a short training."""

import pytest
import torch

from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.loader import FaceTable
from unif2ace.errors import UserError
from unif2ace.evaluation.judge import Judge, JudgeConfig, agreement
from unif2ace.training.judge import JudgeTraining, degraded, train_judge


def coloured(count: int) -> FaceTable:
    """Flat pictures whose colour says every attribute: class 0 is dark, class 1 bright; some labels unknown."""
    generator = torch.Generator().manual_seed(0)
    bright = torch.randint(0, 2, (count,), generator=generator)
    images = (40 + 170 * bright).view(-1, 1, 1, 1).expand(count, 32, 32, 3).to(torch.uint8)
    labels = bright[:, None].repeat(1, len(ATTRIBUTES))
    labels[::3, 1] = -1
    labels[:, 2] = -1
    return FaceTable(images, labels, [], [], [])


def test_short_training_reads_the_colour(tmp_path):
    settings = JudgeTraining(steps=15, batch_size=16, warmup_steps=3, evaluate_every=15)
    judge, scores = train_judge(settings, coloured(64), coloured(32), tmp_path)
    assert scores["macro"] > 0.95
    assert "hair color" not in scores  # its label is never known
    again = Judge.from_pretrained(tmp_path)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    for a, b in zip(judge(images), again(images), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    assert again.names == list(ATTRIBUTES)


def test_prediction_shapes_and_refusals():
    judge = Judge(JudgeConfig(image_size=32)).eval()
    images = torch.rand(5, 3, 32, 32)
    assert torch.equal(judge.predict(images, batch_size=2), judge.predict(images))
    assert judge.predict(images).shape == (5, len(ATTRIBUTES))
    assert judge.predict(images[:0]).shape == (0, len(ATTRIBUTES))
    with pytest.raises(UserError, match=r"\[B, 3, 32, 32\]"):
        judge.predict(torch.zeros(1, 3, 64, 64))


def test_agreement_counts_known_labels_only():
    predicted, labels = torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([[0, -1, -1], [1, 1, -1]])
    assert agreement(predicted, labels, ["a", "b", "c"]) == {"a": 0.5, "b": 1.0, "macro": 0.75}
    with pytest.raises(UserError, match="agreement"):
        agreement(predicted, labels[:1], ["a", "b", "c"])


def test_degraded_keeps_the_range_and_repeats():
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    first, second = (degraded(images, 1.0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert not torch.equal(first, images)


def test_a_full_size_judge_is_under_a_megabyte():
    assert 2 * sum(p.numel() for p in Judge().parameters()) < 1_000_000
