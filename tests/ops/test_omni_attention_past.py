"""`omni_attention(..., past=)`: keys of a cache before those of the batch, as if they lay behind each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.ops.attention import num_rows, problem
from tests.oracle import DTYPES, assert_matches_reference, available_backends
from unif2ace.errors import UserError
from unif2ace.ops import _registry, omni_attention
from unif2ace.ops.omni_attention import AttentionBlocks, reference_omni_attention

each_backend = pytest.mark.parametrize("backend", available_backends("omni_attention"))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

PASTS = {  # 14 keys of the batch, 20 of a cache
    "images-behind-texts": ((0, 7, 0, 7, False, 0, 5), (7, 14, 7, 14, False, 9, 12)),
    "nothing-cached": ((0, 5, 0, 5, True, 4, 4), (5, 12, 0, 12, False, 0, 0)),
    "all-cached": ((0, 1, 3, 3, True, 0, 9), (1, 2, 12, 12, False, 2, 20)),
    "causal": ((0, 4, 2, 6, True, 3, 14), (4, 9, 6, 11, True, 17, 17), (9, 10, 0, 12, True, 1, 20)),
}
each_past = pytest.mark.parametrize("blocks", PASTS.values(), ids=PASTS.keys())


def in_one_piece(
    own: Tensor, past: Tensor, blocks: AttentionBlocks
) -> tuple[Tensor, tuple[tuple[int, int, int, int, bool], ...]]:
    """Every block's keys copied behind each other, and blocks over them: the rule for `past` in words."""
    keys, plain = [], []
    for q_start, q_end, k_start, k_end, causal, past_start, past_end in blocks:
        first = sum(map(len, keys))
        keys += [past[past_start:past_end], own[k_start:k_end]]
        plain.append((q_start, q_end, first, sum(map(len, keys)), causal))
    return torch.cat(keys), tuple(plain)


def past_problem(blocks: AttentionBlocks, dim: int) -> dict[str, Tensor]:
    past = dict(zip(("past_k", "past_v"), torch.randn(2, 20, 3, dim), strict=True))
    return problem(num_rows(blocks), 14, dim=dim) | past


@each_dtype
@each_past
@each_backend
@pytest.mark.usefixtures("fast_exponential")
def test_outputs_and_gradients_with_a_past(backend: str, blocks: AttentionBlocks, dtype: torch.dtype):
    def run(backend: str, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        return (omni_attention(q, k, v, blocks, past=(past_k, past_v), backend=backend),)

    assert_matches_reference(run, past_problem(blocks, dim=8), dtype, backend)


@each_dtype
@each_past
@pytest.mark.parametrize("dim", [5, 32])
@each_backend
@pytest.mark.usefixtures("fast_exponential")
def test_keys_of_a_cache_come_before_those_of_the_batch(
    backend: str, dim: int, blocks: AttentionBlocks, dtype: torch.dtype
):
    low = {name: x.to(dtype) for name, x in past_problem(blocks, dim).items()}

    def joined(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        (keys, plain), (values, _) = in_one_piece(k, past_k, blocks), in_one_piece(v, past_v, blocks)
        return reference_omni_attention(q, keys, values, plain, scale=0.3)

    past = low["past_k"], low["past_v"]
    found = omni_attention(low["q"], low["k"], low["v"], blocks, past=past, scale=0.3, backend=backend)
    oracle.assert_close(f"{backend} {dtype}", found, joined(**{n: x.double() for n, x in low.items()}), joined(**low))


@each_past
def test_a_cache_of_any_strides(blocks: AttentionBlocks):
    rows, (past_k, past_v) = num_rows(blocks), torch.randn(2, 20, 3, 32)
    q, k, v = torch.randn(14, 3, 3, 32).unbind(1)
    found = omni_attention(q[:rows], k, v, blocks, past=(past_k, past_v))
    wide = torch.stack([past_k, past_v], dim=2)
    other = omni_attention(q[:rows].clone(), k.clone(), v.clone(), blocks, past=wide.unbind(2))
    assert torch.equal(found, other)


@each_past
@each_backend
def test_opcheck(backend: str, blocks: AttentionBlocks):
    flat = [int(number) for block in blocks for number in block]
    operands = past_problem(blocks, dim=8).values()
    torch.library.opcheck(_registry.registered(backend, "omni_attention_past"), (*operands, flat, 0.3))


@each_backend
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("error:Dynamo")
def test_compiles_into_one_graph(backend: str, gradients: bool):
    blocks = PASTS["causal"]
    inputs = [x.requires_grad_(gradients) for x in past_problem(blocks, dim=8).values()]

    def loss(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        return omni_attention(2 * q, k, v, blocks, past=(past_k, past_v), backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(value, expected)
    if gradients:
        torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


PAST = torch.zeros(3, 2, 8)


@pytest.mark.parametrize(
    ("past", "block", "message"),
    [
        ((PAST, PAST[:2]), (0, 4, 0, 6, False, 1, 3), r"past values must be .*, got \[2, 2, 8\] float32"),
        ((PAST, PAST), (0, 4, 0, 6, False), r"a block is \(q_start, .*, past_end\), got \(0, 4, 0, 6, False\)"),
        (
            (PAST, PAST),
            (0, 4, 0, 6, False, 1, 4),
            r"block \(0, 4, 0, 6, False, 1, 4\) lies outside 4 queries and 6 keys and 3 of the past",
        ),
    ],
)
def test_bad_arguments_are_refused(past: tuple[Tensor, Tensor], block: tuple, message: str):
    with pytest.raises(UserError, match=f"^omni_attention: {message}"):
        omni_attention(torch.zeros(4, 2, 8), torch.zeros(6, 2, 8), torch.zeros(6, 2, 8), (block,), past=past)
