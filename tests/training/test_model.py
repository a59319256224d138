"""Training of the transformer: the objective is the sum it says, and a resumed run logs the losses of a whole one."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.tiny import SIZE, TOKENS, build_parts
from unif2ace.data.attributes import ATTRIBUTES, visible
from unif2ace.data.avatars import sample_face
from unif2ace.data.language import caption, questions
from unif2ace.data.loader import FaceTable
from unif2ace.model.token_moe import balance_loss
from unif2ace.training import model as training
from unif2ace.training.batches import MixedBatches, TokenizedFaces
from unif2ace.training.model import ModelTraining, train_model
from unif2ace.training.objective import ObjectiveSettings, training_losses

FACES = 24


@pytest.fixture(scope="module")
def faces():
    rng = np.random.default_rng(0)
    drawn = [sample_face(rng) for _ in range(FACES)]
    table = FaceTable(
        images=torch.zeros(FACES, SIZE, SIZE, 3, dtype=torch.uint8),
        labels=torch.zeros(FACES, len(ATTRIBUTES), dtype=torch.int64),
        attributes=[visible(face) for face in drawn],
        captions=[[caption(face, rng)] for face in drawn],
        questions=[questions(face, rng) for face in drawn],
    )
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(FACES, rows, 8, generator=generator) for name, rows in (("clip", 4), ("face", 1))}
    return TokenizedFaces(table, torch.randint(0, 27, (FACES, TOKENS), generator=generator), features)


def test_the_objective_is_the_sum_of_its_reported_parts(faces):
    parts = build_parts()
    batches = MixedBatches(
        faces,
        parts.tokenizer,
        parts.model.vocabulary,
        generation=3,
        turns=2,
        caption_share=0.5,
        condition_dropout=0.1,
    )
    batch = batches(torch.arange(6), np.random.default_rng(0))
    settings = ObjectiveSettings(alpha=0.5, ntp_weight=2.0, generation_weight=3.0, balance_weight=0.25)
    losses = training_losses(parts.model, batch, settings)
    total = 2.0 * losses["ntp"] + 3.0 * (losses["mask_nll"] + 0.5 * losses["score"]) + 0.25 * losses["balance"]
    assert torch.allclose(losses["loss"], total, rtol=1e-5)
    assert losses["loss"].requires_grad
    assert not any(losses[name].requires_grad for name in ("ntp", "mask_nll", "score", "balance"))

    # The parts themselves, from all logits and plain cross-entropy.
    output = parts.model(batch.packed, mask_ratio=batch.mask_ratio, features=batch.features)
    logits = parts.model.head(output.hidden)
    ntp = torch.nn.functional.cross_entropy(logits[batch.answer_rows], batch.answer_targets)
    columns = parts.model.vocabulary.code_columns
    codes = torch.nn.functional.cross_entropy(
        logits[batch.code_rows][:, columns], batch.code_targets - parts.model.vocabulary.code_start
    )
    assert torch.allclose(losses["ntp"], ntp, rtol=1e-4)
    assert torch.allclose(losses["mask_nll"], codes, rtol=1e-4)
    assert torch.allclose(losses["balance"], balance_loss(output.plans, parts.model.layers[0].ffn.group_bounds))


def test_a_resumed_run_logs_the_losses_of_an_uninterrupted_one(faces, tmp_path, monkeypatch):
    settings = ModelTraining(
        steps=6,
        generation=3,
        understanding=3,
        warmup_steps=2,
        learning_rate=1e-3,
        log_every=1,
        checkpoint_every=2,
        evaluate_every=6,
    )
    monkeypatch.setattr(training, "SAMPLES", 2)

    def run(folder):
        parts = build_parts()
        return train_model(settings, parts.model, parts.tokenizer, parts.codec, faces, faces, folder)

    whole = run(tmp_path / "whole")
    real, calls = training.training_losses, 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:  # during the fourth step: the checkpoint of the second is there
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "halves")
    assert run(tmp_path / "halves") == whole

    def losses(folder):
        records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        return {record["step"]: record["loss"] for record in records if "loss" in record}

    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == settings.steps
    assert (tmp_path / "halves" / "samples-001.png").exists()


def test_another_setting_does_not_continue_a_run(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAMPLES", 2)
    parts = build_parts()
    settings = ModelTraining(steps=1, generation=2, understanding=2, evaluate_every=1, checkpoint_every=1)
    train_model(settings, parts.model, parts.tokenizer, parts.codec, faces, faces, tmp_path)
    changed = dataclasses.replace(settings, alpha=0.0)
    with pytest.raises(ValueError, match=r"other settings \(alpha\)"):
        train_model(changed, parts.model, parts.tokenizer, parts.codec, faces, faces, tmp_path)


def test_a_full_disk_ends_in_one_sentence(faces, tmp_path):
    (tmp_path / "train.jsonl").symlink_to("/dev/full")
    parts = build_parts()
    settings = ModelTraining(steps=1, generation=2, understanding=2, log_every=1)
    with pytest.raises(ValueError, match=r"model: cannot write into .*: No space left on device"):
        train_model(settings, parts.model, parts.tokenizer, parts.codec, faces, faces, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="model: cannot write into"):
        train_model(settings, parts.model, parts.tokenizer, parts.codec, faces, faces, tmp_path / "file")


@pytest.mark.parametrize("name", ["generation", "understanding", "turns"])
def test_a_mixture_without_one_of_its_parts_is_refused(name):
    with pytest.raises(ValueError, match=f"training setting {name} must be at least 1, got 0"):
        ModelTraining(**{name: 0})
