"""Sampling in C++: bits of the noise; the same for any number of threads, every instruction set, any batch around.

What every back end has to fulfil is in test_sampling.py, the ways in which a kernel could be wrong in
test_sampling_kernels.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.bits import assert_same_for_threads, assert_same_on_instruction_sets, needs_native
from tests.ops.places import place
from tests.oracle import DTYPES
from unif2ace.ops import _noise, head_sample, remask, sample_tokens

pytestmark = needs_native


@pytest.mark.parametrize("stream", [0, 1, 2, 3, 2**31 + 5])
def test_noise_bits(stream: int):
    """Logits that are minus the noise give keys of exactly zero: a tie, which code 0 wins, if no number is larger than
    it should be. One code of each row raised by one unit in the last place has to win, unless its number is smaller.
    Together: every number has the right bits."""
    codes = 300
    one = {name: x.repeat_interleave(codes) for name, x in place(6).items()}
    noise = _noise.gumbel_noise(one["seeds"], one["positions"], one["steps"], stream, codes)
    first = {name: x[::codes] for name, x in one.items()}
    tied, _ = sample_tokens(-noise[::codes], **first, stream=stream, backend="native")
    assert not tied.any()
    raised = torch.arange(6 * codes) % codes
    logits = -noise
    row = torch.arange(6 * codes)
    logits[row, raised] = torch.nextafter(logits[row, raised], torch.tensor(math.inf))
    found, _ = sample_tokens(logits, **one, stream=stream, backend="native")
    assert torch.equal(found, raised.int())


def test_same_bits_for_any_number_of_threads():
    logits, hidden, weight = torch.randn(61, 5003), torch.randn(61, 48), torch.randn(1031, 48)
    where = place(61)

    def run() -> list[Tensor]:
        codes, confidence = sample_tokens(logits, **where, backend="native")
        mask = remask(
            confidence,
            torch.tensor([0, 20, 61]),
            torch.tensor([7, 30]),
            where["seeds"][:2],
            where["positions"],
            where["steps"][:2],
            torch.ones(2),
            backend="native",
        )
        return [codes, confidence, mask, head_sample(hidden, weight, None, **where, backend="native")[0]]

    assert_same_for_threads(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sample_of_a_row_ignores_the_batch(dtype: torch.dtype):
    hidden, uncond, weight = torch.randn(9, 33).to(dtype), torch.randn(9, 33).to(dtype), torch.randn(257, 33).to(dtype)
    where = place(9)
    whole = head_sample(hidden, weight, None, **where, uncond_hidden=uncond, guidance=2.0, backend="native")
    for rows in (slice(3, 4), slice(2, 7)):
        part = {name: x[rows] for name, x in where.items()}
        found = head_sample(
            hidden[rows], weight, None, **part, uncond_hidden=uncond[rows], guidance=2.0, backend="native"
        )
        assert torch.equal(found[0], whole[0][rows])
        assert torch.equal(found[1], whole[1][rows])


# Whole numbers and exact fractions: torch's own random normals differ between instruction sets.
ISA_PROGRAM = """
g = torch.Generator().manual_seed(3)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for levels, temperature in ((1, 1.0), (64, 0.3), (4096, 2.0)):
        x, u = (torch.randint(-levels, levels + 1, (2, 50, 2999), generator=g) / 256).to(dtype)
        row = torch.arange(50)
        codes, confidence = ops.sample_tokens(x, row * 2**40 - 7, row, row % 5, temperature=temperature,
                                              uncond_logits=u, guidance=1.5, backend="native")
        digest.update(codes.numpy().tobytes() + confidence.numpy().tobytes())
"""


def test_same_bits_on_every_instruction_set():
    assert_same_on_instruction_sets(ISA_PROGRAM)
