"""Fuzz of `omni_attention`: blocks that tile the queries, overlapping keys, strided heads; spoilt blocks refused."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.strategies import Source, assert_refused, compare_runs, dtypes, fuzz, marks, resized
from unif2ace.ops import omni_attention

pytestmark = marks("omni_attention")

rows_ = st.sampled_from([0, 1, 2, 7, 8, 9, 16, 17, 33, 66, 130])
dims_ = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 32, 48, 65])
heads_ = st.integers(0, 3)


def draw_blocks(source: Source, rows: int, keys: int) -> list[tuple[int, int, int, int, bool]]:
    """Blocks in any order that cover every query once, each with enough keys."""
    cut = source.cut(rows, source.draw(st.integers(1, 4), "blocks"), "queries")
    blocks = []
    for q_start, q_end in itertools.pairwise(cut):
        causal = source.draw(st.booleans(), "causal")
        least = 0 if q_start == q_end else (q_end - q_start if causal else 1)
        k_start = source.draw(st.integers(0, keys - least), "k_start")
        k_end = source.draw(st.integers(k_start + least, keys), "k_end")
        blocks.append((q_start, q_end, k_start, k_end, causal))
    return source.draw(st.permutations(blocks), "order")


@fuzz
@given(
    rows=rows_,
    more_keys=st.sampled_from([0, 0, 1, 40]),
    heads=heads_,
    dim=dims_,
    dtype=dtypes,
    special=st.booleans(),
    data=st.data(),
)
def test_well_formed(rows, more_keys, heads, dim, dtype, special, data):
    source = Source(data)
    keys = rows + more_keys
    blocks = tuple(draw_blocks(source, rows, keys))
    inputs = {
        "q": source.floats("q", rows, heads, dim, dtype=dtype, special=special),
        "k": source.floats("k", keys, heads, dim, dtype=dtype, special=special),
        "v": source.floats("v", keys, heads, dim, dtype=dtype),
    }

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        return (omni_attention(**tensors, blocks=blocks, backend=backend),)

    compare_runs(run, source, inputs, gradients=False, slack=1e-4)


def spoil_blocks(source: Source, blocks: list[list[int]], rows: int, keys: int) -> list[int]:
    """The numbers of blocks, one of them outside of the tensors, too short of keys, or missing."""
    kind = source.draw(st.sampled_from(["number", "missing", "cut", "twice", "no keys"]), "spoilt blocks")
    b = source.draw(st.integers(0, len(blocks) - 1), "block")
    if kind == "missing":
        del blocks[b]
    elif kind == "twice":
        blocks.append(blocks[b])
    elif kind == "no keys":
        blocks[b][3] = blocks[b][2]
    elif kind == "number":
        wrong = st.sampled_from([-1, -(2**31), -(2**63), max(rows, keys) + 1, 2**31, 2**63 - 1])
        blocks[b][source.draw(st.integers(0, 3), "place")] = source.draw(wrong, "value")
    flat = [number for block in blocks for number in block]
    return flat[:-1] if kind == "cut" else flat


@fuzz
@given(
    rows=rows_.filter(bool),
    more_keys=st.sampled_from([0, 1, 40]),
    heads=heads_.filter(bool),
    dim=dims_,
    what=st.sampled_from(["blocks", "blocks", "q", "k", "v"]),
    data=st.data(),
)
def test_malformed(rows, more_keys, heads, dim, what, data):
    source = Source(data)
    keys = rows + more_keys
    arguments = {"q": torch.zeros(rows, heads, dim)}
    arguments |= {name: torch.zeros(keys, heads, dim) for name in ("k", "v")}
    cut = sorted({0, rows, *source.draw(st.lists(st.integers(0, rows), max_size=3), "queries")})
    blocks = [[low, high, low, high, 1] for low, high in itertools.pairwise(cut)]
    arguments["blocks"] = [number for block in blocks for number in block]
    if what == "blocks":
        arguments["blocks"] = spoil_blocks(source, blocks, rows, keys)
    else:
        arguments[what] = resized(source, arguments[what])
    assert_refused("omni_attention", *arguments.values(), 1.0)
