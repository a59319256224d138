"""One ordinary call of every public op, for promises that all ops make alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unif2ace import ops

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K, CODES = 96, 64, 32, 8, 2, 1000


class Case(NamedTuple):
    """`run(backend, **inputs)` gives a tuple of tensors; gradients exist for all `inputs` where `differentiable`."""

    op: str
    inputs: dict[str, Tensor]
    run: Callable[..., tuple[Tensor, ...]]
    differentiable: bool


def routing(dtype: torch.dtype) -> Case:
    group = torch.arange(TOKENS, dtype=torch.int32) % 2

    def run(backend: str, logits: Tensor) -> tuple[Tensor, ...]:
        plan = ops.route(logits, TOP_K, token_group=group, group_bounds=(0, 3, EXPERTS), backend=backend)
        return plan.weights, plan.importance, plan.logsumexp, plan.experts, plan.offsets, plan.order, plan.position

    return Case("routing", {"logits": torch.randn(TOKENS, EXPERTS, dtype=dtype)}, run, True)


def expert_mlp(dtype: torch.dtype) -> Case:
    plan = ops.route(torch.randn(TOKENS, EXPERTS), TOP_K, backend="reference")

    def run(backend: str, x: Tensor, weights: Tensor, **matrices: Tensor) -> tuple[Tensor, ...]:
        return (ops.expert_mlp(x, plan._replace(weights=weights), **matrices, activation="swiglu", backend=backend),)

    inputs = {
        "x": torch.randn(TOKENS, HIDDEN, dtype=dtype),
        "weights": plan.weights,
        "w_up": torch.randn(EXPERTS, 2 * INNER, HIDDEN, dtype=dtype) * HIDDEN**-0.5,
        "w_down": torch.randn(EXPERTS, HIDDEN, INNER, dtype=dtype) * INNER**-0.5,
        "b_up": torch.randn(EXPERTS, 2 * INNER, dtype=dtype),
        "b_down": torch.randn(EXPERTS, HIDDEN, dtype=dtype),
    }
    return Case("experts", inputs, run, True)


def grouped_gemm(dtype: torch.dtype) -> Case:
    plan = ops.route(torch.randn(TOKENS, EXPERTS), TOP_K, backend="reference")

    def run(backend: str, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (ops.grouped_gemm(a, b, plan.offsets, backend=backend),)

    inputs = {
        "a": torch.randn(TOKENS * TOP_K, HIDDEN, dtype=dtype),
        "b": torch.randn(EXPERTS, INNER, HIDDEN, dtype=dtype),
    }
    return Case("experts", inputs, run, True)


def _place(rows: int) -> dict[str, Tensor]:
    return {
        "seeds": torch.arange(rows, dtype=torch.int64) // 16,
        "positions": torch.arange(rows, dtype=torch.int32) % 16,
        "steps": torch.arange(rows, dtype=torch.int32) % 3,
    }


def sample_tokens(dtype: torch.dtype) -> Case:
    place = _place(TOKENS)

    def run(backend: str, logits: Tensor, uncond: Tensor) -> tuple[Tensor, ...]:
        return ops.sample_tokens(logits, **place, uncond_logits=uncond, guidance=2.0, backend=backend)

    return Case(
        "sampling", {name: torch.randn(TOKENS, CODES, dtype=dtype) for name in ("logits", "uncond")}, run, False
    )


def head_sample(dtype: torch.dtype) -> Case:
    place = _place(TOKENS)

    def run(backend: str, hidden: Tensor, uncond: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.head_sample(hidden, weight, bias, **place, uncond_hidden=uncond, guidance=2.0, backend=backend)

    inputs = {name: torch.randn(TOKENS, HIDDEN, dtype=dtype) for name in ("hidden", "uncond")}
    inputs |= {"weight": torch.randn(CODES, HIDDEN, dtype=dtype), "bias": torch.randn(CODES, dtype=dtype)}
    return Case("sampling", inputs, run, False)


def remask(dtype: torch.dtype) -> Case:
    offsets = torch.tensor([0, 40, 41, TOKENS], dtype=torch.int32)
    keep = torch.tensor([13, 1, 20], dtype=torch.int32)
    place = _place(TOKENS)
    seeds, steps, tau = place["seeds"][:3], place["steps"][:3], torch.tensor([0.0, 1.0, 3.0])

    def run(backend: str, confidence: Tensor) -> tuple[Tensor, ...]:
        return (ops.remask(confidence, offsets, keep, seeds, place["positions"], steps, tau, backend=backend),)

    return Case("sampling", {"confidence": -torch.rand(TOKENS, dtype=dtype)}, run, False)


def linear_loss(dtype: torch.dtype) -> Case:
    targets = torch.randint(CODES, (TOKENS,)).masked_fill_(torch.rand(TOKENS) < 0.3, -100)
    row_weight = torch.rand(TOKENS)

    def run(backend: str, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (ops.linear_loss(hidden, weight, bias, targets, row_weight, backend=backend)[0],)

    inputs = {
        "hidden": torch.randn(TOKENS, HIDDEN, dtype=dtype),
        "weight": torch.randn(CODES, HIDDEN, dtype=dtype) * HIDDEN**-0.5,
        "bias": torch.randn(CODES, dtype=dtype),
    }
    return Case("diffusion_loss", inputs, run, True)


def mix_sequences(dtype: torch.dtype) -> Case:
    offsets = torch.tensor([0, 40, 40, TOKENS], dtype=torch.int32)

    def run(backend: str, x: Tensor, feature: Tensor, residual: Tensor, **small: Tensor) -> tuple[Tensor, ...]:
        return (
            ops.mix_sequences(x, features=[feature], residual=residual, row_offsets=offsets, **small, backend=backend),
        )

    inputs = {name: torch.randn(TOKENS, HIDDEN, dtype=dtype) for name in ("x", "feature", "residual")}
    inputs |= {"scale": torch.randn(3), "coefficients": torch.randn(3, 1), "layer_scale": torch.tensor(0.7)}
    return Case("sequence_mix", inputs, run, True)


def omni_attention(dtype: torch.dtype) -> Case:
    blocks = ((0, 20, 0, 20, True), (20, 50, 0, 50, False), (50, TOKENS, 50, TOKENS, False))

    def run(backend: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (ops.omni_attention(q, k, v, blocks, backend=backend),)

    return Case("omni_attention", {name: torch.randn(TOKENS, 2, 32, dtype=dtype) for name in "qkv"}, run, True)


def omni_attention_past(dtype: torch.dtype) -> Case:
    blocks = ((0, 40, 0, 40, False, 7, 20), (40, TOKENS, 40, TOKENS, False, 30, 30))

    def run(backend: str, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        return (ops.omni_attention(q, k, v, blocks, past=(past_k, past_v), backend=backend),)

    inputs = {name: torch.randn(TOKENS, 2, 32, dtype=dtype) for name in "qkv"}
    inputs |= {name: torch.randn(50, 2, 32, dtype=dtype) for name in ("past_k", "past_v")}
    return Case("omni_attention", inputs, run, True)


def rotate_heads(dtype: torch.dtype) -> Case:
    angle = torch.rand(TOKENS, 16)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def run(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (ops.rotate_heads(x, weight, bias, cos, sin, backend=backend),)

    inputs = {
        "x": torch.randn(TOKENS, 2, 32, dtype=dtype),
        "weight": torch.randn(32, dtype=dtype),
        "bias": torch.randn(32, dtype=dtype),
    }
    return Case("rotary", inputs, run, True)


CASES = {
    make.__name__: make
    for make in (
        routing,
        grouped_gemm,
        expert_mlp,
        sample_tokens,
        head_sample,
        remask,
        linear_loss,
        mix_sequences,
        omni_attention,
        omni_attention_past,
        rotate_heads,
    )
}
