"""Omni-attention: text causal, image bidirectional, as a handful of plain attention calls.

Sequences lie packed one behind the other, without pads. What a row may see is told by blocks known on the host: block
`(q_start, q_end, k_start, k_end, causal)` lets query rows [q_start, q_end) attend to key rows [k_start, k_end), all of
them or, if causal, bottom-right aligned: query i of the block sees its keys j <= i + (k_len - q_len). Text to face is
one causal block over the text and one full block image -> text + image; understanding is one full block over the
image and one causal block text -> image + text. Keys may outnumber queries: a KV cache is a flat [B * L_max] buffer.
Where the keys of a block lie in two tensors, those of a cache (`past`) come first and those of the batch behind them:
the image rows of a denoising step change every time and need no place in a cache.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        over the keys j that row i sees

Cost: 4 * q_len * k_len * dim FLOPs per head and block (causal: half); nothing of size T x S, no mask tensor.

Back end `native` is a flash kernel, which keeps one logsumexp per row for backward and costs 2.5 forwards there: on a
GPU in float16 and bfloat16 two variable-length calls of a flash-attention library (`_varlen.py`), on a CPU without
gradients csrc/cpu/omni_attention.cpp, else PyTorch's scaled_dot_product_attention (`_sdpa.py`).

Sources: Show-o (arXiv 2408.12528, omni-attention); FlashAttention (2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unif2ace.errors import UserError
from unif2ace.ops import _registry, _sdpa, _varlen
from unif2ace.ops._checks import describe, dtype_name
from unif2ace.ops._varlen import Block

PastBlock = tuple[int, int, int, int, bool, int, int]
AttentionBlocks = tuple[Block | PastBlock, ...]


# ----------------------------------------------------------------------------------------------------------- reference


def reference_omni_attention(q: Tensor, k: Tensor, v: Tensor, blocks: AttentionBlocks, scale: float) -> Tensor:
    """The definition, block by block, in the dtype of the inputs: scores, mask, softmax, weighted sum."""
    parts = [q[:0]]
    for q_start, q_end, k_start, k_end, causal in sorted(blocks):
        query, key, value = q[q_start:q_end], k[k_start:k_end], v[k_start:k_end]
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        if causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(~seen.tril(scores.shape[2] - scores.shape[1]), -math.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value))
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------ keys in two tensors


def _join_past(
    k: Tensor, v: Tensor, past: tuple[Tensor, Tensor], blocks: AttentionBlocks
) -> tuple[Tensor, Tensor, AttentionBlocks]:
    """The keys of every block in one piece, and blocks of five numbers over them; differentiable."""
    ranges = [((past_start, past_end), (k_start, k_end)) for _, _, k_start, k_end, _, past_start, past_end in blocks]
    joined = [
        torch.cat([x[:0], *(part for first, own in ranges for part in (cached[slice(*first)], x[slice(*own)]))])
        for x, cached in zip((k, v), past, strict=True)
    ]
    ends = list(accumulate((sum(end - start for start, end in pair) for pair in ranges), initial=0))
    pairs = zip(blocks, pairwise(ends), strict=True)
    return joined[0], joined[1], tuple((*block[:2], start, end, block[4]) for block, (start, end) in pairs)


# ----------------------------------------------------------------------------------------------- native: library calls


def _calls(q: Tensor, k: Tensor, blocks: AttentionBlocks) -> _sdpa.SdpaCalls | _varlen.VarlenCalls:
    attend = _varlen.choose(q)
    if attend is None:
        return _sdpa.SdpaCalls(blocks)
    return _varlen.varlen_calls(blocks, k.shape[0], attend, q.device)


def _native_forward(q: Tensor, k: Tensor, v: Tensor, blocks: AttentionBlocks, scale: float) -> Tensor:
    calls = _calls(q, k, blocks)
    inputs = zip(calls.queries(q), calls.keys(k), calls.keys(v), strict=True)
    return calls.join_queries(q, [calls.attend(i, *triple, scale) for i, triple in enumerate(inputs)])


class _NativeAttention(torch.autograd.Function):
    """Eager library calls with gradients, as one node around all of them.

    Every call gets its own small autograd graph over views of q, k, v: slicing under the outer graph would add one
    full-size tensor of zeros per slice in backward.
    """

    @staticmethod
    def record(q, k, v, blocks, scale):
        """The calls, three leaves for each, and one result for each."""
        calls = _calls(q, k, blocks)
        views = (calls.queries(q.detach()), calls.keys(k.detach()), calls.keys(v.detach()))
        leaves = [view.requires_grad_(True) for triple in zip(*views, strict=True) for view in triple]
        with torch.enable_grad():
            results = [calls.attend(i, *leaves[3 * i : 3 * i + 3], scale) for i in range(len(leaves) // 3)]
        return calls, leaves, results

    @staticmethod
    def forward(ctx, q, k, v, blocks, scale):
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.scale, ctx.recorded = blocks, scale, _NativeAttention.record(q, k, v, blocks, scale)
        calls, _, results = ctx.recorded
        return calls.join_queries(q, [result.detach() for result in results])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v = ctx.saved_tensors
        # The inner graphs are freed with their backward; a second one (retain_graph=True) records them again.
        calls, leaves, results = ctx.recorded or _NativeAttention.record(q, k, v, ctx.blocks, ctx.scale)
        ctx.recorded, grads = None, ()
        if results:
            grads = calls.gradients(results, leaves, calls.queries(grad_out.contiguous()))
        grad_q = calls.join_queries(q, list(grads[0::3]))
        return grad_q, calls.join_keys(k, list(grads[1::3])), calls.join_keys(v, list(grads[2::3])), None, None


# -------------------------------------------------------------------------------------------- registered ops, autograd


def _flatten(blocks: AttentionBlocks) -> list[int]:
    return [int(number) for block in blocks for number in block]


_flatten_once = lru_cache(maxsize=512)(_flatten)  # every layer passes the same blocks


def _unflatten(flat: Sequence[int], width: int = 5) -> AttentionBlocks:
    return tuple((*flat[i : i + 4], bool(flat[i + 4]), *flat[i + 5 : i + width]) for i in range(0, len(flat), width))


def _with_past(function: Callable) -> Callable:
    """Registered op with a past: `function(q, k, v, blocks, scale)` on keys put side by side."""

    def with_past(q, k, v, past_k, past_v, flat, scale):
        return function(q, *_join_past(k, v, (past_k, past_v), _unflatten(flat, 7)), scale)

    return with_past


def _backward_of(function: Callable) -> Callable:
    """Registered backward: run `function(q, k, v, blocks, scale)` again under autograd."""

    def backward(grad_out, q, k, v, flat, scale):
        blocks = _unflatten(flat)
        grads = _registry.vjp(lambda *inputs: function(*inputs, blocks, scale), [q, k, v], [grad_out])
        return tuple(grad.contiguous() for grad in grads)

    return backward


def _fake_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


_registry.define(
    "omni_attention",
    "omni_attention",
    "(Tensor q, Tensor k, Tensor v, int[] blocks, float scale) -> Tensor",
    lambda q, k, v, blocks, scale: q.new_empty(q.shape),
    lambda q, k, v, flat, scale: reference_omni_attention(q, k, v, _unflatten(flat), scale),
)
_registry.define(
    "omni_attention",
    "omni_attention_past",
    "(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, int[] blocks, float scale) -> Tensor",
    lambda q, k, v, past_k, past_v, blocks, scale: q.new_empty(q.shape),
    _with_past(reference_omni_attention),
)
_registry.define(
    "omni_attention",
    "omni_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, int[] blocks, float scale) -> (Tensor, Tensor, Tensor)",
    lambda grad_out, q, k, v, blocks, scale: _fake_like(q, k, v),
    _backward_of(reference_omni_attention),
)
_registry.implement(
    "native", "omni_attention", lambda q, k, v, flat, scale: _native_forward(q, k, v, _unflatten(flat), scale)
)
_registry.implement("native", "omni_attention_past", _with_past(_native_forward))
_registry.implement("native", "omni_attention_backward", _backward_of(_NativeAttention.apply))


class _OmniAttention(torch.autograd.Function):
    """The registered ops of one back end, for traced code."""

    @staticmethod
    def forward(ctx, backend, q, k, v, flat, scale):
        ctx.save_for_backward(q, k, v)
        ctx.constants = (backend, flat, scale)
        return _registry.registered(backend, "omni_attention")(q, k, v, flat, scale)

    @staticmethod
    def backward(ctx, grad_out):
        backend, flat, scale = ctx.constants
        grads = _registry.registered(backend, "omni_attention_backward")(grad_out, *ctx.saved_tensors, flat, scale)
        return None, *grads, None, None


# ----------------------------------------------------------------------------------------------------- public function


def omni_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: AttentionBlocks,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of packed sequences, each query row seeing the keys its block names.

    Args:
        q: [T, heads, dim] float. k, v: [S, heads, dim] of the same dtype; S may differ from T (KV cache, flattened).
        blocks: tuple of (q_start, q_end, k_start, k_end, causal), in any order; every query row lies in exactly one.
            Build it once per batch: it is hashed, and what is derived from it is cached.
        past: keys and values [P, heads, dim] of a cache. Blocks then have two numbers more, (.., past_start, past_end):
            their keys are those rows of `past`, then rows k_start to k_end of k. Back end `native` on a CPU reads both
            where they lie; others put them side by side first.
        scale: of the scores; default 1 / sqrt(dim).

    Returns:
        [T, heads, dim] in q's dtype. Keys that no block names get zero gradients.

    Raises:
        UserError: shapes or dtypes that do not fit, blocks outside the tensors, rows in no block or in two, blocks
            without keys, causal blocks with fewer keys than queries.

    Cost: sum over blocks of 4 * q_len * k_len * heads * dim FLOPs; no mask tensor, no pads.
    """
    if q.dim() != 3 or not q.is_floating_point() or q.shape[2] == 0:
        raise UserError(f"omni_attention: q must be [T, heads, dim >= 1] floating point, got {describe(q)}")
    _check_keys(q, "k", k, "v", v)
    if past is not None:
        _check_keys(q, "past keys", past[0], "past values", past[1])
    compiling = torch.compiler.is_compiling()
    check, flatten = (_check_blocks, _flatten) if compiling else (_check_blocks_once, _flatten_once)
    blocks = tuple(tuple(block) for block in blocks)
    blocks = check(blocks, q.shape[0], k.shape[0], None if past is None else past[0].shape[0])
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    name = _registry.choose("omni_attention", backend, q.device, q.dtype)
    wants_grad = _registry.needs_grad(q, k, v, *(past or ()))
    if past is not None:
        if name == "native" and not wants_grad:
            return _registry.registered(name, "omni_attention_past")(q, k, v, *past, flatten(blocks), scale)
        k, v, blocks = _join_past(k, v, past, blocks)
    if compiling:
        return _OmniAttention.apply(name, q, k, v, flatten(blocks), scale)
    if name == "reference":
        return reference_omni_attention(q, k, v, blocks, scale)
    if wants_grad:
        return _NativeAttention.apply(q, k, v, blocks, scale)
    return _registry.registered(name, "omni_attention")(q, k, v, flatten(blocks), scale)


