"""rotate_heads: against its definition written out, and every back end against the oracle."""

from __future__ import annotations

import pytest
import torch

from tests.bits import assert_same_for_threads, assert_same_on_instruction_sets, needs_native
from tests.oracle import assert_matches_reference, available_backends, backend_cases, noncontiguous, registered
from unif2ace.errors import UserError
from unif2ace.ops import _registry, rotate_heads

BACKENDS = available_backends("rotary")
# tokens, heads, dim, r
SIZES = {
    "no-token": (0, 2, 8, 2),
    "one": (1, 1, 1, 0),
    "no-rotation": (5, 2, 16, 0),
    "whole-head": (7, 3, 24, 12),
    "primes": (67, 3, 29, 5),
    "model": (130, 6, 32, 8),
}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
CASES = backend_cases("rotary")
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)


def problem(tokens: int, heads: int, dim: int, half: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Differentiable inputs, and the angles."""
    angle = torch.rand(tokens, half) * 6
    inputs = {"x": torch.randn(tokens, heads, dim), "weight": torch.randn(dim), "bias": torch.randn(dim)}
    return inputs, {"cos": angle.cos(), "sin": angle.sin()}


@each_backend
def test_against_the_definition(backend: str):
    inputs, angles = problem(3, 2, 6, 2)
    x = inputs["x"]
    deviation = x - x.mean(-1, keepdim=True)
    n = deviation / (deviation.square().mean(-1, keepdim=True) + 0.1).sqrt() * inputs["weight"] + inputs["bias"]
    expected = n.clone()
    for t in range(3):
        for i in range(2):
            turn = torch.complex(angles["cos"][t, i], angles["sin"][t, i])
            pair = torch.complex(n[t, :, i], n[t, :, 2 + i]) * turn
            expected[t, :, i], expected[t, :, 2 + i] = pair.real, pair.imag
    torch.testing.assert_close(rotate_heads(**inputs, **angles, eps=0.1, backend=backend), expected)


@each_case
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients(backend: str, size: tuple[int, int, int, int], dtype: torch.dtype):
    inputs, angles = problem(*size)
    # Rounded once: the float64 run has to see the same angles.
    angles = {name: angle.to(dtype) for name, angle in angles.items()}

    def run(backend: str, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        turned = {name: angle.to(inputs["x"].dtype) for name, angle in angles.items()}
        return (rotate_heads(**inputs, **turned, backend=backend),)

    assert_matches_reference(run, inputs, dtype, backend)


@each_backend
def test_views_of_one_projection(backend: str):
    inputs, angles = problem(9, 3, 16, 4)
    qkv = torch.randn(9, 3, 3, 16)
    for view in (*qkv.unbind(1), noncontiguous(inputs["x"]), inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)):
        found = rotate_heads(**{**inputs, "x": view}, **angles, backend=backend)
        torch.testing.assert_close(found, rotate_heads(**{**inputs, "x": view.contiguous()}, **angles))


@each_backend
def test_a_token_does_not_depend_on_its_batch(backend: str):
    inputs, angles = problem(200, 2, 32, 8)
    whole = rotate_heads(**inputs, **angles, backend=backend)
    part = {name: x[70:75] if name == "x" else x for name, x in inputs.items()}
    alone = rotate_heads(**part, **{name: angle[70:75] for name, angle in angles.items()}, backend=backend)
    assert torch.equal(alone, whole[70:75])


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_triton_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch):
    """Backward walks over 3 tiles in each of its programs, the last of which has fewer and an incomplete one."""
    kernels = pytest.importorskip("unif2ace.kernels.rotary")
    monkeypatch.setattr(kernels, "_TILE", 256)
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    inputs, angles = problem(19, 3, 32, 8)  # 57 rows, 8 in a tile
    leaves, grad = [x.requires_grad_(True) for x in inputs.values()], torch.randn(19, 3, 32)
    results = []
    for backend in ("triton", "reference"):
        y = rotate_heads(*leaves, **angles, backend=backend)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    torch.testing.assert_close(*results)


@each_backend
def test_without_eps(backend: str):
    """A row of equal numbers is 0 / 0 then; neither it nor what fills a tile up may reach other rows."""
    inputs, angles = problem(5, 2, 8, 3)
    leaves = {name: x.clone().requires_grad_(True) for name, x in inputs.items()}
    y = rotate_heads(**leaves, **angles, eps=0.0, backend=backend)
    assert all(x.isfinite().all() for x in (y, *torch.autograd.grad(y.sum(), list(leaves.values()))))
    inputs["x"][3, 1] = 2.0
    x = inputs.pop("x").requires_grad_(True)
    y = rotate_heads(x, **inputs, **angles, eps=0.0, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().sum() == grad.isfinite().sum() == y.numel() - 8


@needs_native
def test_same_bits_for_any_number_of_threads():
    inputs, angles = problem(530, 3, 40, 7)

    def run() -> list[torch.Tensor]:
        leaves = {name: x.detach().requires_grad_(True) for name, x in inputs.items()}
        y = rotate_heads(**leaves, **angles, backend="native")
        return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    assert_same_for_threads(run)


ISA_PROGRAM = """
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    g = torch.Generator().manual_seed(3)
    def numbers(*shape):
        return (torch.randint(-512, 513, shape, generator=g) / 512).to(dtype).requires_grad_(True)
    for dim, half in ((5, 2), (32, 8), (72, 36)):
        inputs = [numbers(77, 3, dim), numbers(dim), numbers(dim)]
        y = ops.rotate_heads(*inputs, numbers(77, half).detach(), numbers(77, half).detach(), backend="native")
        for result in (y, *torch.autograd.grad(y, inputs, numbers(77, 3, dim))):
            digest.update(result.detach().float().numpy().tobytes())
"""


@needs_native
def test_same_bits_on_every_instruction_set():
    assert_same_on_instruction_sets(ISA_PROGRAM)


@pytest.mark.parametrize("registry", [False, True], ids=["plain", "registered"])
def test_gradcheck(registry: bool):
    inputs, angles = problem(3, 2, 6, 2)
    leaves = [x.double().requires_grad_(True) for x in inputs.values()]
    angles = [angle.double() for angle in angles.values()]

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        return rotate_heads(*leaves, *angles, backend="reference")

    if registry:
        with registered():
            assert torch.autograd.gradcheck(run, leaves)
    else:
        assert torch.autograd.gradcheck(run, leaves)


@each_backend
def test_opcheck(backend: str):
    inputs, angles = problem(5, 2, 8, 3)
    arguments = (*inputs.values(), *angles.values(), 1e-5)
    torch.library.opcheck(_registry.registered(backend, "rotate_heads"), arguments)
    torch.library.opcheck(_registry.registered(backend, "rotate_heads_backward"), (torch.randn(5, 2, 8), *arguments))


@each_backend
def test_compiles_into_one_graph(backend: str):
    inputs, angles = problem(5, 2, 8, 3)
    leaves = {name: x.requires_grad_(True) for name, x in inputs.items()}

    def step(**leaves: torch.Tensor) -> torch.Tensor:
        return rotate_heads(**leaves, **angles, backend=backend).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(**leaves), list(leaves.values()))
    for a, b in zip(torch.autograd.grad(compiled(**leaves), list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": torch.ones(4, 8)}, r"x must be \[T, heads, dim >= 1\] floating point, got \[4, 8\] float32"),
        ({"weight": torch.ones(7)}, r"weight must be \[8\] float32, got \[7\] float32"),
        ({"bias": torch.ones(8).half()}, r"bias must be \[8\] float32, got \[8\] float16"),
        ({"cos": torch.ones(4, 1, 3)}, r"cos must be \[T, r\] float32, got \[4, 1, 3\] float32"),
        ({"sin": torch.ones(4, 2)}, r"sin must be \[4, 3\] float32"),
        ({"cos": torch.ones(4, 5), "sin": torch.ones(4, 5)}, "rotate 10 dimensions, the heads have 8"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, torch.Tensor], sentence: str):
    inputs, angles = problem(4, 2, 8, 3)
    with pytest.raises(UserError, match=sentence):
        rotate_heads(**{**inputs, **angles, **changes})
