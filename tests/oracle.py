"""When is a back end right? The tolerance rule, the dtype sweep and the poison that every op test uses.

Let y be an output (or a gradient) of a back end in dtype d, r the reference computed in float64 from the same values,
p the reference computed in dtype d. Then y is right when

    max|y - r| <= 2 * max|p - r| + atol,     atol = 2 * max|(r + 0.3) - 0.3 - r| computed in dtype d.

So nobody chooses a tolerance: a kernel may be twice as far from the truth as plain PyTorch in its dtype, plus the
rounding that any reordering of sums brings (0.3 is not a binary number, so adding and subtracting it leaves about one
rounding error of size max(|r|, 0.3)). NaN is never right. Indices and tokens are compared exactly, by the tests.

Both sides of the rule are maxima, and with a handful of elements plain PyTorch may be exact by luck, leaving an honest
kernel no room: single draws of such tests fail one time in ten for a kernel whose average error equals that of plain
PyTorch. So `assert_matches_reference` applies the rule to the outputs of `DRAWS` draws of the inputs put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from unif2ace.ops import _registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 8


def available_backends(op: str, *dtypes: torch.dtype) -> list[str]:
    """Names of the back ends that can run `op` on the device of this test run; read when tests are collected."""
    device = torch.get_default_device()
    return [name for name in _registry.BACKENDS if _registry.why_not(op, name, device, dtypes) is None]


def backend_cases(op: str) -> list[tuple[str, torch.dtype]]:
    """(back end, dtype) of every way in which `op` can run on the device of this test run."""
    return [(name, dtype) for dtype in DTYPES for name in available_backends(op, dtype)]


def seeded(seed: int) -> torch.Generator:
    """A generator for tensors on the device of this test run."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


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

    The scalar behind the gradients is the sum of <cotangent, output>. Cotangents not given are drawn in the dtypes of
    the outputs; they are handed back, so that other runs use the same numbers.
    """
    leaves = {name: x.detach().requires_grad_(True) for name, x in inputs.items()}
    outputs = function(**leaves)
    if cotangents is None:
        cotangents = [torch.randn_like(y) for y in outputs]
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
    """Outputs and all gradients of `function(backend=backend, **inputs in dtype)` are right, and the same every time.

    Args:
        function: returns a tuple of differentiable tensors; called with `backend` and one keyword for each input.
        inputs: tensors in any float dtype; rounded to `dtype` first, so that the float64 run sees the same values.
            Draws after the first scale each element by a random factor of 0.75 to 1.25.
        dtype: dtype of the run under test.
        backend: `reference` means: through the registered op and its backward, not plain autograd.
        keep: inputs that stay float32 in every run but the float64 one (router weights and the like).
    """
    runs = []
    for draw in range(DRAWS):
        scaled = {name: x * (0.75 + 0.5 * torch.rand_like(x)) if draw else x for name, x in inputs.items()}
        low = {name: x.to(torch.float32 if name in keep else dtype) for name, x in scaled.items()}
        high = {name: x.double() for name, x in low.items()}
        plain, cotangents = outputs_and_gradients(partial(function, backend="reference"), low)
        truth, _ = outputs_and_gradients(partial(function, backend="reference"), high, cotangents)
        with registered(), poisoned(*{x.numel() * x.element_size() for x in plain.values()}):
            result, _ = outputs_and_gradients(partial(function, backend=backend), low, cotangents)
            again, _ = outputs_and_gradients(partial(function, backend=backend), low, cotangents)
        for name, value in result.items():
            assert value.shape == truth[name].shape, f"{name}: shape {tuple(value.shape)}"
            assert torch.equal(value, again[name]), f"{backend} {dtype} {name}: NaN, or two equal calls differ"
        runs.append((result, truth, plain))
    for name in runs[0][0]:
        pooled = [torch.cat([run[i][name].flatten() for run in runs]) for i in range(3)]
        assert_close(f"{backend} {dtype} {name}", *pooled)


def noncontiguous(x: Tensor) -> Tensor:
    """Equal values, strided memory: every second column of a wider tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7, dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]
