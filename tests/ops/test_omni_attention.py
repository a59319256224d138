"""Omni-attention: both back ends against a mask over the whole batch, gradients, caches, bits.

Keys of a cache beside those of the batch are in test_omni_attention_past.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.shapes import ATTENTION_SMALL, AttentionShape
from tests.bits import assert_same_for_threads, assert_same_on_instruction_sets, needs_native
from tests.ops.attention import LAYOUTS, any_partition, each_layout, generation, num_rows, problem, with_one_mask
from tests.oracle import DTYPES, assert_matches_reference, available_backends, noncontiguous
from unif2ace.errors import UserError
from unif2ace.ops import _registry, omni_attention
from unif2ace.ops.omni_attention import AttentionBlocks, reference_omni_attention

BACKENDS = available_backends("omni_attention")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_layout
def test_reference_is_the_masked_attention(blocks: AttentionBlocks):
    rows = num_rows(blocks)
    inputs = problem(rows, rows, dtype=torch.float64)
    found = omni_attention(**inputs, blocks=blocks, backend="reference")
    torch.testing.assert_close(found, with_one_mask(**inputs, blocks=blocks, scale=8**-0.5))


@each_dtype
@each_layout
@each_backend
@pytest.mark.usefixtures("fast_exponential")
def test_outputs_and_gradients(backend: str, blocks: AttentionBlocks, dtype: torch.dtype):
    rows = num_rows(blocks)

    def run(backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        return (omni_attention(**inputs, blocks=blocks, scale=0.3, backend=backend),)

    assert_matches_reference(run, problem(rows, rows), dtype, backend)


@each_layout
@each_backend
def test_eager_gradients(backend: str, blocks: AttentionBlocks):
    """The eager path keeps the graphs of its calls; the oracle above goes through the registered ops."""
    rows = num_rows(blocks)
    leaves = {name: x.requires_grad_(True) for name, x in problem(rows, rows).items()}
    cotangent = torch.randn(rows, 3, 8)
    found = omni_attention(**leaves, blocks=blocks, backend=backend)
    wanted = reference_omni_attention(**leaves, blocks=blocks, scale=8**-0.5)
    torch.testing.assert_close(found, wanted)
    inputs = list(leaves.values())
    first = torch.autograd.grad(found, inputs, cotangent, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(wanted, inputs, cotangent))
    again = torch.autograd.grad(found, inputs, cotangent)  # a second time through the same graph
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@each_backend
def test_no_row_and_one_row(backend: str):
    empty = {name: x.requires_grad_(True) for name, x in problem(0, 0).items()}
    omni_attention(**empty, blocks=(), backend=backend).sum().backward()
    assert empty["q"].grad.shape == (0, 3, 8)
    one = {name: x.requires_grad_(True) for name, x in problem(1, 1).items()}
    found = omni_attention(**one, blocks=((0, 1, 0, 1, True),), backend=backend)
    found.sum().backward()
    torch.testing.assert_close(found, one["v"])
    torch.testing.assert_close(one["v"].grad, torch.ones(1, 3, 8))
    torch.testing.assert_close(one["q"].grad, torch.zeros(1, 3, 8), atol=2e-6, rtol=0)  # one key: nothing to choose


@pytest.mark.parametrize("shape", ATTENTION_SMALL.values(), ids=ATTENTION_SMALL.keys())
@each_backend
def test_named_shapes(backend: str, shape: AttentionShape):
    blocks = generation([shape.text] * shape.sequences, shape.image)
    inputs = problem(num_rows(blocks), num_rows(blocks), shape.heads, shape.head_dim)
    found = omni_attention(**inputs, blocks=blocks, backend=backend)
    wanted = with_one_mask(**inputs, blocks=blocks, scale=shape.head_dim**-0.5)
    torch.testing.assert_close(found, wanted)


@each_backend
@pytest.mark.parametrize("lengths", [[9, 9, 9], [4, 9, 6]], ids=["equal", "ragged"])
@pytest.mark.parametrize("rows", [1, 3])
def test_cached_keys(backend: str, rows: int, lengths: list[int]):
    """Image rows (full) and new text rows (causal) against a flattened [B * L_max] cache."""
    longest = 12
    inputs = problem(rows * 3, 3 * longest)
    for causal in (False, True):
        blocks = tuple(
            (b * rows, (b + 1) * rows, b * longest, b * longest + length, causal) for b, length in enumerate(lengths)
        )
        found = omni_attention(**inputs, blocks=blocks, backend=backend)
        torch.testing.assert_close(found, with_one_mask(**inputs, blocks=blocks, scale=8**-0.5))


@each_backend
def test_keys_in_no_block_get_zero_gradients(backend: str):
    inputs = {name: x.requires_grad_(True) for name, x in problem(4, 20).items()}
    omni_attention(**inputs, blocks=((0, 2, 5, 9, False), (2, 4, 12, 16, False)), backend=backend).sum().backward()
    unseen = [*range(5), *range(9, 12), *range(16, 20)]
    assert not inputs["k"].grad[unseen].any()
    assert not inputs["v"].grad[unseen].any()
    assert inputs["v"].grad[5:9].all()


@each_backend
def test_strided_views_of_one_projection(backend: str):
    blocks = LAYOUTS["equal-texts"]
    qkv = torch.randn(num_rows(blocks), 3, 3, 8, requires_grad=True)
    found = omni_attention(*qkv.unbind(1), blocks, backend=backend)
    wanted = omni_attention(*(x.clone() for x in qkv.unbind(1)), blocks, backend="reference")
    torch.testing.assert_close(found, wanted)
    cotangent = noncontiguous(torch.randn_like(found))
    torch.testing.assert_close(torch.autograd.grad(found, qkv, cotangent), torch.autograd.grad(wanted, qkv, cotangent))
    for x in (noncontiguous(qkv.detach()), qkv.detach()[:, :, :1].expand(-1, -1, 3, -1)):
        torch.testing.assert_close(
            omni_attention(*x.unbind(1), blocks, backend=backend),
            omni_attention(*x.contiguous().unbind(1), blocks, backend=backend),
        )


@each_backend
def test_a_sequence_does_not_depend_on_its_neighbours(backend: str):
    blocks = generation([5, 8, 5], 7)
    inputs = problem(39, 39)
    whole = omni_attention(**inputs, blocks=blocks, backend=backend)
    alone = omni_attention(*(x[12:27] for x in inputs.values()), generation([8], 7), backend=backend)
    assert torch.equal(alone, whole[12:27])


@pytest.mark.gpu
@each_dtype
def test_backward_of_many_keys_adds_in_a_fixed_order(dtype: torch.dtype):
    blocks = generation([40, 70, 40], 700)
    inputs = {name: x.to(dtype).requires_grad_(True) for name, x in problem(num_rows(blocks), num_rows(blocks)).items()}

    def gradients() -> tuple[Tensor, ...]:
        y = omni_attention(**inputs, blocks=blocks, backend="native")
        return torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))

    first = gradients()
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(gradients(), first, strict=True))


@given(st.data())
def test_any_partition_of_the_rows(data: st.DataObject):
    blocks = any_partition(data, keys=15)
    inputs = problem(num_rows(blocks), 15, heads=2, dim=4)
    wanted = with_one_mask(**inputs, blocks=tuple(blocks), scale=0.5)
    for backend in BACKENDS:
        found = omni_attention(**inputs, blocks=tuple(data.draw(st.permutations(blocks))), backend=backend)
        torch.testing.assert_close(found, wanted)


ISA_PROGRAM = """
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    g = torch.Generator().manual_seed(3)
    def numbers(*shape):
        return (torch.randint(-512, 513, shape, generator=g) / 256).to(dtype)
    for dim in (5, 32, 80):
        q, k, v = numbers(190, 3, dim), numbers(400, 3, dim), numbers(400, 3, dim)
        blocks = ((0, 1, 0, 300, True), (1, 100, 100, 400, False), (100, 190, 37, 140, True))
        digest.update(ops.omni_attention(q, k, v, blocks, backend="native").float().numpy().tobytes())
