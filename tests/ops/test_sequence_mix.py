"""mix_sequences: against its definition row by row, and every back end against the oracle.

Features that sequences share are in test_sequence_mix_shared.py, 16-bit numbers in test_sequence_mix_rounding.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shapes import SEQUENCE_MIX_SMALL, MixShape
from tests.bits import assert_same_for_threads, assert_same_on_instruction_sets, needs_native
from tests.ops.mixes import Tensors, mix_row_by_row, problem, run_mix
from tests.oracle import assert_matches_reference, available_backends, backend_cases, noncontiguous, registered
from unif2ace.errors import UserError
from unif2ace.ops import _registry, mix_sequences

BACKENDS = available_backends("sequence_mix")

each_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
each_kernel = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
each_shape = pytest.mark.parametrize("shape", SEQUENCE_MIX_SMALL.values(), ids=SEQUENCE_MIX_SMALL.keys())
CASES = backend_cases("sequence_mix")
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
each_form = pytest.mark.parametrize("full", [True, False], ids=["residual", "plain"])


@pytest.mark.parametrize("spare", [0, 2])
@each_form
@each_shape
@each_backend
def test_against_the_definition(backend: str, shape: MixShape, full: bool, spare: int):
    tensors, offsets = problem(shape, full, spare)
    torch.testing.assert_close(run_mix(tensors, offsets, backend), mix_row_by_row(tensors, offsets))


@each_form
@each_shape
@each_case
def test_values_and_gradients(backend: str, shape: MixShape, full: bool, dtype: torch.dtype):
    tensors, offsets = problem(shape, full, spare=1)

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (run_mix(tensors, offsets, backend),)

    assert_matches_reference(run, tensors, dtype, backend)
    assert_matches_reference(run, tensors, dtype, backend, keep=("scale", "coefficients", "layer_scale"))


@each_backend
def test_a_sequence_does_not_depend_on_its_batch(backend: str):
    tensors, offsets = problem(MixShape((5, 9, 3), 16, 2))
    part = {name: slice(5, 14) if name in ("x", "s0", "s1", "residual") else slice(1, 2) for name in tensors}
    part["layer_scale"] = ...
    alone = {name: x[part[name]].clone().requires_grad_(True) for name, x in tensors.items()}
    whole = {name: x.requires_grad_(True) for name, x in tensors.items()}
    found, expected = run_mix(alone, torch.tensor([0, 9]), backend), run_mix(whole, offsets, backend)
    assert torch.equal(found, expected[5:14])
    del alone["layer_scale"]  # its gradient is a sum over the batch
    cotangent = torch.randn(17, 16)
    grads = torch.autograd.grad(found, list(alone.values()), cotangent[5:14])
    wholes = torch.autograd.grad(expected, [whole[name] for name in alone], cotangent)
    for name, grad, of_whole in zip(alone, grads, wholes, strict=True):
        assert torch.equal(grad, of_whole[part[name]]), name


@each_backend
def test_rows_wider_than_a_tile(backend: str):
    tensors, offsets = problem(MixShape((2, 0, 3), 2 * 2048 + 3, 1))
    results = []
    for name in (backend, "reference"):
        leaves = {name: x.detach().requires_grad_(True) for name, x in tensors.items()}
        result = run_mix(leaves, offsets, name)
        results.append([result, *torch.autograd.grad(result.square().sum(), list(leaves.values()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_backend
def test_noncontiguous_inputs(backend: str):
    tensors, offsets = problem(SEQUENCE_MIX_SMALL["ragged"])
    strided = {name: noncontiguous(x) if x.dim() else x for name, x in tensors.items()}
    torch.testing.assert_close(run_mix(strided, offsets, backend), run_mix(tensors, offsets, backend))


@each_backend
def test_factors_of_any_dtype(backend: str):
    tensors, offsets = problem(SEQUENCE_MIX_SMALL["ragged"])
    tensors["scale"] = tensors["scale"].double()
    tensors["coefficients"] = noncontiguous(tensors["coefficients"].bfloat16())
    tensors["layer_scale"] = tensors["layer_scale"].half().reshape(1, 1)
    results = []
    for name in (backend, "reference"):
        leaves = {name: x.detach().requires_grad_(True) for name, x in tensors.items()}
        result = run_mix(leaves, offsets, name)
        result.sum().backward()  # its gradient is one expanded number
        results.append([result, *(leaf.grad for leaf in leaves.values())])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-5)  # one step of bfloat16


@pytest.mark.parametrize("full", [True, False])
@each_kernel
def test_rows_in_no_sequence_count_for_nothing(backend: str, full: bool):
    tensors, offsets = problem(MixShape((2, 3), 21, 2), full, spare=2)
    for name in ("x", "s0", "s1"):
        tensors[name][5:] = torch.nan
    result = run_mix(tensors, offsets, backend)
    expected = tensors["residual"][5:] if full else torch.zeros(2, 21)
    assert torch.equal(result[5:], expected)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    result = run_mix(tensors, offsets, backend)
    result.sum().backward()
    assert all(not tensors[name].grad[5:].any() for name in ("x", "s0", "s1"))
    assert all(tensors[name].grad.isfinite().all() for name in ("scale", "coefficients", "layer_scale")[: 2 + full])


@needs_native
@pytest.mark.parametrize("offsets", [[1, 2, 5], [0, 4, 3], [0, 2, 6], [0, -1, 5]])
def test_bad_row_offsets_are_refused(offsets: list[int]):
    tensors, _ = problem(MixShape((2, 3), 4, 1))
    message = "^mix_sequences: row_offsets must not decrease, from 0 to at most 5 rows$"
    with pytest.raises(UserError, match=message):
        run_mix(tensors, torch.tensor(offsets), "native")


@needs_triton
@pytest.mark.parametrize("offsets", [[1, 2, 5], [0, 4, 3], [0, 2, 2**30], [0, -(2**31), 2**31 - 1]])
def test_bad_row_offsets_harm_nobody_where_values_are_unknown(offsets: list[int]):
    """A launcher for GPUs cannot look at them; the kernels address nothing outside of the tensors."""
    tensors, _ = problem(MixShape((2, 3), 4, 1))
    leaves = {name: x.requires_grad_(True) for name, x in tensors.items()}
    result = run_mix(leaves, torch.tensor(offsets, dtype=torch.int32), "triton")
    grads = torch.autograd.grad(result.sum(), list(leaves.values()))
    assert all(x.isfinite().all() for x in (result, *grads))


@needs_native
def test_same_bits_for_any_number_of_threads():
    tensors, offsets = problem(MixShape((300, 0, 77, 513), 130, 2), spare=3)

    def run() -> list[torch.Tensor]:
        leaves = {name: x.detach().requires_grad_(True) for name, x in tensors.items()}
        result = run_mix(leaves, offsets, "native")
        return [result, *torch.autograd.grad(result.square().sum(), list(leaves.values()))]

    assert_same_for_threads(run)


ISA_PROGRAM = """
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    g = torch.Generator().manual_seed(3)
    def numbers(*shape):
        return (torch.randint(-4096, 4097, shape, generator=g) / 512).to(dtype).requires_grad_(True)
    offsets = torch.tensor([0, 5, 5, 37])
    for hidden in (3, 16, 77):
        x, residual, first, second = (numbers(40, hidden) for _ in range(4))
        scale, coefficients, layer_scale = numbers(3), numbers(3, 2), numbers(1)
        y = ops.mix_sequences(x, scale, [first, second], coefficients, offsets, residual, layer_scale, backend="native")
        grads = torch.autograd.grad(y, [x, first, second, scale, coefficients, layer_scale], numbers(40, hidden))
        for result in (y, *grads):
            digest.update(result.detach().float().numpy().tobytes())
