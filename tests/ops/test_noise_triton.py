"""The noise of Triton kernels, bit by bit: the words and Gumbel numbers of the specification, and bounds that hold.

Under the interpreter this also says that its arithmetic (numpy) rounds every operation on its own, as a GPU does when
told not to fuse.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.test_noise import EDGES
from tests.oracle import available_backends
from unif2ace.ops import _noise

if "triton" not in available_backends("sampling"):
    pytest.skip("Triton kernels cannot run here", allow_module_level=True)

import triton
import triton.language as tl

from unif2ace.kernels import noise

TILE = 1 << 14


@triton.jit
def _store_words(seeds, positions, steps, stream, by_block, by_code, BLOCKS: tl.constexpr):
    """The words of 4 * BLOCKS codes of one row, in both ways."""
    row = tl.program_id(0)
    seed, position, step = tl.load(seeds + row), tl.load(positions + row), tl.load(steps + row)
    block = tl.arange(0, BLOCKS)
    w0, w1, w2, w3 = noise.block_words(seed, position, step, stream, block)
    at = by_block + 4 * (row * BLOCKS + block)
    tl.store(at, w0.to(tl.int64))
    tl.store(at + 1, w1.to(tl.int64))
    tl.store(at + 2, w2.to(tl.int64))
    tl.store(at + 3, w3.to(tl.int64))
    code = tl.arange(0, 4 * BLOCKS)
    tl.store(by_code + 4 * row * BLOCKS + code, noise.word(seed, position, step, stream, code).to(tl.int64))


@triton.jit
def _store_numbers(words, gumbel, bound, log, TILE: tl.constexpr):
    """Gumbel numbers of words, their bounds, and log(word + 1)."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    word = tl.load(words + at).to(tl.uint32)
    tl.store(gumbel + at, noise.gumbel(word))
    tl.store(bound + at, noise.gumbel_bound(word))
    tl.store(log + at, noise.log(word.to(tl.float32) + 1.0))


def numbers(words: Tensor) -> list[Tensor]:
    found = [torch.empty(len(words), dtype=torch.float32) for _ in range(3)]
    _store_numbers[(len(words) // TILE,)](words, *found, TILE=TILE, enable_fp_fusion=False)
    return found


@pytest.mark.parametrize("stream", [0, 3, 2**31 + 5, 2**32 - 1])
def test_words(stream: int):
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 12345678901234567])
    positions, steps = torch.tensor([0, 5, 2**31 - 1, -7, 255]), torch.tensor([3, 0, 17, 2**31 - 1, -1])
    expected = _noise.random_words(seeds, positions, steps, stream, 256)
    found = torch.empty(2, 5, 256, dtype=torch.int64)
    _store_words[(5,)](seeds, positions, steps, stream, *found, BLOCKS=64)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


def test_gumbel_bits():
    words = torch.cat([EDGES, torch.randint(0, 2**32, (1 << 20,))])
    words = words[: len(words) // TILE * TILE]
    gumbel, bound, _ = numbers(words)
    assert torch.equal(gumbel.view(torch.int32), _noise.gumbel_from_words(words).view(torch.int32))
    assert (gumbel <= bound).all()


def test_bounds_fall_as_words_rise():
    words = torch.cat([EDGES, torch.arange(0, 2**32, 2**15)]).sort().values
    words = words[: len(words) // TILE * TILE]
    assert (numbers(words)[1].diff() <= 0).all()


def test_log():
    words = torch.randint(0, 2**32, (TILE,)) >> torch.randint(0, 32, (TILE,))
    words[0] = 0
    found = numbers(words)[2]
    assert found[0] == 0.0
    torch.testing.assert_close(found, (words.float() + 1).double().log().float(), rtol=2.5e-7, atol=1e-7)
