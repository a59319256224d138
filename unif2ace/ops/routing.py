"""Top-k expert routing: logits -> experts, weights, a stable grouping plan and balance statistics.

Maths, for token t of group g that may see the experts `bounds[g] <= e < bounds[g+1]` (the others count as absent), in
float32 (float64 logits: float64):

    z = x                    (scoring "softmax")      score = softmax(z) over the group
    z = log sigmoid(x)       (scoring "sigmoid")      score = exp(z)
    chosen  = the K largest of x, or of score + selection_bias when there is a bias; ties go to the lower expert id
    weights = scale * softmax(z over the chosen)      when renormalize (the same as score / sum of the chosen scores,
                                                      but it cannot become 0 / 0)
            = scale * score of the chosen             otherwise
    importance_e = mean over the tokens of e's group of softmax(z)_e          (for the balance loss)
    logsumexp_t  = log sum exp x over the group                                (for the z-loss)

Choosing by x instead of by the score gives the same experts, but keeps distinct logits distinct after rounding: so the
indices do not depend on anybody's `exp`, and every back end returns identical ones.

Grouping plan: slot s = t * K + k. `order` lists the slots sorted by expert, slots of one expert in increasing order
(stable); `offsets[e] : offsets[e+1]` is expert e's range in it; `position` is the inverse of `order`. The plan lets the
expert multiplications read tokens in place and sum the K results of a token in a fixed order: no scatter, no atomics.

Cost: reads T * E logits once and writes T * K * 16 bytes or so: bound by memory and by latency, never by arithmetic. In
plain PyTorch it is some 20 passes and launches, which is what the fused kernels save. Backward: one pass over T * E.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, top-k gating), Fedus et al. 2021 (2101.03961, balance loss), Zoph et al.
2022 (2202.08906, z-loss), Wang et al. 2024 (2408.15664, selection bias without auxiliary loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unif2ace.errors import UserError
from unif2ace.ops import _registry
from unif2ace.ops._checks import as_int32, describe, is_integer, one_device

SCORINGS = ("softmax", "sigmoid")
INT32_MAX = 2**31 - 1


class RoutingPlan(NamedTuple):
    """Who computes what: T tokens, K choices per token, M = T * K slots, E experts.

    Floating fields are float32 (float64 for float64 logits), index fields int32.
    """

    weights: Tensor  # [T, K] differentiable
    experts: Tensor  # [T, K] in order of decreasing preference
    offsets: Tensor  # [E + 1] exclusive prefix sums of load; offsets[E] = number of slots with a real expert
    order: Tensor  # [M] slots sorted by expert, stable
    position: Tensor  # [M] inverse of order: slot s stands at order[position[s]] == s
    load: Tensor  # [E] slots per expert
    importance: Tensor  # [E] mean probability of each expert over its group's tokens, differentiable
    logsumexp: Tensor  # [T] of the logits a token can see, differentiable


def route(
    logits: Tensor,
    top_k: int,
    *,
    token_group: Tensor | None = None,
    group_bounds: Sequence[int] | None = None,
    scoring: str = "softmax",
    selection_bias: Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    check_finite: bool | None = None,
    backend: str | None = None,
) -> RoutingPlan:
    """Choose `top_k` experts for every token and plan the grouped multiplication.

    Args:
        logits: [T, E] router outputs, any float dtype; the maths is float32 (float64 for float64).
        top_k: experts per token, 1 .. size of the smallest group.
        token_group: [T] integer group of each token; needed when there is more than one group.
        group_bounds: (0, ..., E) strictly increasing; group g owns experts bounds[g] .. bounds[g+1]-1. Default (0, E).
        scoring: "softmax" or "sigmoid".
        selection_bias: [E], added to the scores for choosing only, never to the weights.
        renormalize: make the weights of a token sum to `scale`.
        scale: factor on the weights.
        check_finite: refuse group ids out of range and non-finite logits where a token can see them. Default: on for
            CPU tensors, off on GPUs, where the check would have to wait for the device.
        backend: see `unif2ace.ops.use_backend`.

    Returns:
        RoutingPlan; `weights`, `importance` and `logsumexp` carry gradients to `logits`.

    Raises:
        UserError: wrong shapes, dtypes or values, or a back end that cannot run the call.

    Cost: T * E logits read once, about 16 * T * K + 4 * T bytes written; 20 FLOPs or so per logit.
    """
    bounds = _check_route(logits, top_k, token_group, group_bounds, scoring, selection_bias)
    one_device("route", logits, token_group=token_group, selection_bias=selection_bias)
    if token_group is not None:
        token_group = as_int32("route", "token_group", token_group)
    if selection_bias is not None:
        selection_bias = selection_bias.detach().to(_maths_dtype(logits))
    if check_finite is None:
        check_finite = logits.device.type == "cpu"
    arguments = (logits, top_k, token_group, bounds, scoring, selection_bias, renormalize, float(scale), check_finite)
    name = _registry.choose("routing", backend, logits.device, logits.dtype)
    if name == "reference" and not torch.compiler.is_compiling():
        return RoutingPlan(*reference_route(*arguments))
    try:
        if _registry.needs_grad(logits):
            return RoutingPlan(*_Route.apply(name, *arguments))
        return RoutingPlan(*_registry.registered(name, "route")(*arguments))
    except RuntimeError as error:
        raise _registry.as_user_error(error, "route") from None


def grouping_plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """offsets, order, position and load (see `RoutingPlan`) of any [T, K] expert ids, in plain PyTorch.

    Ids >= num_experts are sentinels (experts of another rank): their slots stand last in `order`, beyond
    `offsets[num_experts]`, and no expert counts them.
    """
    expert_sorted, order = torch.sort(experts.reshape(-1), stable=True)
    # searchsorted instead of bincount: bincount waits for the device to learn its output size
    edges = torch.arange(num_experts + 1, device=experts.device, dtype=expert_sorted.dtype)
    offsets = torch.searchsorted(expert_sorted, edges)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    load = offsets[1:] - offsets[:-1]
    return offsets.int(), order.int(), position.int(), load.int()


# ---------------------------------------------------------------------------------------------------------- reference


def reference_route(
    logits: Tensor,
    top_k: int,
    token_group: Tensor | None,
    group_bounds: Sequence[int],
    scoring: str,
    selection_bias: Tensor | None,
    renormalize: bool,
    scale: float,
    check_finite: bool,
) -> tuple[Tensor, ...]:
    """The definition, differentiable: the fields of `RoutingPlan` in order. Arguments as in `route`, all given."""
    if check_finite:
        _check_values(logits, token_group, group_bounds)
    x, visible = _visible_logits(logits, token_group, group_bounds)
    z = _log_score(x, scoring)
    probability = _masked_softmax(z, visible)

    if selection_bias is None:
        preference = x.detach()
    else:
        score = probability if scoring == "softmax" else z.exp()
        preference = score.detach() + selection_bias
    preference = preference.masked_fill(~visible, -torch.inf)
    # a stable sort, because torch.topk promises nothing about ties
    experts = torch.sort(preference, dim=-1, descending=True, stable=True).indices[:, :top_k]

    weights = _weights(z, experts, visible, scoring, renormalize, scale)
    importance = _importance(probability, visible)
    logsumexp = x.masked_fill(~visible, -torch.inf).logsumexp(dim=-1)
    experts = experts.int()
    offsets, order, position, load = grouping_plan(experts, logits.shape[1])
    return weights, experts, offsets, order, position, load, importance, logsumexp


def _visible(x: Tensor, token_group: Tensor | None, group_bounds: Sequence[int]) -> Tensor:
    """[T, E] bool: may this token choose this expert?"""
    if token_group is None:
        return torch.ones_like(x, dtype=torch.bool)
    bounds = torch.tensor(list(group_bounds), device=x.device)
    group = token_group.long()[:, None]
    columns = torch.arange(x.shape[1], device=x.device)
    return (columns >= bounds[group]) & (columns < bounds[group + 1])


def _visible_logits(logits: Tensor, token_group: Tensor | None, group_bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The logits in the dtype of the maths, and which of them count; 0 stands for what counts as absent, even NaN."""
    visible = _visible(logits, token_group, group_bounds)
    return logits.to(_maths_dtype(logits)).masked_fill(~visible, 0.0), visible