"""


@needs_native
def test_same_bits_on_every_instruction_set():
    assert_same_on_instruction_sets(ISA_PROGRAM)


@given(lengths=st.lists(st.integers(0, 9), max_size=5), hidden=st.integers(1, 19), features=st.integers(0, 3))
def test_any_size(lengths: list[int], hidden: int, features: int):
    tensors, offsets = problem(MixShape(tuple(lengths), hidden, features))
    for backend in BACKENDS:
        torch.testing.assert_close(run_mix(tensors, offsets, backend), mix_row_by_row(tensors, offsets))


@pytest.mark.parametrize("registry", [False, True], ids=["plain", "registered"])
def test_gradcheck(registry: bool):
    tensors, offsets = problem(MixShape((2, 0, 1), 3, 2), spare=1)
    tensors = {name: x.double().requires_grad_(True) for name, x in tensors.items()}

    def run(*values: torch.Tensor) -> torch.Tensor:
        return run_mix(dict(zip(tensors, values, strict=True)), offsets, "reference")

    if registry:
        with registered():
            assert torch.autograd.gradcheck(run, tuple(tensors.values()))
    else:
        assert torch.autograd.gradcheck(run, tuple(tensors.values()))
        assert torch.autograd.gradgradcheck(run, tuple(tensors.values()))


@each_form
@each_backend
def test_opcheck(backend: str, full: bool):
    t, offsets = problem(SEQUENCE_MIX_SMALL["ragged"], full)
    features = [t["s0"], t["s1"], t["s2"]]
    head = (t["x"], t["scale"], features, t["coefficients"], offsets)
    op = _registry.registered(backend, "mix_sequences")
    torch.library.opcheck(op, (*head, t.get("residual"), t.get("layer_scale"), None))
    starts = torch.zeros(len(t["scale"]), dtype=torch.int32)
    torch.library.opcheck(op, (*head, t.get("residual"), t.get("layer_scale"), starts))
    grad = torch.randn_like(t["x"])
    torch.library.opcheck(_registry.registered(backend, "mix_sequences_backward"), (grad, *head, t.get("layer_scale")))


@each_backend
def test_compiles_into_one_graph(backend: str):
    tensors, offsets = problem(SEQUENCE_MIX_SMALL["ragged"])
    tensors = {name: x.requires_grad_(True) for name, x in tensors.items()}

    def loss(tensors: Tensors) -> torch.Tensor:
        return run_mix(tensors, offsets, backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(tensors), list(tensors.values()))
    expected = torch.autograd.grad(loss(tensors), list(tensors.values()))
    for name, grad, want in zip(tensors, found, expected, strict=True):
        torch.testing.assert_close(grad, want, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tensors), loss(tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4)}, r"x must be \[R, H\] floating point, got \[4\] float32"),
        ({"scale": torch.zeros(2, 1)}, r"scale must be \[B\] floating point, got \[2, 1\] float32"),
        ({"coefficients": torch.zeros(2, 2)}, r"coefficients must be \[2, 1\] floating point .*, got \[2, 2\]"),
        ({"row_offsets": torch.zeros(3)}, r"row_offsets must be \[3\] integer, got \[3\] float32"),
        ({"row_offsets": torch.zeros(2, dtype=torch.int32)}, r"row_offsets must be \[3\] integer, got \[2\] int32"),
        ({"features": [torch.zeros(3, 4)]}, r"features\[0\] must be like x, \[5, 4\] float32, got \[3, 4\] float32"),
        ({"residual": torch.zeros(5, 4).half()}, "residual must be like x"),
        ({"layer_scale": torch.zeros(4)}, "layer_scale must be one floating point number"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], message: str):
    tensors, offsets = problem(MixShape((2, 3), 4, 1))
    arguments = {"features": [tensors.pop("s0")], "row_offsets": offsets, **tensors, **changes}
    with pytest.raises(UserError, match=f"mix_sequences: {message}"):
        mix_sequences(**arguments)