"""


@needs_native
def test_same_bits_on_every_instruction_set():
    assert_same_on_instruction_sets(ISA_PROGRAM)


@needs_native
def test_same_bits_for_any_number_of_threads():
    inputs = problem(66, 66)
    blocks = ((0, 10, 0, 10, True), (10, 50, 0, 50, False), (50, 66, 40, 66, True))
    assert_same_for_threads(lambda: [omni_attention(**inputs, blocks=blocks, backend="native")])


def test_float64_runs_the_reference_automatically():
    inputs = problem(10, 10, dtype=torch.float64)
    blocks = generation([4], 6)
    found = omni_attention(**inputs, blocks=blocks)
    assert torch.equal(found, omni_attention(**inputs, blocks=blocks, backend="reference"))


@pytest.mark.parametrize("blocks", [LAYOUTS["understanding"], LAYOUTS["shared-keys"]], ids=["understanding", "shared"])
def test_gradcheck(blocks: AttentionBlocks):
    rows = num_rows(blocks)
    inputs = [x.requires_grad_(True) for x in problem(rows, rows, 1, 2, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *x: omni_attention(*x, blocks), inputs)


@each_backend
def test_opcheck(backend: str):
    blocks = LAYOUTS["understanding"]
    rows = num_rows(blocks)
    tensors = problem(rows, rows).values()
    flat = [int(number) for block in blocks for number in block]
    torch.library.opcheck(_registry.registered(backend, "omni_attention"), (*tensors, flat, 0.3))
    arguments = (torch.randn(rows, 3, 8), *tensors, flat, 0.3)
    torch.library.opcheck(_registry.registered(backend, "omni_attention_backward"), arguments)


@each_backend
def test_compiles_into_one_graph(backend: str):
    blocks = LAYOUTS["ragged-texts"]
    rows = num_rows(blocks)
    inputs = [x.requires_grad_(True) for x in problem(rows, rows).values()]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return omni_attention(2 * q, k, v, blocks, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 2)}, r"q must be \[T, heads, dim >= 1\] floating point, got \[4, 2\] float32"),
        ({"q": torch.zeros(4, 2, 0)}, r"q must be \[T, heads, dim >= 1\] floating point, got \[4, 2, 0\] float32"),
        ({"k": torch.zeros(6, 2, 4)}, r"k must be \[S, 2, 8\] float32, the same for k and v, got \[6, 2, 4\] float32"),
        ({"v": torch.zeros(5, 2, 8)}, r"v must be \[S, 2, 8\] float32, the same for k and v, got \[5, 2, 8\] float32"),
        ({"v": torch.zeros(6, 2, 8).half()}, r"v must be .*, got \[6, 2, 8\] float16"),
        ({"blocks": ((0, 3, 0, 6, False),)}, "query row 3 is in no block"),
        ({"blocks": ((0, 1, 0, 6, False), (2, 4, 0, 6, False))}, "query row 1 is in no block"),
        ({"blocks": ((0, 3, 0, 6, False), (2, 4, 0, 6, False))}, "query row 2 is in two blocks"),
        ({"blocks": ((0, 5, 0, 6, False),)}, r"block \(0, 5, 0, 6, False\) lies outside 4 queries and 6 keys"),
        ({"blocks": ((0, 4, 0, 7, False),)}, r"block \(0, 4, 0, 7, False\) lies outside 4 queries and 6 keys"),
        ({"blocks": ((0, 4, -1, 6, False),)}, "block .* lies outside"),
        ({"blocks": ((0, 4, 2, 2, False),)}, "block .* has 0 keys for 4 queries, too few"),
        ({"blocks": ((0, 4, 0, 3, True),)}, "block .* has 3 keys for 4 queries, too few"),
        ({"blocks": ((0, 4, 0, 6),)}, r"a block is \(q_start, q_end, k_start, k_end, causal\), got \(0, 4, 0, 6\)"),
        ({"backend": "flash"}, "unknown back end 'flash'"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], message: str):
    arguments = {"q": torch.zeros(4, 2, 8), "k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 8)}
    arguments |= {"blocks": ((0, 4, 0, 6, False),), **changes}
    with pytest.raises(UserError, match=f"^omni_attention: {message}"):
        omni_attention(**arguments)
