"""Sampling in C++: noise bits, exactness of the skipped noise, and independence of threads and instruction sets.

What every back end has to fulfil is in test_sampling.py; here are the ways in which this kernel could be wrong.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.bits import assert_same_for_threads, assert_same_on_instruction_sets, needs_native
from tests.oracle import DTYPES
from unif2ace.ops import _noise, head_sample, remask, sample_tokens
from unif2ace.ops.sampling import reference_sample_tokens

pytestmark = needs_native


def place(rows: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    return {
        "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "positions": torch.arange(rows) * 65537 - 5,
        "steps": torch.arange(rows, dtype=torch.int32) % 7 - 1,
    }


def assert_same_tokens(logits: Tensor, where: dict[str, Tensor], temperature: float = 1.0, stream: int = 0) -> None:
    expected = reference_sample_tokens(logits, **where, temperature=temperature, stream=stream)
    found = sample_tokens(logits, **where, temperature=temperature, stream=stream, backend="native")
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


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


@given(
    columns=st.sampled_from([1, 3, 4, 127, 128, 129, 1023, 1024, 1025, 3000]),
    kind=st.sampled_from(
        ["flat", "few levels", "normal", "steep", "huge", "forbidden", "rising", "falling", "against"]
    ),
    temperature=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e-30, 1e30]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_skipping_noise_never_changes_a_token(
    columns: int, kind: str, temperature: float, dtype: torch.dtype, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    where = place(4, generator)
    x = torch.randn(4, columns, generator=generator)
    if kind == "flat":
        x = torch.full_like(x, 0.1)
    elif kind == "few levels":
        x = x.round()
    elif kind == "steep":
        x = 20 * x
    elif kind == "huge":
        x = (x.round() * 1e30).clamp(-3e38, 3e38) if dtype != torch.float16 else x.round() * 2e4
    elif kind == "forbidden":
        x[torch.rand(x.shape, generator=generator) < 0.9] = -math.inf
        x[:, -1] = 0.0
    elif kind in ("rising", "falling"):
        x = torch.linspace(-30, 30, columns).expand(4, -1).clone() * (1 if kind == "rising" else -1)
    elif kind == "against":  # every key the same up to rounding: the bounds cannot exclude anything by much
        x = -_noise.gumbel_noise(**where, stream=0, num_codes=columns) * max(temperature, 1e-3)
    assert_same_tokens(x.to(dtype), where, temperature)


def test_equal_keys_go_to_the_lowest_code_across_blocks():
    """1e30 swallows the noise: exact ties, in every order of blocks and words."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.where(torch.rand(64, 3000, generator=generator) < 0.002, 1e30, -1.0)
    logits[:, -1] = 1e30
    codes, _ = sample_tokens(logits, **place(64), backend="native")
    assert torch.equal(codes.long(), logits.argmax(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 700, 2100])
def test_a_bad_logit_anywhere_gives_nan(bad: float, column: int):
    logits = torch.zeros(2, 2101)
    logits[1, column] = bad
    zero = torch.zeros(2, dtype=torch.int64)
    codes, confidence = torch.ops.unif2ace_native.sample_tokens(logits, zero, zero, zero, 1.0, None, 0.0, 0)
    assert confidence.isnan().tolist() == [False, True]
    assert ((codes >= 0) & (codes < 2101)).all()


def test_leading_forbidden_spans():
    logits = torch.full((3, 5000), -math.inf)
    logits[:, 4321] = 2.0
    codes, confidence = sample_tokens(logits, **place(3), backend="native")
    assert codes.tolist() == [4321] * 3
    assert confidence.tolist() == [0.0] * 3


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sample_follows_its_own_logits(dtype: torch.dtype):
    """Small whole numbers: products and sums are exact, so every library gives the same logits, and equal tokens."""
    hidden = torch.randint(-2, 3, (37, 24)).to(dtype)
    uncond = torch.randint(-2, 3, (37, 24)).to(dtype)
    weight, bias = torch.randint(-2, 3, (300, 24)).to(dtype), torch.randint(-2, 3, (300,)).to(dtype)
    arguments = {**place(37), "uncond_hidden": uncond, "guidance": 1.0, "temperature": 8.0}
    expected = head_sample(hidden, weight, bias, **arguments, backend="reference")
    found = head_sample(hidden, weight, bias, **arguments, backend="native")
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_remask_reads_every_dtype_and_stride(dtype: torch.dtype):
    confidence = -torch.randint(0, 20, (40,)).to(dtype)
    arguments = (torch.tensor([0, 0, 15, 40]), torch.tensor([0, 7, 25]), torch.tensor([3, -4, 2**62]))
    rest = (torch.randperm(80)[::2], torch.tensor([1, 2, 3]).int(), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    expected = remask(confidence, *arguments, *rest, backend="reference")
    assert torch.equal(remask(confidence, *arguments, *rest, backend="native"), expected)
