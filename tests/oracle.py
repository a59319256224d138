"""When is a back end right? The tolerance rule, the dtype sweep and the poison that every op test uses.

Let y be an output (or a gradient) of a back end in dtype d, r the reference computed in float64 from the same values,
p the reference computed in dtype d. Then y is right when

    max|y - r| <= 2 * max|p - r| + atol,     atol = 2 * max|(r + 0.3) - 0.3 - r| computed in dtype d.

So nobody chooses a tolerance: a kernel may be twice as far from the truth as plain PyTorch in its dtype, plus the
rounding that any reordering of sums brings (0.3 is not a binary number, so adding and subtracting it leaves about one
rounding error of size max(|r|, 0.3)). NaN is never right. Indices and tokens are compared exactly, by the tests.

`outputs_and_gradients` runs a function once; `assert_matches_reference` runs it three times (float64 reference, dtype d
reference, the back end) and compares everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from unif2ace.ops import _registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available_backends(op: str, device: str = "cpu", *dtypes: torch.dtype) -> list[str]:
    """Names of the back ends that can run `op` here; collect-time parametrisation of the tests."""
    return [name for name in _registry.BACKENDS if _registry.why_not(op, name, device, dtypes) is None]


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Make the public functions take the registered op even for the reference, as they do while compiling."""
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        yield


@contextlib.contextmanager
def poisoned(*sizes: int) -> Iterator[None]:
    """Fill uninitialised memory with NaN (integers: the largest), so that an element nobody writes is seen.

    PyTorch fills what its own `torch.empty` allocates. Kernels that ask the allocator directly get memory that was just
    freed; so blocks of NaN of these `sizes` (in bytes) are allocated and freed first.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    blocks = [torch.full((size // 4 + 1,), torch.nan) for size in sizes for _ in range(4)]
    del blocks
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def tolerance(truth: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """Largest accepted |y - truth| for an output of this dtype; see the module docstring."""
    if truth.numel() == 0:
        return 0.0
    rounded = truth.to(dtype)
    atol = 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item()
    return 2 * (plain.double() - truth.double()).abs().max().item() + atol


def assert_close(name: str, result: Tensor, truth: Tensor, plain: Tensor) -> None:
    """Fail unless `result` is right by the rule of this module."""
    assert result.shape == truth.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    assert result.dtype == plain.dtype, f"{name}: dtype {result.dtype}, expected {plain.dtype}"
    assert not result.isnan().any(), f"{name}: {int(result.isnan().sum())} of {result.numel()} elements are NaN"
    if result.numel() == 0:
        return
    error = (result.double() - truth.double()).abs()
    allowed = tolerance(truth, plain, result.dtype)
    worst = int(error.argmax())
    assert error.max().item() <= allowed, (
        f"{name}: error {error.max().item():.3e} at flat index {worst} (got {result.flatten()[worst].item():.6g}, "
        f"truth {truth.flatten()[worst].item():.6g}), allowed {allowed:.3e}"
    )


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor], cotangents: list[Tensor] | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run `function(**inputs)`; give its outputs ("output 0", ..) and the gradients of all inputs by name.

    The scalar behind the gradients is the sum of <cotangent, output>; cotangents are drawn once and handed back, so
    that other runs can use the same.
    """
    leaves = {name: x.detach().requires_grad_(True) for name, x in inputs.items()}
    outputs = function(**leaves)
    if cotangents is None:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
        # exactly representable in every dtype, so that all runs see equal cotangents
        cotangents = [c.to(torch.bfloat16).to(torch.float16).double() for c in cotangents]
    cotangents = [c.to(y.device) for c, y in zip(cotangents, outputs, strict=True)]
    torch.autograd.backward(outputs, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)])
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no gradient for {name}"
        found[f"gradient of {name}"] = leaf.grad
    return found, cotangents


def assert_matches_reference(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    backend: str,
    *,
    keep: tuple[str, ...] = (),
) -> None:
    """Outputs and all gradients of `function(backend=backend, **inputs in dtype)` are right.

    Args:
        function: returns a tuple of differentiable tensors; called with `backend` and one keyword for each input.
        inputs: tensors in any float dtype; rounded to `dtype` first, so that the float64 run sees the same values.
        dtype: dtype of the run under test.
        backend: `reference` means: through the registered op and its backward, not plain autograd.
        keep: inputs that stay float32 in every run but the float64 one (router weights and the like).
    """
    low = {name: x.to(torch.float32 if name in keep else dtype) for name, x in inputs.items()}
    high = {name: x.double() for name, x in low.items()}
    truth, cotangents = outputs_and_gradients(lambda **t: function(backend="reference", **t), high)
    plain, _ = outputs_and_gradients(lambda **t: function(backend="reference", **t), low, cotangents)
    sizes = {x.numel() * x.element_size() for x in plain.values()}
    with registered(), poisoned(*sizes):
        result, _ = outputs_and_gradients(lambda **t: function(backend=backend, **t), low, cotangents)
        again, _ = outputs_and_gradients(lambda **t: function(backend=backend, **t), low, cotangents)
    for name in truth:
        assert_close(f"{backend} {dtype} {name}", result[name], truth[name], plain[name])
        assert torch.equal(result[name], again[name]), f"{backend} {dtype} {name}: two equal calls differ"


def noncontiguous(x: Tensor) -> Tensor:
    """Equal values, strided memory: every second column of a wider tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7, dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]
