"""What all fuzz tests share: arguments with awkward sizes, strides and values, and what counts as agreement.

Hypothesis draws structure (sizes, layouts, where a NaN stands); the bulk of the numbers comes from a seeded generator,
since a thousand drawn floats find nothing that a seed does not. The number of examples per test is that of
UNIF2ACE_FUZZ_EXAMPLES.

Two kinds of test for every op:

* well formed: `native` has to agree with `reference`, or both refuse. Indices and tokens are equal; numbers follow
  `assert_agrees`, which also says what NaN and infinity may do.
* malformed: one argument of the registered op is spoilt, behind the back of the public function that would have
  refused it. C++ has to refuse it too: it may trust nobody, since a wrong offset is a write somewhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import DTYPES, available_backends
from unif2ace import native
from unif2ace.errors import UserError
from unif2ace.ops import _registry

fuzz = settings(
    max_examples=int(os.environ.get("UNIF2ACE_FUZZ_EXAMPLES", "300")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Nothing, one, primes, around one and two vectors of every width, more than the tiles of the kernels.
SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 23, 31, 32, 33, 47, 64, 67)
sizes = st.sampled_from(SIZES)
some = st.sampled_from(SIZES[1:])  # where there is no such thing as nothing
dtypes = st.sampled_from(DTYPES)
LAYOUTS = ("dense", "dense", "transposed", "strided", "inside", "expanded")
# 1e18 squared is still a float32; -0.0, a subnormal float32, and one that float16 too cannot hold as a normal number.
SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e18, -1e18, 6e4, -0.0, 1e-40, 3e-6)

OUT_OF_RANGE = (-(2**31), -(2**16), -1, 2**16, 2**31 - 1)


def marks(op: str) -> list[pytest.MarkDecorator]:
    """The `pytestmark` of a fuzz file: slow, and skipped where there is nothing to compare."""
    missing = "native" not in available_backends(op)
    return [pytest.mark.slow, pytest.mark.skipif(missing, reason=native.why_not() or f"no native {op}")]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Equal values in other memory, poison around them ("expanded": the first row in place of all rows)."""
    if x.dim() == 0 or layout == "dense":
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape) if len(x) else x
    poison = torch.nan if x.is_floating_point() else 2**30
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), poison, dtype=x.dtype)
        view = wide[..., 1::2]
    else:
        wide = torch.full([n + 2 for n in x.shape], poison, dtype=x.dtype)
        view = wide[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


class Source:
    """Tensors of one example."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="seed"))

    def draw(self, strategy: st.SearchStrategy, label: str | None = None):
        return self.data.draw(strategy, label=label)

    def layout(self, x: Tensor, label: str, expand: bool = True) -> Tensor:
        layouts = [layout for layout in LAYOUTS if expand or layout != "expanded"]
        return lay_out(x, self.draw(st.sampled_from(layouts), f"layout of {label}"))

    def floats(
        self, label: str, *shape: int, dtype: torch.dtype = torch.float32, special: bool = False, scale: float = 1.0
    ) -> Tensor:
        """`scale` times random normals, or whole numbers with many ties; with `special`, a few other values."""
        x = torch.randn(shape, generator=self.generator)
        if self.draw(st.booleans(), f"whole numbers in {label}"):
            x = (3 * x).round()
        x = (scale * x).to(dtype)
        if special and x.numel():
            for value in self.draw(st.lists(st.sampled_from(SPECIAL), max_size=3), f"special values in {label}"):
                x.view(-1)[self.draw(st.integers(0, x.numel() - 1), "place")] = value
        return self.layout(x, label)

    def integers(self, label: str, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers low .. high - 1."""
        return self.layout(torch.randint(low, high, shape, generator=self.generator, dtype=dtype), label)

    def cut(self, total: int, parts: int, label: str) -> list[int]:
        """`parts` + 1 rising offsets from 0 to `total`; parts may be empty."""
        inner = self.draw(st.lists(st.integers(0, total), min_size=parts - 1, max_size=parts - 1), label)
        return [0, *sorted(inner), total]


def attempt(call: Callable[[], object]) -> object:
    """The result, or the refusal."""
    try:
        return call()
    except UserError as refusal:
        return refusal


def refuse_alike(found: object, wanted: object) -> bool:
    """Did both back ends refuse? Fails if only one did."""
    assert isinstance(found, UserError) == isinstance(wanted, UserError), f"native: {found!r}, reference: {wanted!r}"
    return isinstance(found, UserError)


def assert_agrees(
    name: str, result: Tensor, plain: Tensor, truth: Tensor, slack: float = 0.0, eps: float = 0.0
) -> None:
    """`result` of a kernel is as good as `plain`, the reference in the same dtype; `truth` is that in float64.

    Where the references are numbers, the result is one within four times the error of `plain` plus 16 roundings of the
    largest number (single draws: tests/oracle.py has the exact rule) plus `slack`, for sums whose terms cancel. `eps`:
    a rounding, where something on the way is coarser than the result. Where both are NaN it is no number either.
    """
    assert result.shape == plain.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(plain.shape)}"
    assert result.dtype == plain.dtype, f"{name}: dtype {result.dtype}, expected {plain.dtype}"
    nan = plain.isnan() & truth.isnan()
    assert not result[nan].isfinite().any(), f"{name}: a number where the reference has NaN"
    number = plain.isfinite() & truth.isfinite()
    found, wanted = result[number].double(), truth[number].double()
    if not found.numel():
        return
    assert not found.isnan().any(), f"{name}: NaN where the reference has none"
    error = 4 * (plain[number].double() - wanted).abs().max().item()
    eps = max(eps, torch.finfo(plain.dtype).eps)
    allowed = error + 16 * eps * wanted.abs().max().item() + slack
    tiny = torch.finfo(plain.dtype).smallest_normal  # may be flushed to zero
    worst = (found - wanted).abs().max().item()
    assert worst <= allowed + tiny, f"{name}: error {worst:.3e}, allowed {allowed:.3e}"


