"""Expert multiplications: a grouped GEMM, and the whole expert MLP from token rows to token rows.

With a `RoutingPlan` of M = T * K slots sorted by expert, expert e owns the rows offsets[e] .. offsets[e+1] - 1:

    grouped_gemm   y_m = W_e a_m + b_e                       for the rows m of expert e, all experts in one call
    expert_mlp     y_t = sum_k weights[t, k] * (W_down_e act(W_up_e x_t + b_up_e) + b_down_e),  e = experts[t, k]

`expert_mlp` reads the rows of x in place (row m is token order[m] // K), so fast back ends fuse that gather into the
load of the first GEMM, bias and activation into its epilogue, and then sum the K rows of a token in the fixed order
k = 0, 1, ..: no scatter, no atomics, the same bits every time. Rows m >= offsets[E] belong to no local expert (sentinel
ids of expert parallelism); they give zeros and get zero gradients.

Saved for backward: x, the pre-activation [M, I or 2I] and the plan. Never the activation, never the gathered rows.

Cost: 2 * M * H * (I_up + I) FLOPs forward (I_up = 2I when gated), twice that backward; every expert that has rows reads
its weights once. Few rows per expert (decoding): bound by reading weights; many (training): by arithmetic.

The reference cuts the sorted rows per expert and calls one GEMM for each expert that has rows. It reads the offsets on
the host, so on a GPU it waits for the device.

Activations: gelu_tanh, gelu, silu, relu2 (relu squared, arXiv 2109.08668), and the gated swiglu and geglu (Shazeer,
arXiv 2002.05202; exact gelu): gate = first I rows of W_up, up = last I rows, act = silu(gate) * up or gelu(gate) * up.
Sources: Gale et al., MegaBlocks (arXiv 2211.15841); Tan et al., ScatterMoE (arXiv 2403.08245).
"""

from __future__ import annotations

import torch
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.ops import _registry
from unif2ace.ops._checks import as_int32, describe, expect
from unif2ace.ops._expert_rows import ACTIVATIONS, GATED, Gather, activate, combine, grouped_linear
from unif2ace.ops.routing import RoutingPlan


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply consecutive row ranges of `a` by different matrices: `out[m] = a[m] @ b[e].T + bias[e]`.

    Args:
        a: [M, K] rows sorted by expert, or [any, K] with `gather`.
        b: [E, N, K] in `nn.Linear` orientation, dtype of `a`.
        offsets: [E + 1] int32, non-decreasing from 0: expert e multiplies rows offsets[e] .. offsets[e+1] - 1.
        bias: [E, N] or None.
        gather: [M] integer: row m reads `a[gather[m]]`.
        out: [M, N] written in place and returned; only where no gradient is wanted.
        backend: see `unif2ace.ops.use_backend`.

    Returns:
        [M, N] in the dtype of `a`, sums in float32; rows from offsets[E] on are zeros. Differentiable in a, b, bias.

    Raises:
        UserError: wrong shapes or dtypes, or a back end that cannot run the call.

    Cost: 2 * M * N * K FLOPs; a, the used b[e] and the result once over memory.
    """
    _check_grouped(a, b, offsets, bias, gather, out)
    offsets = as_int32("grouped_gemm", "offsets", offsets)
    gather = None if gather is None else as_int32("grouped_gemm", "gather", gather)
    name = _registry.choose("experts", backend, a.device, a.dtype)
    if name == "reference" and not torch.compiler.is_compiling():
        result = reference_grouped_gemm(a, b, offsets, bias, gather)
    else:
        try:
            if _registry.needs_grad(a, b, bias):
                result = _GroupedGemm.apply(name, a, b, offsets, bias, gather)
            else:
                result = _registry.registered(name, "grouped_gemm")(a, b, offsets, bias, gather)
        except RuntimeError as error:
            raise _registry.as_user_error(error, "grouped_gemm") from None
    return result if out is None else out.copy_(result)


def expert_mlp(
    x: Tensor,
    plan: RoutingPlan,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "gelu_tanh",
    few: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Send every token through its K experts and add the results up with its routing weights.

    Args:
        x: [T, H] float32, bfloat16 or float16 (float64: reference).
        plan: result of `route` for these T tokens; `plan.weights` gets a gradient.
        w_up: [E, I, H], or [E, 2 * I, H] with `[gate; up]` rows for a gated activation; dtype of x.
        w_down: [E, H, I].
        b_up: [E, I] (gated [E, 2 * I]) or None.
        b_down: [E, H] or None.
        activation: one of `ACTIVATIONS`.
        few: by `native` on a CPU, few and many tokens take products that sum in different orders. None lets their
            number decide which; True and False choose, and then a token has the same bits in any number of them: True
            where there are mostly a few per expert (decoding), False where there are many. 4096 tokens take the way of
            few in 1.2 to 1.5 times the time of the other in float32, in twice that time in bfloat16.
        backend: see `unif2ace.ops.use_backend`.

    Returns:
        [T, H] in the dtype of x; products and the sum over K are accumulated in float32.

    Raises:
        UserError: wrong shapes, dtypes or activation, or a back end that cannot run the call.

    Cost: 2 * T * K * H * (I_up + I) FLOPs; see the module docstring.
    """
    _check_mlp(x, plan, w_up, w_down, b_up, b_down, activation)
    named = {"plan.offsets": plan.offsets, "plan.order": plan.order, "plan.position": plan.position}
    indices = (as_int32("expert_mlp", name, index) for name, index in named.items())
    arguments = (x, plan.weights, *indices, w_up, w_down, b_up, b_down, activation)
    name = _registry.choose("experts", backend, x.device, x.dtype)
    if name == "reference" and not torch.compiler.is_compiling():
        return reference_expert_mlp(*arguments)[0]
    try:
        if not _registry.needs_grad(*arguments):  # inference does not write the pre-activation
            return _registry.registered(name, "expert_mlp")(*arguments, False, few)[0]
        return _ExpertMlp.apply(name, few, *arguments)
    except RuntimeError as error:
        raise _registry.as_user_error(error, "expert_mlp") from None


