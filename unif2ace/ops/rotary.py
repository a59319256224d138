"""What happens to every query and key head between projection and attention: LayerNorm, then rotary embedding.

For token t, head h, with x = one head's `dim` numbers and the token's angles cos_t, sin_t [r]:

    n = (x - mean x) / sqrt(var x + eps) * weight + bias            over the head's dimensions, variance biased
    y[i]     = n[i] cos_t[i] - n[r + i] sin_t[i]
    y[r + i] = n[r + i] cos_t[i] + n[i] sin_t[i]        i < r;      dimensions from 2 r on pass through

Backward, with g = dL/dy turned back by the same angles, u = (x - mean) / sqrt(var + eps) and v = g weight:
`dx = (v - mean v - u mean(v u)) / sqrt(var + eps)`, `dweight = sum g u`, `dbias = sum g`.

Cost: x once in and once out, some 20 FLOPs a number; in plain PyTorch about eight passes. Statistics and rotation run
in float32 and the result is rounded once. The views of a fused projection (`qkv.unbind`) are read in place.
Sources: RoFormer (arXiv 2104.09864), half pairing; query-key normalisation (arXiv 2302.05442).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.ops import _registry
from unif2ace.ops._checks import describe, dtype_name, expect


def rotate_heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over each head, then rotary embedding of its first 2 r dimensions.

    Args:
        x: [T, heads, dim] float, any strides. weight, bias: [dim] of its dtype.
        cos, sin: [T, r] of its dtype, 2 r <= dim; no gradient.
        eps: added to the variance.
        backend: see `unif2ace.ops.use_backend`.

    Returns:
        [T, heads, dim] in the dtype of x; differentiable in x, weight and bias.

    Raises:
        UserError: wrong shapes or dtypes, or a back end that cannot run the call.
    """
    _check_rotate(x, weight, bias, cos, sin)
    name = _registry.choose("rotary", backend, x.device, x.dtype)
    if name == "reference" and not torch.compiler.is_compiling():
        return reference_rotate_heads(x, weight, bias, cos, sin, eps)
    if _registry.needs_grad(x, weight, bias):
        return _RotateHeads.apply(name, x, weight, bias, cos, sin, eps)
    return _registry.registered(name, "rotate_heads")(x, weight, bias, cos, sin, eps)


def reference_rotate_heads(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The definition, differentiable."""
    normalised = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    half = cos.shape[-1]
    if not half:
        return normalised
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = normalised.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


# ---------------------------------------------------------------------------------------------- registration, autograd


def _rotate_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference_rotate_heads(x, weight, bias, cos, sin, eps)

    return tuple(g.contiguous() for g in _registry.vjp(forward, [x, weight, bias], [grad]))


_registry.define(
    "rotary",
    "rotate_heads",
    "(Tensor x, Tensor weight, Tensor bias, Tensor cos, Tensor sin, float eps) -> Tensor",
    lambda x, weight, bias, cos, sin, eps: x.new_empty(x.shape),
    lambda *arguments: reference_rotate_heads(*arguments).contiguous(),
)
_registry.define(
    "rotary",
    "rotate_heads_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    lambda grad, x, weight, bias, cos, sin, eps: tuple(y.new_empty(y.shape) for y in (x, weight, bias)),
    _rotate_backward_reference,
)


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, bias, cos, sin, eps):
        ctx.save_for_backward(x, weight, bias, cos, sin)
        ctx.backend, ctx.eps = backend, eps
        return _registry.registered(backend, "rotate_heads")(x, weight, bias, cos, sin, eps)

    @staticmethod
    def backward(ctx, grad):
        backward = _registry.registered(ctx.backend, "rotate_heads_backward")
        grad_x, grad_weight, grad_bias = backward(grad, *ctx.saved_tensors, ctx.eps)
        return None, grad_x, grad_weight, grad_bias, None, None, None


def _check_rotate(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 3 or not x.is_floating_point() or x.shape[2] == 0:
        raise UserError(f"rotate_heads: x must be [T, heads, dim >= 1] floating point, got {describe(x)}")
    tokens, _, dim = x.shape
    expect("rotate_heads", "weight", weight, (dim,), x.dtype)
    expect("rotate_heads", "bias", bias, (dim,), x.dtype)
    if cos.dim() != 2:
        raise UserError(f"rotate_heads: cos must be [T, r] {dtype_name(x.dtype)}, got {describe(cos)}")
    half = cos.shape[1]
    expect("rotate_heads", "cos", cos, (tokens, half), x.dtype)
    expect("rotate_heads", "sin", sin, (tokens, half), x.dtype)
    if 2 * half > dim:
        raise UserError(f"rotate_heads: cos and sin rotate {2 * half} dimensions, the heads have {dim}")
