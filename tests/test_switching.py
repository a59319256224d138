"""Switching back ends changes speed and nothing else."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch

from tests.oracle import available_backends
from tests.tiny import tiny_pipeline
from unif2ace.evaluation.faces import held_out_faces
from unif2ace.generation import plain
from unif2ace.ops import _registry, use_backend
from unif2ace.pipeline import OPS, UniF2acePipeline
from unif2ace.training.batches import MixedBatches, TokenizedFaces
from unif2ace.training.muon import MuonAdamW
from unif2ace.training.objective import ObjectiveSettings, training_losses

STEPS = 200
TRAINING_OPS = (*OPS, "diffusion_loss")


@pytest.mark.parametrize("backend", [b for b in available_backends("sampling") if b != "reference"])
def test_equal_logits_give_equal_faces(backend: str, monkeypatch: pytest.MonkeyPatch):
    """The transformer on the reference, so that both loops see the same logits; sampling on `backend`."""
    pipe = tiny_pipeline()
    prompts = [pipe.tokenizer.encode(text) for text in ("a smiling person", "a bald man", "")]
    with use_backend("reference"):
        expected = plain.generate_codes(pipe.model, prompts, [1, 2, 3], steps=6, guidance=2.0)
        monkeypatch.setattr(plain, "sample_tokens", partial(plain.sample_tokens, backend=backend))
        monkeypatch.setattr(plain, "remask", partial(plain.remask, backend=backend))
        found = plain.generate_codes(pipe.model, prompts, [1, 2, 3], steps=6, guidance=2.0)
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.skipif("triton" not in available_backends("sampling"), reason="Triton cannot run here")
def test_a_whole_model_on_triton():
    """But for the ops that Triton leaves to libraries."""
    pipe = tiny_pipeline()
    with use_backend("triton"):
        assert {op for op, name in pipe.backends().items() if name != "triton"} == _registry.WITHOUT_TRITON
        face = pipe.generate("a smiling person", steps=2, seed=1)[0]
        answer = pipe.answer(face, "Why?", max_new_tokens=2)
    assert face.tobytes() == pipe.generate("a smiling person", steps=2, seed=1)[0].tobytes()
    assert answer == pipe.answer(face, "Why?", max_new_tokens=2)


def loss_curve(pipe: UniF2acePipeline, backend: str, steps: int) -> torch.Tensor:
    """[steps, 3] losses (all, of masked codes, of answers) of training a copy of the model on 16 faces."""
    table = held_out_faces(16, size=pipe.image_size)
    batches = MixedBatches(
        TokenizedFaces(table, *pipe.read_images(table.images)),
        pipe.tokenizer,
        pipe.model.vocabulary,
        generation=4,
        turns=2,
        caption_share=0.5,
        condition_dropout=0.1,
    )
    model = copy.deepcopy(pipe.model).train()
    optimizer = MuonAdamW(model, lr=1e-3)
    curve = []
    with use_backend(backend):
        for step in range(steps):
            rng = np.random.default_rng(step)
            batch = batches(torch.from_numpy(rng.choice(len(table), 8, replace=False)), rng)
            optimizer.zero_grad(set_to_none=True)
            losses = training_losses(model, batch, ObjectiveSettings())
            losses["loss"].backward()
            optimizer.step()
            curve.append(torch.stack([losses[name].detach() for name in ("loss", "mask_nll", "ntp")]))
    return torch.stack(curve)


@pytest.mark.slow
@pytest.mark.skipif(any("native" not in available_backends(op) for op in TRAINING_OPS), reason="no native kernels")
def test_loss_curves_agree():
    pipe = tiny_pipeline()
    expected, found = (loss_curve(pipe, name, STEPS) for name in ("reference", "native"))
    assert expected[-20:, 0].mean() < 0.5 * expected[:20, 0].mean()  # it learns, so the curve says something
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # 1e-6 was measured; chance would make it 1e-1
