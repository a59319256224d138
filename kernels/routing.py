"""Top-k routing, from logits to the complete plan in three launches; its gradient in one.

Semantics: unif2ace/ops/routing.py. T tokens, E experts, K choices per token; slot s = t * K + k.

    _rows     a tile of BLOCK_T tokens x all E columns: scores, choice, weights, logsumexp. Per tile also: slots and
              probabilities of each expert, tokens that see it; per slot its rank among the tile's slots of its expert
    _scan     per expert, down the tiles: how many slots came before each tile, and the sums over all tiles
    _scatter  per tile: slot s goes to place = offsets[e] + slots of e before the tile + rank in the tile

This is a counting sort. Tokens choose an expert at most once, so the rank of slot (t, k) is the number of earlier
tokens of the tile that chose the same expert: a running sum down the tile. Hence the order is stable, and no two
programs write one place: no atomics. `offsets` is also the tile schedule of the grouped multiplications: they find
expert and rows of a tile in it, on the device.

All of a row stays in the tile [BLOCK_T, BLOCK_E], the choices too: `choice` holds the number of the pass that took a
column. So K passes of one maximum (the key) and one minimum (the lowest column that has it) select, and nothing is
gathered. The tile's shape and warps follow from E alone: a row's sums run in the same order whatever the batch.

Cost: T * E logits read once; 16 T K bytes of plan and 4 T of logsumexp written, the rank (4 T K) written and read; per
tile 16 E bytes in between. For 8192 tokens, 16 experts, k = 4 in bfloat16: 1.1 MB, 0.3 us at 4 TB/s. So the floor is
the latency of three launches that wait for each other. Backward: logits read, their gradient written, 8 T K bytes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from unif2ace.kernels._device import INTERPRETED, multiprocessors
from unif2ace.kernels._numerics import exp_nonpositive, log_positive, log_sigmoid, ordered_key, sigmoid

MAX_EXPERTS = 1024  # of 2048, _rows spills on sm_90

_TAKEN = tl.constexpr(-(2**31))  # key of columns that are taken or not seen: below the keys of all floats
_SCAN_TILES, _SCAN_EXPERTS = 128, 16  # tile of _scan: 64-byte pieces of rows


# ------------------------------------------------------------------------------------------------------------- device


@triton.jit
def _group_range(token_group, t, inside, BOUNDS: tl.constexpr):
    """First and last + 1 column that each token sees. A group out of range counts as the nearest: nothing is read or
    written outside whatever stands in `token_group`.
    """
    first = tl.full(t.shape, BOUNDS[0], tl.int32)
    end = tl.full(t.shape, BOUNDS[1], tl.int32)
    if len(BOUNDS) > 2:
        group = tl.load(token_group + t, mask=inside, other=0)
        for g in tl.static_range(1, len(BOUNDS) - 1):
            first = tl.where(group >= g, BOUNDS[g], first)
            end = tl.where(group >= g, BOUNDS[g + 1], end)
    return first, end


@triton.jit
def _softmax(z, seen):
    """Numerators of the softmax over the seen columns of each row (0 elsewhere), the maximum and the sum."""
    largest = tl.max(tl.where(seen, z, float("-inf")), axis=1)
    e = tl.where(seen, exp_nonpositive(z - largest[:, None]), 0.0)
    total = tl.sum(e, axis=1)
    return e, largest, total


@triton.jit
def _load_tile(logits, stride_t, stride_e, token_group, T, tile, E: tl.constexpr, BOUNDS: tl.constexpr,
               BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Tokens [BLOCK_T] (int64), columns [BLOCK_E], logits in float32 with 0 where not seen, and what is seen."""
    t = tl.full([], tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = t < T
    first, end = _group_range(token_group, t, inside, BOUNDS)
    # whole rows, also what a token does not see: a mask that depends on data would forbid wide loads
    x = tl.load(
        logits + t[:, None] * stride_t + e[None, :] * stride_e, mask=inside[:, None] & (e < E)[None, :], other=0
    )
    seen = (e[None, :] >= first[:, None]) & (e[None, :] < end[:, None])  # rows beyond T: zeros, finite as any other
    return t, e, inside, tl.where(seen, x.to(tl.float32), 0.0), seen


@triton.jit
def _rows(logits, stride_t, stride_e, token_group, selection_bias, scale, weights, experts, rank, logsumexp,
          tile_load, tile_probability, tile_seen, T, E: tl.constexpr, K: tl.constexpr, BOUNDS: tl.constexpr,
          SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr,
          BLOCK_E: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    t, e, inside, x, seen = _load_tile(logits, stride_t, stride_e, token_group, T, tile, E, BOUNDS, BLOCK_T, BLOCK_E)
    numerator, largest, total = _softmax(x, seen)
    tl.store(logsumexp + t, largest + log_positive(total), mask=inside)
    z = x
    if SIGMOID:
        z = log_sigmoid(x)
        numerator, largest, total = _softmax(z, seen)
    probability = numerator * tl.div_rn(1.0, total)[:, None]

    # The choice, by the logit: it grows with the score and depends on no exponential. A bias is defined on scores.
    preference = x
    if selection_bias is not None:
        score = probability
        if SIGMOID:
            score = sigmoid(x)
        preference = score + tl.load(selection_bias + e, mask=e < E, other=0.0)[None, :]
    key = tl.where(seen, ordered_key(preference), _TAKEN)
    choice = tl.full([BLOCK_T, BLOCK_E], K, tl.int32)
    for k in range(K):
        best = tl.max(key, axis=1)
        at = tl.min(tl.where(key == best[:, None], e[None, :], BLOCK_E), axis=1)  # ties: the lower expert
        hit = (e[None, :] == at[:, None]) & seen
        choice = tl.where(hit, k, choice)
        key = tl.where(hit, _TAKEN, key)
    chosen = (choice < K) & inside[:, None]

    if RENORMALIZE:
        numerator, largest, total = _softmax(z, choice < K)
        weight = tl.div_rn(numerator, total[:, None])
    elif SIGMOID:
        weight = exp_nonpositive(z)
    else:
        weight = tl.div_rn(numerator, total[:, None])
    slot = t.to(tl.int32)[:, None] * K + choice  # T * K fits int32
    tl.store(weights + slot, weight * scale, mask=chosen)
    tl.store(experts + slot, tl.broadcast_to(e[None, :], [BLOCK_T, BLOCK_E]), mask=chosen)
    taken = chosen.to(tl.int32)
    tl.store(rank + slot, tl.cumsum(taken, axis=0) - taken, mask=chosen)

    seen &= inside[:, None]
    row = tile.to(tl.int64) * E + e
    tl.store(tile_load + row, tl.sum(taken, axis=0), mask=e < E)
    # float64: the sum of many small numbers keeps all digits, in whatever order a tile adds them
    sums = tl.sum(tl.where(seen, probability, 0.0).to(tl.float64), axis=0)
    tl.store(tile_probability + row, sums.to(tl.float32), mask=e < E)
    tl.store(tile_seen + row, tl.sum(seen.to(tl.int32), axis=0), mask=e < E)


@triton.jit
def _scan(tile_load, tile_probability, tile_seen, before, load, importance, tiles, E, BLOCK_B: tl.constexpr,
          BLOCK_E: tl.constexpr):  # fmt: skip
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    seen = tl.zeros([BLOCK_E], tl.int32)
    probability = tl.zeros([BLOCK_E], tl.float64)
    for start in range(0, tiles, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        at = b[:, None].to(tl.int64) * E + e[None, :]
        inside = (b < tiles)[:, None] & (e < E)[None, :]
        here = tl.load(tile_load + at, mask=inside, other=0)
        tl.store(before + at, count[None, :] + tl.cumsum(here, axis=0) - here, mask=inside)
        count += tl.sum(here, axis=0)
        seen += tl.sum(tl.load(tile_seen + at, mask=inside, other=0), axis=0)
        probability += tl.sum(tl.load(tile_probability + at, mask=inside, other=0.0).to(tl.float64), axis=0)
    tl.store(load + e, count, mask=e < E)
    mean = tl.div_rn(probability.to(tl.float32), tl.maximum(seen, 1).to(tl.float32))
    tl.store(importance + e, mean, mask=e < E)


@triton.jit
def _scatter(experts, load, before, offsets, order, position, slots, E: tl.constexpr, SLOTS: tl.constexpr,
             BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """`position` holds ranks and receives places."""
    tile = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(load + e, mask=e < E, other=0)
    start = tl.cumsum(counts, axis=0) - counts
    if tile == 0:
        tl.store(offsets + e, start, mask=e < E)
        tl.store(offsets + E, slots)
    here = tl.arange(0, BLOCK_S)
    slot = tile * SLOTS + here
    inside = (here < SLOTS) & (slot < slots)
    start += tl.load(before + tile * E + e, mask=(e < E) & (slots > 0), other=0)  # no slots: no tile
    place = tl.gather(start, tl.load(experts + slot, mask=inside, other=0), axis=0)
    place += tl.load(position + slot, mask=inside, other=0)
    tl.store(position + slot, place, mask=inside)
    tl.store(order + place, slot.to(tl.int32), mask=inside)


@triton.jit
def _rows_backward(grad_weights, grad_stride_t, grad_stride_k, grad_importance, grad_importance_stride, grad_logsumexp,
                   grad_logsumexp_stride, logits, stride_t, stride_e, experts, token_group, scale, grad_logits, T,
                   tiles, E: tl.constexpr, K: tl.constexpr, BOUNDS: tl.constexpr, SIGMOID: tl.constexpr,
                   RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """With q = softmax(z), w = softmax(z over the chosen), s = the scores, G = scale * grad_weights, m = the gradient
    of the mean: dz = q (m - sum q m), + w (G - sum G w) or s G [- q sum s G if softmax], then dx from z and logsumexp.
    """
    e = tl.arange(0, BLOCK_E)
    seeing = _tokens_seeing(token_group, T, e, BOUNDS, BLOCK_C)
    m = tl.load(grad_importance + e * grad_importance_stride, mask=e < E, other=0.0)
    m = tl.div_rn(m, tl.maximum(seeing, 1).to(tl.float32))[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        t, e, inside, x, seen = _load_tile(
            logits, stride_t, stride_e, token_group, T, tile, E, BOUNDS, BLOCK_T, BLOCK_E
        )
        grad = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
        for k in range(K):
            at = tl.load(experts + t * K + k, mask=inside, other=0)
            g = tl.load(grad_weights + t * grad_stride_t + k * grad_stride_k, mask=inside, other=0.0)
            hit = (e[None, :] == at[:, None]) & seen
            grad = tl.where(hit, (scale * g)[:, None], grad)
            chosen |= hit
        numerator, _, total = _softmax(x, seen)
        p = tl.div_rn(numerator, total[:, None])
        z = x
        q = p
        if SIGMOID:
            z = log_sigmoid(x)
            numerator, _, total = _softmax(z, seen)
            q = tl.div_rn(numerator, total[:, None])
        w = q
        if RENORMALIZE:
            numerator, _, total = _softmax(z, chosen)
            w = tl.div_rn(numerator, total[:, None])
        elif SIGMOID:
            w = exp_nonpositive(z)
        through_chosen = tl.where(chosen, w * grad, 0.0)
        dot = tl.sum(through_chosen, axis=1)[:, None]
        dz = q * (m - tl.sum(q * m, axis=1)[:, None]) + through_chosen
        if RENORMALIZE:
            dz -= tl.where(chosen, w, 0.0) * dot
        elif not SIGMOID:
            dz -= q * dot
        if SIGMOID:
            dz *= sigmoid(-x)
        dx = dz + p * tl.load(grad_logsumexp + t * grad_logsumexp_stride, mask=inside, other=0.0)[:, None]
        out = grad_logits + t[:, None] * E + e[None, :]
        tl.store(out, tl.where(seen, dx, 0.0), mask=inside[:, None] & (e < E)[None, :])


@triton.jit
def _tokens_seeing(token_group, T, e, BOUNDS: tl.constexpr, BLOCK_C: tl.constexpr):
    """How many tokens see each column. Every program counts for itself: T * 4 bytes, out of the second-level cache."""
    seen = tl.zeros(e.shape, tl.int32) + T
    GROUPS: tl.constexpr = len(BOUNDS) - 1
    if GROUPS > 1:
        g = tl.arange(0, triton.next_power_of_2(GROUPS))
        sizes = tl.zeros(g.shape, tl.int32)
        for start in range(0, T, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            group = tl.load(token_group + c, mask=c < T, other=0)
            group = tl.where(c < T, tl.minimum(tl.maximum(group, 0), GROUPS - 1), -1)
            sizes += tl.sum((group[:, None] == g[None, :]).to(tl.int32), axis=0)
        for i in tl.static_range(GROUPS):
            size = tl.sum(tl.where(g == i, sizes, 0), axis=0)
            seen = tl.where((e >= BOUNDS[i]) & (e < BOUNDS[i + 1]), size, seen)
    return seen


# --------------------------------------------------------------------------------------------------------------- host


def _tile(T: int, E: int) -> tuple[int, int, int]:
    """Tokens and columns of a tile, and warps: 8 elements per thread, so that no register spills."""
    columns = triton.next_power_of_2(E)
    if INTERPRETED:  # programs run one by one: few large ones
        return min(max(32768 // columns, 64), triton.next_power_of_2(max(T, 1))), columns, 1
    tokens = min(2048 // columns, 64)
    return tokens, columns, max(tokens * columns // 256, 1)


def _constants(logits: Tensor, top_k: int, bounds: list[int], scoring: str, renormalize: bool) -> dict[str, object]:
    """Compile-time arguments of the kernels that go over the logits."""
    T, E = logits.shape
    if E > MAX_EXPERTS:
        raise RuntimeError(f"route: the Triton kernels take up to {MAX_EXPERTS} experts, got {E}")
    tokens, columns, warps = _tile(T, E)
    return {
        "E": E,
        "K": top_k,
        "BOUNDS": tuple(bounds),
        "SIGMOID": scoring == "sigmoid",
        "RENORMALIZE": renormalize,
        "BLOCK_T": tokens,
        "BLOCK_E": columns,
        "num_warps": warps,
        "enable_fp_fusion": False,  # see _numerics.py
    }


def route(
    logits: Tensor,
    top_k: int,
    token_group: Tensor | None,
    group_bounds: list[int],
    scoring: str,
    selection_bias: Tensor | None,
    renormalize: bool,
    scale: float,
    check_finite: bool,
) -> tuple[Tensor, ...]:
    """The fields of `RoutingPlan` in order. `check_finite` looks at values, so there it waits for the device."""
    if check_finite:
        _check_values(logits, token_group, group_bounds)
    T, E = logits.shape
    constants = _constants(logits, top_k, group_bounds, scoring, renormalize)
    BLOCK_T, BLOCK_E = constants["BLOCK_T"], constants["BLOCK_E"]
    tiles = triton.cdiv(T, BLOCK_T)
    token_group = None if token_group is None else token_group.contiguous()
    selection_bias = None if selection_bias is None else selection_bias.contiguous()

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    weights, logsumexp, importance = (empty(*shape, dtype=torch.float32) for shape in ((T, top_k), (T,), (E,)))
    experts, offsets, load = empty(T, top_k), empty(E + 1), empty(E)
    order, position = empty(T * top_k), empty(T * top_k)
    tile_load, tile_seen, before = empty(3, tiles, E).unbind()
    tile_probability = empty(tiles, E, dtype=torch.float32)
    if tiles:
        per_token, per_tile = (weights, experts, position, logsumexp), (tile_load, tile_probability, tile_seen)
        _rows[(tiles,)](
            logits, *logits.stride(), token_group, selection_bias, scale, *per_token, *per_tile, T, **constants
        )
    _scan[(triton.cdiv(E, _SCAN_EXPERTS),)](
        tile_load, tile_probability, tile_seen, before, load, importance, tiles, E, _SCAN_TILES, _SCAN_EXPERTS
    )
    slots = BLOCK_T * top_k
    _scatter[(max(tiles, 1),)](
        experts, load, before, offsets, order, position, T * top_k, E, slots, triton.next_power_of_2(slots), BLOCK_E
    )
    return weights, experts, offsets, order, position, load, importance, logsumexp


def route_backward(
    grad_weights: Tensor,
    grad_importance: Tensor,
    grad_logsumexp: Tensor,
    logits: Tensor,
    experts: Tensor,
    token_group: Tensor | None,
    group_bounds: list[int],
    scoring: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """Gradient of `logits`, contiguous."""
    T, E = logits.shape
    constants = _constants(logits, experts.shape[1], group_bounds, scoring, renormalize)
    grad_logits = torch.empty((T, E), dtype=logits.dtype, device=logits.device)
    tiles = triton.cdiv(T, constants["BLOCK_T"])
    if tiles:
        # Each program counts the groups' tokens anew: no more programs than the device can hold at once.
        programs = min(tiles, 2 * multiprocessors(logits.device))
        group = None if token_group is None else token_group.contiguous()
        grads = (grad_weights, *grad_weights.stride(), grad_importance, *grad_importance.stride())
        grads += (grad_logsumexp, *grad_logsumexp.stride())
        chunk = max(2048 // triton.next_power_of_2(len(group_bounds) - 1), 16)
        _rows_backward[(programs,)](
            *grads, logits, *logits.stride(), experts.contiguous(), group, scale, grad_logits, T, tiles,
            BLOCK_C=chunk, **constants,
        )  # fmt: skip
    return grad_logits


def _check_values(logits: Tensor, token_group: Tensor | None, bounds: list[int]) -> None:
    """Refuse groups out of range and logits that are not finite where a token sees them."""
    low = high = 0
    if token_group is not None and token_group.numel():
        low, high = (int(x) for x in token_group.aminmax())
        if low < 0 or high > len(bounds) - 2:
            raise RuntimeError(f"route: token_group must be 0 .. {len(bounds) - 2}, got {low if low < 0 else high}")
    for g, (first, end) in enumerate(pairwise(bounds)):
        bad = ~logits[:, first:end].isfinite()
        if token_group is not None:
            bad &= (token_group == g)[:, None]
        if bad.any():
            token, column = bad.nonzero()[0].tolist()
            value, expert = logits[token, first + column].item(), first + column
            raise RuntimeError(f"route: logits must be finite, got {value} at token {token}, expert {expert}")
