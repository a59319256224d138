"""linear: every back end against the oracle, and the library behind `native` on the sizes where it changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.oracle import DTYPES, assert_matches_reference, available_backends, noncontiguous, registered
from unif2ace.errors import UserError
from unif2ace.model.linear import Linear
from unif2ace.ops import _registry, linear, linear_gelu, use_backend
from unif2ace.ops.linear import INVARIANT_ROWS

BACKENDS = available_backends("linear")
SIZES = {"no-row": (0, 5, 3), "one": (1, 1, 1), "few": (7, 29, 37), "edge": (16, 32, 48), "many": (61, 64, 33)}

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def problem(rows: int, width: int, columns: int, bias: bool = True) -> dict[str, torch.Tensor]:
    tensors = {"x": torch.randn(rows, width), "weight": torch.randn(columns, width)}
    return {**tensors, "bias": torch.randn(columns)} if bias else tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@each_backend
def test_values_and_gradients(backend: str, size: tuple[int, int, int], bias: bool, dtype: torch.dtype):
    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (linear(**tensors, backend=backend),)

    assert_matches_reference(run, problem(*size, bias), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@each_backend
def test_gelu_of_the_product(backend: str, size: tuple[int, int, int], dtype: torch.dtype):
    """With gradients, and without: by native that is another path."""

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        with torch.no_grad():
            plain = linear_gelu(**tensors, backend=backend)
        return plain.requires_grad_(True), linear_gelu(**tensors, backend=backend)

    assert_matches_reference(run, problem(*size), dtype, backend)


@each_backend
def test_leading_dimensions_and_strides(backend: str):
    x, weight, bias = problem(24, 10, 6).values()
    gelu = linear_gelu(x.view(2, 3, 4, 10), weight, bias, backend=backend)
    torch.testing.assert_close(gelu.view(24, 6), F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x.view(2, 3, 4, 10), weight, bias, backend=backend), expected.view(2, 3, 4, 6))
    torch.testing.assert_close(linear(x[0], weight, bias, backend=backend), expected[0])
    strided = linear(noncontiguous(x), noncontiguous(weight), noncontiguous(bias), backend=backend)
    torch.testing.assert_close(strided, expected)


@pytest.mark.parametrize("product", [linear, linear_gelu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_rows_do_not_depend_on_their_number(product: Callable, dtype: torch.dtype, threads: int):
    """One library does all the work, row by row in one order, wherever the row stands; in 16 bits from 16 rows on."""
    if "native" not in BACKENDS:
        pytest.skip("a promise of the back end native")
    x, weight, bias = (tensor.to(dtype) for tensor in problem(300, 96, 73).values())
    whole, before = product(x, weight, bias, backend="native"), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        few = range(1, INVARIANT_ROWS) if dtype == torch.float32 else ()
        for rows in (*few, INVARIANT_ROWS, 17, 31, 64, 100, 255):
            for first in (0, 1, 300 - rows):
                part = product(x[first : first + rows], weight, bias, backend="native")
                assert torch.equal(part, whole[first : first + rows]), (rows, first)
    finally:
        torch.set_num_threads(before)


def test_the_reference_is_no_fallback_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNIF2ACE_STRICT", "1")
    assert _registry._resolve("linear", "auto", "cuda", (torch.float32,)) == "reference"


@pytest.mark.parametrize("registry", [False, True], ids=["plain", "registered"])
def test_gradcheck(registry: bool):
    tensors = [x.double().requires_grad_(True) for x in problem(3, 4, 2).values()]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return linear(*tensors, backend="reference")

    if registry:
        with registered():
            assert torch.autograd.gradcheck(run, tensors)
    else:
        assert torch.autograd.gradcheck(run, tensors)


@each_backend
def test_opcheck(backend: str):
    x, weight, bias = problem(7, 5, 3).values()
    torch.library.opcheck(_registry.registered(backend, "linear"), (x, weight, bias))
    torch.library.opcheck(_registry.registered(backend, "linear"), (x, weight, None))
    torch.library.opcheck(_registry.registered(backend, "linear_gelu"), (x, weight, bias))
    torch.library.opcheck(_registry.registered(backend, "linear_backward"), (torch.randn(7, 3), x, weight))


@each_backend
def test_compiles_whole(backend: str):
    module = Linear(6, 4)
    x = torch.randn(2, 9, 6, requires_grad=True)
    with use_backend(backend):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), F.linear(x, module.weight, module.bias))
        (grad,) = torch.autograd.grad(compiled(x).square().sum(), [x])
        (expected,) = torch.autograd.grad(F.linear(x, module.weight, module.bias).square().sum(), [x])
        torch.testing.assert_close(grad, expected)


def test_autocast_decides_the_dtype():
    module = Linear(8, 4)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert module(torch.randn(3, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.ones(3, 4, dtype=torch.int32), torch.ones(2, 4)), r"x must be \[..., K\] floating point"),
        ((torch.ones(3, 4), torch.ones(2, 5)), r"weight must be \[N, 4\] float32, got \[2, 5\] float32"),
        ((torch.ones(3, 4), torch.ones(2, 4).half()), r"weight must be \[N, 4\] float32, got \[2, 4\] float16"),
        ((torch.ones(3, 4), torch.ones(2, 4), torch.ones(3)), r"bias must be \[2\] float32, got \[3\] float32"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[torch.Tensor, ...], sentence: str):
    with pytest.raises(UserError, match=sentence):
        linear(*arguments)
