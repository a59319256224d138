"""Rows sorted by expert, in plain differentiable PyTorch: what the references of `experts` are made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu2", "swiglu", "geglu")
GATED = ("swiglu", "geglu")


def combine(rows: Tensor, weights: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """[M, H] results sorted by expert -> [T, H], differentiable: the weighted sum of a token's rows in the order of k.

    `weights` [T, K], `order` and `position` are those of the `RoutingPlan`. The result has the wider dtype of rows and
    weights, so float32 at least.
    """
    tokens, top_k = weights.shape
    slots = Gather.apply(rows, position.long(), order.long(), 1).view(tokens, top_k, rows.shape[1]).unbind(1)
    dtype = torch.promote_types(weights.dtype, rows.dtype)
    total = torch.zeros_like(slots[0], dtype=dtype)
    for weight, slot in zip(weights.to(dtype).split(1, dim=1), slots, strict=True):  # fixed order, one pass per choice
        total = torch.addcmul(total, weight, slot.to(dtype))
    return total


def activate(pre: Tensor, activation: str) -> Tensor:
    """[.., I] -> [.., I], gated [.., 2I] -> [.., I]."""
    if activation in GATED:
        gate, up = pre.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * up
    if activation == "gelu_tanh":
        return F.gelu(pre, approximate="tanh")
    if activation == "relu2":
        return F.relu(pre).square()
    return F.gelu(pre) if activation == "gelu" else F.silu(pre)


def grouped_linear(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """[M, K] sorted rows -> [M, N], one GEMM per expert that has rows, zeros beyond the last offset."""
    sizes = offsets.diff().tolist()
    rest = a.shape[0] - sum(sizes)
    if sum(sizes) == 0:
        sizes[0], busy = 0, [0]  # one GEMM of no rows ties the result to b, so that b gets its zero gradient
    else:
        busy = [e for e, size in enumerate(sizes) if size]
    # split and unbind cost one concatenation in backward; indexing b[e] would cost a full-size zero tensor per expert
    rows = a.split([*(sizes[e] for e in busy), rest])
    matrices = b.unbind(0)
    biases = [None] * len(matrices) if bias is None else bias.unbind(0)
    pieces = [F.linear(piece, matrices[e], biases[e]) for e, piece in zip(busy, rows, strict=False)]
    if rest:
        pieces.append(pieces[0].new_zeros(rest, b.shape[1]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Gather(torch.autograd.Function):
    """rows[m] = x[index[m] // repeat] for a permutation `index` with known inverse.

    Knowing the inverse, backward is a gather and a sum too, where autograd would scatter-add.
    """

    @staticmethod
    def forward(ctx, x, index, inverse, repeat):
        ctx.save_for_backward(index, inverse)
        ctx.repeat = repeat
        return x.index_select(0, index if repeat == 1 else index // repeat)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        rows = Gather.apply(grad, inverse, index, 1)
        if ctx.repeat > 1:
            rows = rows.view(rows.shape[0] // ctx.repeat, ctx.repeat, rows.shape[1]).sum(1)
        return rows, None, None, None
