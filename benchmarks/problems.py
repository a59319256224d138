"""One op at one size, written once: its inputs, everything that computes it, and the check before the clock.

A `Problem` holds functions that map the same named inputs to the same outputs: the back ends of the op, and peers from
other projects. From it come the calls that are timed, forward or forward + backward, and the gate that each of them has
to pass first: a wrong kernel has no speed, and a peer that computes something else is no peer. Ceilings, such as one
dense GEMM pair of equal FLOPs, compute something else on purpose; they are timed beside the functions, never checked.

**The gate.** With y a result of a function, r that of the reference in float64 and p that of the reference in the
inputs' own dtype, max|y - r| <= SLACK * (max|p - r| + eps * max|r|) must hold for every output and every gradient;
integers must be equal. It is coarser than the rule of the tests (`tests/oracle.py`), as it looks at one draw only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

SLACK = 4.0  # correct kernels and peers measure 0 to 2: they round as often as the reference, in other places
DIRECTIONS = ("forward", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def each_size(table: Mapping[str, object]) -> pytest.MarkDecorator:
    """Parametrise `shape` over the names of a table of `benchmarks/shapes.py`."""
    return pytest.mark.parametrize("shape", list(table))


@dataclass
class Problem:
    """Functions over the same inputs; `functions["reference"]` is the definition and runs in float64 too.

    inputs: floating tensors by name, all of which get a gradient in "forward+backward". What else a function needs
        (plans, targets, offsets) it has bound already.
    ceilings: calls without arguments, timed in "forward" only.
    """

    inputs: dict[str, Tensor]
    functions: dict[str, Function]
    ceilings: dict[str, Callable[[], object]] = field(default_factory=dict)

    def variants(self, direction: str) -> dict[str, Callable[[], object]]:
        """The calls to time, by name: `functions` and, forward, `ceilings`."""
        if direction == "forward":
            return {name: self._forward(function) for name, function in self.functions.items()} | self.ceilings
        return {name: self._forward_backward(function) for name, function in self.functions.items()}

    def gate(self, direction: str) -> Callable[[str], None]:
        """check(name): raise AssertionError where that function is wrong. Ceilings are not checked."""
        expected: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # once, and for no longer than the gate lives

        def check(name: str) -> None:
            if name in self.ceilings:
                return
            if not expected:
                reference = self.functions["reference"]
                truth = self._results(reference, {k: x.double() for k, x in self.inputs.items()}, direction)
                expected.append((truth, self._results(reference, self.inputs, direction)))
            truth, plain = expected[0]
            for what, result in self._results(self.functions[name], self.inputs, direction).items():
                assert_right(f"{name}: {what}", result, truth[what], plain[what])

        return check

    @cached_property
    def cotangents(self) -> list[Tensor]:
        """The gradient that arrives at each floating output: 1 at a loss, noise elsewhere."""
        generator = torch.Generator().manual_seed(1)
        outputs = _floating(self._forward(self.functions["reference"])())
        return [torch.randn(y.shape, generator=generator).to(y) if y.dim() else torch.ones_like(y) for y in outputs]

    def _forward(self, function: Function) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(**self.inputs)

        return call

    def _forward_backward(self, function: Function) -> Callable[[], tuple[Tensor, ...]]:
        leaves = {name: x.detach().requires_grad_(True) for name, x in self.inputs.items()}

        def call() -> tuple[Tensor, ...]:
            outputs = _floating(function(**leaves))
            return torch.autograd.grad(outputs, list(leaves.values()), self.cotangents)

        return call

    def _results(self, function: Function, inputs: dict[str, Tensor], direction: str) -> dict[str, Tensor]:
        """Outputs, and gradients of the inputs where the direction has them, by name."""
        leaves = {name: x.detach().requires_grad_(direction != "forward") for name, x in inputs.items()}
        outputs = function(**leaves)
        found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        if direction != "forward":
            floating = _floating(outputs)
            cotangents = [c.to(y.dtype) for c, y in zip(self.cotangents, floating, strict=True)]
            grads = torch.autograd.grad(floating, list(leaves.values()), cotangents)
            found |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
        return found


def assert_right(what: str, result: Tensor, truth: Tensor, plain: Tensor) -> None:
    """The gate's rule for one tensor: `truth` is the reference in float64, `plain` in the dtype of the inputs."""
    assert result.shape == truth.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    if not result.is_floating_point():
        assert torch.equal(result, plain), f"{what}: differs from the reference"
        return
    assert not result.isnan().any(), f"{what}: holds NaN"
    if result.numel() == 0:
        return
    error = (result.double() - truth).abs().max().item()
    plain_error, largest = (plain.double() - truth).abs().max().item(), truth.abs().max().item()
    allowed = SLACK * (plain_error + torch.finfo(result.dtype).eps * largest)
    assert error <= allowed, f"{what}: largest error {error:.3e}, allowed {allowed:.3e}"


def _floating(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [y for y in outputs if y.is_floating_point()]
