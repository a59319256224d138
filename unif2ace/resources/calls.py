"""For each op the calls whose launches cover every shipped launch configuration, on meta tensors.

A call names a registered op and its arguments, as `unif2ace.kernels.<op>` gets them. Sizes are those of the
`unif2ace-1.8b` preset, and whatever else makes a launcher choose a configuration of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call: `label` tells a reader of the table what it stands for."""

    label: str
    function: str
    arguments: tuple


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sequence_mix() -> Iterator[Call]:
    """Images of 258 rows: generation mixes one feature, understanding two. Sizes of 1 are constants of a kernel."""
    cases = [
        ("generation", 1, 32 * 258, 2048, 32),
        ("understanding", 2, 32 * 258, 2048, 32),
        ("narrow", 1, 16 * 66, 192, 16),
        ("one row", 0, 1, 1, 1),
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for label, count, rows, hidden, images in cases:
            x, *features = (_meta(rows, hidden, dtype=dtype) for _ in range(1 + count))
            factors = (_meta(images, dtype=dtype), features, _meta(images, count, dtype=dtype))
            arguments = (*factors, _meta(images + 1, dtype=torch.int32))
            layer_scale = _meta(dtype=dtype)
            yield Call(label, "mix_sequences", (x, *arguments, x, layer_scale, None))
            yield Call(label, "mix_sequences_backward", (x, x, *arguments, layer_scale))
        label, count, rows, hidden, images = cases[0]
        x, feature = _meta(rows, hidden, dtype=dtype), _meta(258, hidden, dtype=dtype)
        factors = _meta(images, dtype=dtype), [feature], _meta(images, count, dtype=dtype)
        offsets, starts = _meta(images + 1, dtype=torch.int32), _meta(images, dtype=torch.int32)
        yield Call("shared noise", "mix_sequences", (x, *factors, offsets, x, _meta(dtype=dtype), starts))


def _diffusion_loss() -> Iterator[Call]:
    """D3Diff over the codes and over everything, and the next token; the head without a bias, values alone."""
    vocabulary, codes = 58498, (50305, 58497)
    cases = [
        ("D3Diff, all columns", 8192, (0, vocabulary), True, True, True),
        ("D3Diff, codes", 8192, codes, True, False, True),
        ("next token", 4096, (0, vocabulary), True, False, True),
        ("no bias", 4096, (0, vocabulary), False, False, True),
        ("values", 4096, (0, vocabulary), True, False, False),
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight, bias = _meta(vocabulary, 2048, dtype=dtype), _meta(vocabulary, dtype=dtype)
        for label, rows, columns, with_bias, with_mass, with_grads in cases if dtype == torch.bfloat16 else cases[:1]:
            hidden, weights = _meta(rows, 2048, dtype=dtype), _meta(rows, dtype=torch.float32)
            head = (hidden, weight, bias if with_bias else None, _meta(rows, dtype=torch.int64))
            arguments = (*head, weights, weights if with_mass else None, list(columns), list(codes), with_grads)
            yield Call(label, "linear_loss", arguments)


def _rotary() -> Iterator[Call]:
    """Queries as views of a fused projection; all of a head turned, or nothing of it; a head of an odd size."""
    cases = [("text to face", 16512, 32, 64, 16), ("avatars-tiny", 2112, 6, 32, 8)]
    cases += [("whole head", 8192, 16, 128, 64), ("no rotation", 8192, 16, 128, 0), ("odd", 67, 3, 29, 5)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for label, tokens, heads, dim, r in cases if dtype == torch.bfloat16 else cases[:2]:
            query = _meta(tokens, 3, heads, dim, dtype=dtype)[:, 0]
            weight, angles = _meta(dim, dtype=dtype), _meta(tokens, r, dtype=dtype)
            arguments = (query, weight, weight, angles, angles, 1e-5)
            yield Call(label, "rotate_heads", arguments)
            yield Call(label, "rotate_heads_backward", (_meta(tokens, heads, dim, dtype=dtype), *arguments))


def _sampling() -> Iterator[Call]:
    """32 faces of 256 tokens, with and without guidance, greedy; text, whose 50295 columns no load divides."""
    images, rows, hidden, codes = 32, 32 * 256, 2048, 8192
    seeds, positions = _meta(rows, dtype=torch.int64), _meta(rows, dtype=torch.int64)
    where = (seeds, positions, _meta(rows, dtype=torch.int32))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits, text, few = (_meta(rows, columns, dtype=dtype) for columns in (codes, 50295, 64))
        yield Call("plain", "sample_tokens", (logits, *where, 1.0, None, 0.0, 0))
        yield Call("guided", "sample_tokens", (logits, *where, 1.0, logits, 3.0, 0))
        yield Call("greedy", "sample_tokens", (logits, *where, 0.0, None, 0.0, 0))
        yield Call("text", "sample_tokens", (text, *where, 1.0, None, 0.0, 2))
        yield Call("short rows", "sample_tokens", (few, *where, 1.0, None, 0.0, 0))
        yield Call("one code", "sample_tokens", (few[:, :1], *where, 1.0, few[:, :1], 1.0, 0))
        states, weight = _meta(rows, hidden, dtype=dtype), _meta(codes, hidden, dtype=dtype)
        yield Call("head", "head_sample", (states, weight, None, *where, 1.0, states, 3.0, 0))
    confidence, counts = _meta(rows, dtype=torch.float32), _meta(images + 1, dtype=torch.int32)
    image = (_meta(images, dtype=torch.int64), positions, counts[:images], _meta(images, dtype=torch.float32))
    yield Call("remask", "remask", (confidence, counts, counts[:images], *image))


def _routing() -> Iterator[Call]:
    """The preset's 2 x 8 experts, and the other tiles that the number of experts asks for."""
    for experts, groups, top_k, dtype, scoring, renormalize, bias in (
        (16, 2, 4, torch.bfloat16, "softmax", True, False),
        (16, 2, 4, torch.float32, "softmax", False, True),
        (64, 1, 8, torch.bfloat16, "sigmoid", True, True),
        (128, 1, 8, torch.bfloat16, "softmax", True, False),
        (256, 8, 8, torch.bfloat16, "sigmoid", False, True),
        (512, 1, 16, torch.bfloat16, "softmax", True, False),
        (512, 2, 16, torch.float16, "sigmoid", True, True),
    ):
        logits = torch.empty(8192, experts, dtype=dtype, device="meta")
        bounds = [g * experts // groups for g in range(groups + 1)]
        group = torch.empty(8192, dtype=torch.int32, device="meta") if groups > 1 else None
        selection_bias = torch.empty(experts, device="meta") if bias else None
        label = f"{experts} experts"
        arguments = (logits, top_k, group, bounds, scoring, selection_bias, renormalize, 1.0, False)
        yield Call(label, "route", arguments)
        grads = [torch.empty(*shape, device="meta") for shape in ((8192, top_k), (experts,), (8192,))]
        chosen = torch.empty(8192, top_k, dtype=torch.int32, device="meta")
        yield Call(label, "route_backward", (*grads, logits, chosen, group, bounds, scoring, renormalize, 1.0))


def _experts() -> Iterator[Call]:
    """Training, decoding and what lies between; every activation; with biases and the pre-activation, and without."""
    hidden, inner, experts, top_k = 2048, 512, 16, 4
    activations = ("gelu_tanh", "swiglu", "gelu", "silu", "relu2", "geglu")
    loads = {"training": 8192, **{f"{rows} rows per expert": rows * experts // top_k for rows in (128, 64, 32, 8)}}
    loads["decoding"] = 1
    cases = [(load, name) for load in loads for name in activations[: None if load == "training" else 2]]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        offsets = _meta(experts + 1, dtype=torch.int32)
        for load, activation in cases if dtype == torch.bfloat16 else cases[:2]:
            slots, up_rows = loads[load] * top_k, inner * (2 if "glu" in activation else 1)
            x, weights = _meta(loads[load], hidden, dtype=dtype), _meta(loads[load], top_k, dtype=torch.float32)
            index = _meta(slots, dtype=torch.int32)
            w_up, w_down = _meta(experts, up_rows, hidden, dtype=dtype), _meta(experts, hidden, inner, dtype=dtype)
            biases = _meta(experts, up_rows, dtype=dtype), _meta(experts, hidden, dtype=dtype)
            plan = (x, weights, offsets, index, index, w_up, w_down)
            label = f"{load}, {activation}"
            yield Call(f"{label}, saved", "expert_mlp", (*plan, *biases, activation, True, None))
            yield Call(label, "expert_mlp", (*plan, None, None, activation, False, None))
            if load in ("training", "decoding"):  # the backward knows many rows and few
                saved = (x, x, _meta(slots, up_rows, dtype=dtype), *plan[1:])  # gradient of y, x, pre-activation, ..
                yield Call(label, "expert_mlp_backward", (*saved, *biases, activation))
        for rows in (32768, 64):
            a, b, index = _meta(rows, hidden, dtype=dtype), w_up, _meta(rows, dtype=torch.int32)
            yield Call(f"{rows} rows", "grouped_gemm", (a, b, offsets, None, None))
            yield Call(f"{rows} rows gathered", "grouped_gemm", (a, b, offsets, None, index))
            grad, bias = _meta(rows, b.shape[1], dtype=dtype), _meta(*b.shape[:2], dtype=dtype)
            yield Call(f"{rows} rows", "grouped_gemm_backward", (grad, a, b, offsets, bias, None))
            yield Call(f"{rows} rows gathered", "grouped_gemm_backward", (grad, a, b, offsets, bias, index))
    yield from _tuned_experts()


def _tuned_experts() -> Iterator[Call]:
    """For each measured configuration of kernels/tuning/experts-*.json a call that takes it on its chip."""
    from unif2ace.kernels import experts_config  # here: Triton is not installed everywhere

    keys = {key for path in experts_config.FOLDER.glob("experts-*.json") for key in experts_config.table(path)}
    for key in sorted(keys):
        experts, dtype = 16, torch.bfloat16 if key.bits == 16 else torch.float32
        rows = experts * key.rows_per_expert
        offsets, index = _meta(experts + 1, dtype=torch.int32), _meta(rows, dtype=torch.int32)
        weights = _meta(rows, 1, dtype=torch.float32)
        hidden, inner = (key.depth, key.width) if key.gather else (key.width, key.depth)
        w_up = _meta(experts, key.parts * inner, hidden, dtype=dtype)
        plan = (_meta(rows, hidden, dtype=dtype), weights, offsets, index, index, w_up)
        w_down = _meta(experts, hidden, inner, dtype=dtype)
        activation = "swiglu" if key.parts == 2 else "gelu_tanh"
        for save in (False, True):
            yield Call(f"measured {tuple(key)}", "expert_mlp", (*plan, w_down, None, None, activation, save, None))


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "routing": _routing,
    "experts": _experts,
    "sampling": _sampling,
    "diffusion_loss": _diffusion_loss,
    "sequence_mix": _sequence_mix,
    "rotary": _rotary,
}