def _check_keys(q: Tensor, k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    for name, x in ((k_name, k), (v_name, v)):
        if x.dim() != 3 or x.shape[1:] != q.shape[1:] or x.dtype != q.dtype or x.shape != k.shape:
            expected = f"[S, {q.shape[1]}, {q.shape[2]}] {dtype_name(q.dtype)}, the same for {k_name} and {v_name}"
            raise UserError(f"omni_attention: {name} must be {expected}, got {describe(x)}")


def _check_blocks(blocks: AttentionBlocks, rows: int, keys: int, past: int | None) -> AttentionBlocks:
    """Refuse blocks that do not fit T = rows, S = keys and P = past; returns them."""
    covered = 0
    names = "(q_start, q_end, k_start, k_end, causal" + (")" if past is None else ", past_start, past_end)")
    for block in sorted(blocks):
        if len(block) != (5 if past is None else 7):
            raise UserError(f"omni_attention: a block is {names}, got {block}")
        q_start, q_end, k_start, k_end, causal, past_start, past_end = (*block, 0, 0)[:7]
        q_len, k_len = q_end - q_start, past_end - past_start + k_end - k_start
        if (
            q_len < 0
            or q_end > rows
            or not 0 <= k_start <= k_end <= keys
            or not 0 <= past_start <= past_end <= (past or 0)
        ):
            also = "" if past is None else f" and {past} of the past"
            raise UserError(f"omni_attention: block {block} lies outside {rows} queries and {keys} keys{also}")
        if q_len and (k_len == 0 or (causal and k_len < q_len)):
            raise UserError(f"omni_attention: block {block} has {k_len} keys for {q_len} queries, too few")
        if q_start != covered:
            kind = "in two blocks" if q_start < covered else "in no block"
            raise UserError(f"omni_attention: query row {min(q_start, covered)} is {kind}")
        covered = q_end
    if covered != rows:
        raise UserError(f"omni_attention: query row {covered} is in no block")
    return blocks


_check_blocks_once = lru_cache(maxsize=512)(_check_blocks)  # every layer passes the same blocks
