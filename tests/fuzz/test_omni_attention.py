"""Fuzz of `omni_attention`: blocks that tile the queries, overlapping keys, a past, strided heads; spoilt blocks."""

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


def draw_blocks(source: Source, rows: int, keys: int, past: int | None) -> list[tuple]:
    """Blocks in any order that cover every query once, each with enough keys, some of them among `past` rows."""
    cut = source.cut(rows, source.draw(st.integers(1, 4), "blocks"), "queries")
    blocks = []
    for q_start, q_end in itertools.pairwise(cut):
        causal = source.draw(st.booleans(), "causal")
        least, behind = 0 if q_start == q_end else (q_end - q_start if causal else 1), ()
        if past is not None:
            behind = sorted(source.draw(st.tuples(st.integers(0, past), st.integers(0, past)), "past"))
            least = max(0, least - (behind[1] - behind[0]))
        k_start = source.draw(st.integers(0, keys - least), "k_start")
        k_end = source.draw(st.integers(k_start + least, keys), "k_end")
        blocks.append((q_start, q_end, k_start, k_end, causal, *behind))
    return source.draw(st.permutations(blocks), "order")


@fuzz
@given(
    rows=rows_,
    more_keys=st.sampled_from([0, 0, 1, 40]),
    past=st.sampled_from([None, None, 0, 1, 5, 40]),
    heads=heads_,
    dim=dims_,
    dtype=dtypes,
    special=st.booleans(),
    data=st.data(),
)
def test_well_formed(rows, more_keys, past, heads, dim, dtype, special, data):
    source = Source(data)
    keys = rows + more_keys
    blocks = tuple(draw_blocks(source, rows, keys, past))
    inputs = {
        "q": source.floats("q", rows, heads, dim, dtype=dtype, special=special),
        "k": source.floats("k", keys, heads, dim, dtype=dtype, special=special),
        "v": source.floats("v", keys, heads, dim, dtype=dtype),
    }

    if past is not None:
        inputs["past_k"] = source.floats("past_k", past, heads, dim, dtype=dtype, special=special)
        inputs["past_v"] = source.floats("past_v", past, heads, dim, dtype=dtype)

    def run(backend: str, q: Tensor, k: Tensor, v: Tensor, **cached: Tensor) -> tuple[Tensor]:
        return (omni_attention(q, k, v, blocks, past=tuple(cached.values()) or None, backend=backend),)

    compare_runs(run, source, inputs, gradients=False, slack=1e-4)


def spoil_blocks(source: Source, blocks: list[list[int]], rows: int, keys: int) -> list[int]:
    """The numbers of blocks, one of them outside of the tensors, too short of keys, or missing."""
    kind = source.draw(st.sampled_from(["number", "missing", "cut", "twice", "shifted", "no keys"]), "spoilt blocks")
    b = source.draw(st.integers(0, len(blocks) - 1), "block")
    if kind == "missing":
        del blocks[b]
    elif kind == "twice":
        blocks.append(blocks[b])
    elif kind == "shifted":
        start = blocks[b][0] + source.draw(st.sampled_from([-1, 1]), "shift")
        blocks[b][:4] = [start, start + blocks[b][1] - blocks[b][0], 0, keys]
    elif kind == "no keys":
        blocks[b][3], blocks[b][5:] = blocks[b][2], blocks[b][6:] * 2
    elif kind == "number":
        wrong = st.sampled_from([-1, -(2**31), -(2**63), max(rows, keys) + 1, 2**31, 2**63 - 1])
        places = [place for place in range(len(blocks[b])) if place != 4]
        blocks[b][source.draw(st.sampled_from(places), "place")] = source.draw(wrong, "value")
    flat = [number for block in blocks for number in block]
    return flat[:-1] if kind == "cut" else flat


@fuzz
@given(
    rows=rows_.filter(bool),
    more_keys=st.sampled_from([0, 1, 40]),
    heads=heads_.filter(bool),
    dim=dims_,
    past=st.booleans(),
    data=st.data(),
)
def test_malformed(rows, more_keys, heads, dim, past, data):
    source = Source(data)
    keys = rows + more_keys
    arguments = {"q": torch.zeros(rows, heads, dim)}
    arguments |= {name: torch.zeros(keys, heads, dim) for name in ("k", "v")}
    if past:
        arguments |= {name: torch.zeros(3, heads, dim) for name in ("past_k", "past_v")}
    what = source.draw(st.sampled_from(["blocks", "blocks", *arguments]), "spoilt")
    cut = sorted({0, rows, *source.draw(st.lists(st.integers(0, rows), max_size=3), "queries")})
    blocks = [[low, high, low, high, 1, *([1, 3] if past else [])] for low, high in itertools.pairwise(cut)]
    arguments["blocks"] = [number for block in blocks for number in block]
    if what == "blocks":
        arguments["blocks"] = spoil_blocks(source, blocks, rows, keys)
    else:
        arguments[what] = resized(source, arguments[what])
    assert_refused("omni_attention_past" if past else "omni_attention", *arguments.values(), 1.0)