def _log_score(x: Tensor, scoring: str) -> Tensor:
    return F.logsigmoid(x) if scoring == "sigmoid" else x


def _masked_softmax(z: Tensor, visible: Tensor) -> Tensor:
    return z.masked_fill(~visible, -torch.inf).softmax(dim=-1)


def _weights(z: Tensor, experts: Tensor, visible: Tensor, scoring: str, renormalize: bool, scale: float) -> Tensor:
    """[T, K] weights of the chosen experts, exactly as the module docstring has them."""
    chosen = z.gather(1, experts.long())
    if renormalize:
        return scale * chosen.softmax(dim=-1)
    if scoring == "sigmoid":
        return scale * chosen.exp()
    return scale * _masked_softmax(z, visible).gather(1, experts.long())  # not exp(z - logsumexp): that rounds large z


def _importance(probability: Tensor, visible: Tensor) -> Tensor:
    """[E] mean probability over the tokens that see the expert; 0 where none does."""
    return probability.sum(dim=0) / visible.sum(dim=0).clamp(min=1)


def _route_backward_reference(
    grad_weights: Tensor,
    grad_importance: Tensor,
    grad_logsumexp: Tensor,
    logits: Tensor,
    experts: Tensor,
    token_group: Tensor | None,
    group_bounds: Sequence[int],
    scoring: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """Gradient of `logits`; the chosen experts are given, so nothing is sorted again."""

    def floating_outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, visible = _visible_logits(logits, token_group, group_bounds)
        z = _log_score(x, scoring)
        weights = _weights(z, experts, visible, scoring, renormalize, scale)
        importance = _importance(_masked_softmax(z, visible), visible)
        return weights, importance, x.masked_fill(~visible, -torch.inf).logsumexp(dim=-1)

    return _registry.vjp(floating_outputs, [logits], [grad_weights, grad_importance, grad_logsumexp])[0]


# ---------------------------------------------------------------------------------------------- registration, autograd


def _route_fake(
    logits: Tensor,
    top_k: int,
    token_group: Tensor | None,
    group_bounds: Sequence[int],
    scoring: str,
    selection_bias: Tensor | None,
    renormalize: bool,
    scale: float,
    check_finite: bool,
) -> tuple[Tensor, ...]:
    tokens, num_experts = logits.shape
    dtype = _maths_dtype(logits)

    def index(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.int32)

    return (
        logits.new_empty((tokens, top_k), dtype=dtype),
        index(tokens, top_k),
        index(num_experts + 1),
        index(tokens * top_k),
        index(tokens * top_k),
        index(num_experts),
        logits.new_empty((num_experts,), dtype=dtype),
        logits.new_empty((tokens,), dtype=dtype),
    )


def _route_backward_fake(
    grad_weights: Tensor, grad_importance: Tensor, grad_logsumexp: Tensor, logits: Tensor, *_: object
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_registry.define(
    "routing",
    "route",
    "(Tensor logits, int top_k, Tensor? token_group, int[] group_bounds, str scoring, Tensor? selection_bias,"
    " bool renormalize, float scale, bool check_finite)"
    " -> (Tensor weights, Tensor experts, Tensor offsets, Tensor order, Tensor position, Tensor load,"
    " Tensor importance, Tensor logsumexp)",
    _route_fake,
    lambda *arguments: tuple(x.contiguous() for x in reference_route(*arguments)),
)
_registry.define(
    "routing",
    "route_backward",
    "(Tensor grad_weights, Tensor grad_importance, Tensor grad_logsumexp, Tensor logits, Tensor experts,"
    " Tensor? token_group, int[] group_bounds, str scoring, bool renormalize, float scale) -> Tensor grad_logits",
    _route_backward_fake,
    lambda *arguments: _route_backward_reference(*arguments).contiguous(),
)


class _Route(torch.autograd.Function):
    """`route` on a registered back end, with its one-kernel backward."""

    @staticmethod
    def forward(ctx, backend, logits, top_k, token_group, bounds, scoring, selection_bias, renormalize, scale, check):
        plan = _registry.registered(backend, "route")(
            logits, top_k, token_group, bounds, scoring, selection_bias, renormalize, scale, check
        )
        ctx.save_for_backward(logits, plan[1], token_group)
        ctx.constants = (bounds, scoring, renormalize, scale)
        ctx.backend = backend
        ctx.mark_non_differentiable(*plan[1:6])
        return tuple(plan)

    @staticmethod
    def backward(ctx, grad_weights, _e, _o, _s, _p, _l, grad_importance, grad_logsumexp):
        logits, experts, token_group = ctx.saved_tensors
        grad = _registry.registered(ctx.backend, "route_backward")(
            grad_weights, grad_importance, grad_logsumexp, logits, experts, token_group, *ctx.constants
        )
        return None, grad, None, None, None, None, None, None, None, None


# ------------------------------------------------------------------------------------------------------------- checks


def _maths_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_route(
    logits: Tensor,
    top_k: int,
    token_group: Tensor | None,
    group_bounds: Sequence[int] | None,
    scoring: str,
    selection_bias: Tensor | None,
) -> list[int]:
    """Refuse what can be refused without reading data; returns the group bounds."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise UserError(f"route: logits must be [T, E] floating point, got {describe(logits)}")
    num_experts = logits.shape[1]
    bounds = [0, num_experts] if group_bounds is None else [int(b) for b in group_bounds]
    increasing = all(low < high for low, high in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_experts or not increasing:
        raise UserError(f"route: group_bounds must increase strictly from 0 to E = {num_experts}, got {tuple(bounds)}")
    smallest = min(high - low for low, high in pairwise(bounds))
    if not 1 <= top_k <= smallest:
        raise UserError(f"route: top_k must be 1 .. {smallest} (the size of the smallest group), got {top_k}")
    if logits.shape[0] * top_k > INT32_MAX:
        raise UserError(f"route: T * top_k must fit int32, got {logits.shape[0]} * {top_k}")
    if token_group is None and len(bounds) > 2:
        raise UserError(f"route: token_group is needed with {len(bounds) - 1} expert groups, got None")
    if token_group is not None and (token_group.shape != logits.shape[:1] or not is_integer(token_group)):
        raise UserError(f"route: token_group must be [{logits.shape[0]}] integer, got {describe(token_group)}")
    if scoring not in SCORINGS:
        raise UserError(f"route: scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if selection_bias is not None and selection_bias.shape != (num_experts,):
        raise UserError(f"route: selection_bias must be [{num_experts}], got {describe(selection_bias)}")
    return bounds


def _check_values(logits: Tensor, token_group: Tensor | None, group_bounds: Sequence[int]) -> None:
    """Refuse groups out of range, and values that are not finite among the logits that count."""
    groups = len(group_bounds) - 1
    if token_group is not None and token_group.numel() and not 0 <= token_group.min() <= token_group.max() < groups:
        low, high = token_group.min().item(), token_group.max().item()
        raise UserError(f"route: token_group must be 0 .. {groups - 1}, got values from {low} to {high}")
    bad = ~torch.isfinite(logits) & _visible(logits, token_group, group_bounds)
    if bad.any():
        token, expert = bad.nonzero()[0].tolist()
        raise UserError(
            f"route: logits must be finite, got {logits[token, expert].item()} at token {token}, expert {expert}"
        )
