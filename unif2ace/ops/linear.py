"""Dense `y = x W^T + b`, and `gelu(y)`: the product of attention projections, shared experts and heads.

No kernel of ours can beat a library here; the op exists because the library matters. The reference is
`torch.nn.functional.linear`. On CPUs that sends float32 products to MKL, which on AMD processors runs at half the rate
of oneDNN (csrc/cpu/gemm.h has the measurement); back end `native` calls oneDNN for them, forward and backward, and
PyTorch's own choice for 16 bits. On a GPU `auto` runs the reference, which is cuBLAS: no fallback.

Which bits: on a CPU, by `native`, a row's result does not depend on how many rows stand beside it, on its place among
them, nor on the number of threads: in float32 for any number of rows, in bfloat16 from `INVARIANT_ROWS` on (fewer may
sum in another order). MKL (the reference) keeps that promise only while every thread has some eight rows; cuBLAS picks
a kernel by the shape.

Cost: 2 M N K FLOPs, backward twice that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.ops import _registry
from unif2ace.ops._checks import describe, dtype_name

INVARIANT_ROWS = 16  # tests/ops/test_linear.py: from here on bfloat16 has equal bits for any number of rows, threads


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None -> [..., N] in the dtype of x; sums in float32.

    Differentiable in all three. Raises `UserError` for shapes and dtypes that do not fit, or a back end that cannot run
    the call.
    """
    automatic = (backend or _registry.default_backend()) == "auto"
    if automatic and torch.is_autocast_enabled(x.device.type):
        return reference_linear(x, weight, bias)  # autocast chooses the dtype
    _check_linear(x, weight, bias)
    name = _registry.choose("linear", backend, x.device, x.dtype)
    if name == "reference" and not torch.compiler.is_compiling():
        return reference_linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if _registry.needs_grad(x, weight, bias):
        y = _Linear.apply(name, rows, weight, bias)
    else:
        y = _registry.registered(name, "linear")(rows, weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """gelu_tanh(x W^T + b), arguments and errors as those of `linear`; differentiable.

    By `native` without gradients the activation is taken in the memory of the product, where it neither costs another
    tensor nor depends on the number of rows; with gradients it is PyTorch's.
    """
    automatic = (backend or _registry.default_backend()) == "auto"
    if _registry.needs_grad(x, weight, bias) or (automatic and torch.is_autocast_enabled(x.device.type)):
        return F.gelu(linear(x, weight, bias, backend=backend), approximate="tanh")
    _check_linear(x, weight, bias)
    name = _registry.choose("linear", backend, x.device, x.dtype)
    if name == "reference" and not torch.compiler.is_compiling():
        return reference_linear_gelu(x, weight, bias)
    y = _registry.registered(name, "linear_gelu")(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, differentiable."""
    return F.linear(x, weight, bias)


def reference_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, differentiable."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _linear_backward_reference(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ weight, grad.t() @ x


_registry.define(
    "linear",
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    reference_linear,
)
_registry.define(
    "linear",
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    reference_linear_gelu,
)
_registry.define(
    "linear",
    "linear_backward",
    "(Tensor grad, Tensor x, Tensor weight) -> (Tensor grad_x, Tensor grad_weight)",
    lambda grad, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    _linear_backward_reference,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.backend, ctx.has_bias = backend, bias is not None
        return _registry.registered(backend, "linear")(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _registry.registered(ctx.backend, "linear_backward")(grad.contiguous(), x, weight)
        return None, grad_x, grad_weight, grad.sum(0) if ctx.has_bias else None


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise UserError(f"linear: x must be [..., K] floating point, got {describe(x)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise UserError(f"linear: weight must be [N, {x.shape[-1]}] {dtype_name(x.dtype)}, got {describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise UserError(f"linear: bias must be [{weight.shape[0]}] {dtype_name(x.dtype)}, got {describe(bias)}")