# ---------------------------------------------------------------------------------------------------------- reference


def reference_grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None) -> Tensor:
    """The definition of `grouped_gemm`, differentiable."""
    return grouped_linear(a if gather is None else a[gather.long()], b, offsets, bias)


def reference_expert_mlp(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    order: Tensor,
    position: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The definition of `expert_mlp`, differentiable: (y [T, H], pre-activation [M, I or 2I])."""
    top_k = weights.shape[1]
    order, position = order.long(), position.long()
    rows = Gather.apply(x, order, position, top_k)
    pre = grouped_linear(rows, w_up, offsets, b_up)
    down = grouped_linear(activate(pre, activation), w_down, offsets, b_down)
    return combine(down, weights, order, position).to(x.dtype), pre


# ---------------------------------------------------------------------------------------------- registration, autograd


def _none_as_empty(x: Tensor, optional: Tensor | None) -> Tensor:
    """Registered ops return tensors only: the gradient of an absent bias is an empty one."""
    return x.new_empty(0) if optional is None else torch.empty_like(optional, memory_format=torch.contiguous_format)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _grouped_gemm_fake(a, b, offsets, bias, gather):
    return a.new_empty(a.shape[0] if gather is None else gather.shape[0], b.shape[1])


def _grouped_gemm_backward_fake(grad, a, b, offsets, bias, gather):
    return *_like(a, b), _none_as_empty(a, bias)


def _grouped_gemm_backward_reference(grad, a, b, offsets, bias, gather):
    present = [x for x in (a, b, bias) if x is not None]
    grads = _registry.vjp(lambda a, b, bias=None: reference_grouped_gemm(a, b, offsets, bias, gather), present, [grad])
    return tuple(g.contiguous() for g in grads) + (() if bias is not None else (a.new_empty(0),))


def _expert_mlp_fake(x, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation, save, few):
    return x.new_empty(x.shape), x.new_empty(order.shape[0] if save else 0, w_up.shape[1])


def _expert_mlp_registered(x, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation, save, few):
    y, pre = reference_expert_mlp(x, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation)
    return y.contiguous(), pre if save else pre.new_empty(0, pre.shape[1])


def _expert_mlp_backward_fake(grad, x, pre, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation):
    return *_like(x, weights, w_up, w_down), _none_as_empty(x, b_up), _none_as_empty(x, b_down)


def _expert_mlp_backward_reference(
    grad, x, pre, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation
):
    def forward(x, weights, w_up, w_down, *biases):
        given = iter(biases)
        up, down = (None if b is None else next(given) for b in (b_up, b_down))
        return reference_expert_mlp(x, weights, offsets, order, position, w_up, w_down, up, down, activation)[0]

    biases = [b for b in (b_up, b_down) if b is not None]
    grads = _registry.vjp(forward, [x, weights, w_up, w_down, *biases], [grad])
    found = iter(g.contiguous() for g in grads)
    return tuple(x.new_empty(0) if b is None else next(found) for b in (x, weights, w_up, w_down, b_up, b_down))


_registry.define(
    "experts",
    "grouped_gemm",
    "(Tensor a, Tensor b, Tensor offsets, Tensor? bias, Tensor? gather) -> Tensor",
    _grouped_gemm_fake,
    lambda *arguments: reference_grouped_gemm(*arguments).contiguous(),
)
_registry.define(
    "experts",
    "grouped_gemm_backward",
    "(Tensor grad, Tensor a, Tensor b, Tensor offsets, Tensor? bias, Tensor? gather)"
    " -> (Tensor grad_a, Tensor grad_b, Tensor grad_bias)",
    _grouped_gemm_backward_fake,
    _grouped_gemm_backward_reference,
)
_registry.define(
    "experts",
    "expert_mlp",
    "(Tensor x, Tensor weights, Tensor offsets, Tensor order, Tensor position, Tensor w_up, Tensor w_down,"
    " Tensor? b_up, Tensor? b_down, str activation, bool save, bool? few) -> (Tensor y, Tensor pre)",
    _expert_mlp_fake,
    _expert_mlp_registered,
)
_registry.define(
    "experts",
    "expert_mlp_backward",
    "(Tensor grad, Tensor x, Tensor pre, Tensor weights, Tensor offsets, Tensor order, Tensor position, Tensor w_up,"
    " Tensor w_down, Tensor? b_up, Tensor? b_down, str activation) -> (Tensor grad_x, Tensor grad_weights,"
    " Tensor grad_w_up, Tensor grad_w_down, Tensor grad_b_up, Tensor grad_b_down)",
    _expert_mlp_backward_fake,
    _expert_mlp_backward_reference,
)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, a, b, offsets, bias, gather):
        ctx.save_for_backward(a, b, offsets, bias, gather)
        ctx.backend = backend
        return _registry.registered(backend, "grouped_gemm")(a, b, offsets, bias, gather)

    @staticmethod
    def backward(ctx, grad):
        a, b, offsets, bias, gather = ctx.saved_tensors
        backward = _registry.registered(ctx.backend, "grouped_gemm_backward")
        grad_a, grad_b, grad_bias = backward(grad, a, b, offsets, bias, gather)
        return None, grad_a, grad_b, None, None if bias is None else grad_bias, None


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, few, x, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation):
        y, pre = _registry.registered(backend, "expert_mlp")(
            x, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation, True, few
        )
        ctx.save_for_backward(x, pre, weights, offsets, order, position, w_up, w_down, b_up, b_down)
        ctx.backend, ctx.activation = backend, activation
        return y

    @staticmethod
    def backward(ctx, grad):
        backward = _registry.registered(ctx.backend, "expert_mlp_backward")
        *_, b_up, b_down = ctx.saved_tensors
        found = backward(grad, *ctx.saved_tensors, ctx.activation)
        grad_x, grad_weights, grad_w_up, grad_w_down, grad_b_up, grad_b_down = found
        grad_b_up = None if b_up is None else grad_b_up
        grad_b_down = None if b_down is None else grad_b_down
        return None, None, grad_x, grad_weights, None, None, None, grad_w_up, grad_w_down, grad_b_up, grad_b_down, None


# ------------------------------------------------------------------------------------------------------------- checks


def _check_grouped(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, out: Tensor | None
) -> None:
    if a.dim() != 2 or not a.is_floating_point():
        raise UserError(f"grouped_gemm: a must be [M, K] floating point, got {describe(a)}")
    if b.dim() != 3 or b.shape[0] == 0 or b.shape[2] != a.shape[1]:
        raise UserError(f"grouped_gemm: b must be [E, N, {a.shape[1]}] with E >= 1, got {describe(b)}")
    num_experts, width = b.shape[:2]
    expect("grouped_gemm", "offsets", offsets, (num_experts + 1,), None)
    expect("grouped_gemm", "b", b, tuple(b.shape), a.dtype)
    if bias is not None:
        expect("grouped_gemm", "bias", bias, (num_experts, width), a.dtype)
    if gather is not None and gather.dim() != 1:
        raise UserError(f"grouped_gemm: gather must be [M] integer, got {describe(gather)}")
    if gather is not None:
        expect("grouped_gemm", "gather", gather, tuple(gather.shape), None)
    if out is not None:
        expect("grouped_gemm", "out", out, (a.shape[0] if gather is None else gather.shape[0], width), a.dtype)
        if _registry.needs_grad(a, b, bias):
            raise UserError("grouped_gemm: out= works only without gradients, got an argument that requires grad")


def _check_mlp(
    x: Tensor,
    plan: RoutingPlan,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise UserError(f"expert_mlp: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dim() != 2 or not x.is_floating_point():
        raise UserError(f"expert_mlp: x must be [T, H] floating point, got {describe(x)}")
    if plan.weights.dim() != 2 or plan.weights.shape[0] != x.shape[0]:
        raise UserError(f"expert_mlp: the plan must be for {x.shape[0]} tokens, got weights {describe(plan.weights)}")
    tokens, hidden = x.shape
    if w_down.dim() != 3 or w_down.shape[0] == 0:
        raise UserError(f"expert_mlp: w_down must be [E, H, I] with E >= 1, got {describe(w_down)}")
    num_experts, _, inner = w_down.shape
    rows = 2 * inner if activation in GATED else inner
    expect("expert_mlp", "w_down", w_down, (num_experts, hidden, inner), x.dtype)
    expect("expert_mlp", "w_up", w_up, (num_experts, rows, hidden), x.dtype)
    if b_up is not None:
        expect("expert_mlp", "b_up", b_up, (num_experts, rows), x.dtype)
    if b_down is not None:
        expect("expert_mlp", "b_down", b_down, (num_experts, hidden), x.dtype)
    expect("expert_mlp", "plan.offsets", plan.offsets, (num_experts + 1,), None)
    slots = tokens * plan.weights.shape[1]
    expect("expert_mlp", "plan.order", plan.order, (slots,), None)
    expect("expert_mlp", "plan.position", plan.position, (slots,), None)