def grads_of(outputs: tuple[Tensor, ...], leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of sum <cotangent, output>; zeros where an output does not depend on a leaf."""
    cotangents = [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
    found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))


def compare_runs(
    function: Callable[..., tuple[Tensor, ...]],
    source: Source,
    inputs: dict[str, Tensor],
    *,
    gradients: bool = True,
    slack: float = 0.0,
) -> None:
    """Outputs and gradients of `function(backend=.., **inputs)`, native against the reference, also in float64."""
    cotangents: list[Tensor] = []

    def run(backend: str, double: bool) -> dict[str, Tensor]:
        leaves = {name: x.detach().double() if double else x.detach() for name, x in inputs.items()}
        if not gradients:
            return {f"output {i}": y for i, y in enumerate(function(backend=backend, **leaves))}
        leaves = {name: x.requires_grad_(True) for name, x in leaves.items()}
        outputs = function(backend=backend, **leaves)
        if not cotangents:
            cotangents.extend(torch.randn(y.shape, generator=source.generator) for y in outputs)
        found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        grads = grads_of(outputs, list(leaves.values()), cotangents)
        return found | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}

    wanted = attempt(lambda: run("reference", False))
    found = attempt(lambda: run("native", False))
    if refuse_alike(found, wanted):
        return
    truth = run("reference", True)
    eps = max(torch.finfo(x.dtype).eps for x in inputs.values())
    for name, result in found.items():
        assert_agrees(name, result, wanted[name], truth[name], slack, eps)


def assert_refused(name: str, *arguments: object) -> None:
    """The registered native op raises; nothing else is worth checking once it has not crashed."""
    with pytest.raises((RuntimeError, IndexError)):
        _registry.registered("native", name)(*arguments)


def spoil_one(source: Source, x: Tensor, values: tuple[int, ...] = OUT_OF_RANGE) -> Tensor:
    """A copy of an integer tensor of at least one element, with one element that is out of any range."""
    x = x.clone()
    x.view(-1)[source.draw(st.integers(0, x.numel() - 1), "spoilt place")] = source.draw(
        st.sampled_from(values), "spoilt value"
    )
    return x


def resized(source: Source, x: Tensor) -> Tensor:
    """A tensor like x with one dimension longer or shorter by one, or with a dimension more or less."""
    kind = source.draw(st.sampled_from(["longer", "shorter", "more", "less"]), "spoilt shape")
    axis = source.draw(st.integers(0, x.dim() - 1), "axis")
    shape = list(x.shape)
    if kind == "more":
        return x.new_zeros([*shape, 2])
    if kind == "less" and x.dim() == 1:
        return x.new_zeros(())
    if kind == "less":
        return x.new_zeros(shape[:axis] + shape[axis + 1 :]) if shape[axis] != 1 else x.new_zeros([*shape, 3])
    shape[axis] = shape[axis] + 1 if kind == "longer" or shape[axis] == 0 else shape[axis] - 1
    return x.new_zeros(shape)
