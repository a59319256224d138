"""The ways in which a sampling kernel could be wrong: bits of its noise, skipped noise, borders of blocks and tiles.

What every back end has to fulfil is in test_sampling.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import emulated
from tests.ops.places import place
from tests.oracle import DTYPES, available_backends, seeded
from unif2ace import native
from unif2ace.ops import _noise, _registry
from unif2ace.ops.sampling import reference_sample_tokens

EMULATED = "cuda, emulated"


def kernels(*dtypes: torch.dtype) -> list[str]:
    """Back ends with kernels that run here, and on a CPU the CUDA kernels on the emulator."""
    found = [name for name in available_backends("sampling", *dtypes) if name != "reference"]
    on_cpu = torch.get_default_device().type == "cpu" and native.load() is not None
    return [*found, EMULATED] if on_cpu and emulated.why_not() is None else found


CASES = [(name, dtype) for dtype in DTYPES for name in kernels(dtype)]
each_kernel = pytest.mark.parametrize("backend", kernels())
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)


def registered(backend: str, name: str) -> Callable:
    if backend == EMULATED:
        return getattr(emulated.load("sampling", "sample_tokens", "head_sample", "remask"), name)
    return _registry.registered(backend, name)


def sample(
    backend: str,
    logits: Tensor,
    place: dict[str, Tensor],
    temperature: float = 1.0,
    uncond_logits: Tensor | None = None,
    guidance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    run = registered(backend, "sample_tokens")
    return run(logits, *place.values(), temperature, uncond_logits, guidance, _noise.TOKEN_STREAM)


@given(
    columns=st.sampled_from([1, 3, 4, 127, 128, 129, 1023, 1024, 1025, 3000, 4096, 6001]),
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
    generator = seeded(seed)
    where = place(4, generator)
    x = torch.randn(4, columns, generator=generator)
    if kind == "flat":
        x = torch.full_like(x, 0.1)
    elif kind == "few levels":
        x = x.round()
    elif kind == "steep":
        x = 20 * x
    elif kind == "huge":
        x = x.round() * (2e4 if dtype == torch.float16 else 1e30)
    elif kind == "forbidden":
        x[torch.rand(x.shape, generator=generator) < 0.9] = -math.inf
        x[:, -1] = 0.0
    elif kind in ("rising", "falling"):
        x = torch.linspace(-30, 30, columns).expand(4, -1).clone() * (1 if kind == "rising" else -1)
    elif kind == "against":  # every key the same up to rounding: the bounds cannot exclude anything by much
        x = -_noise.gumbel_noise(**where, stream=0, num_codes=columns) * min(max(temperature, 1e-3), 1e3)
    expected = reference_sample_tokens(x.to(dtype), **where, temperature=temperature)
    for backend in kernels(dtype):
        # "against" has the GPU kernels settle every slot, one by one: too slow where they are interpreted or emulated.
        if backend == "native" or kind != "against" or columns < 200:
            found = sample(backend, x.to(dtype), where, temperature)
            assert torch.equal(found[0], expected[0]), backend
            torch.testing.assert_close(found[1], expected[1])


@each_kernel
def test_equal_keys_go_to_the_lowest_code_across_blocks(backend: str):
    """1e30 swallows the noise: exact ties, in every order of blocks and words."""
    generator = seeded(5)
    logits = torch.where(torch.rand(24, 3000, generator=generator) < 0.002, 1e30, -1.0)
    logits[:, -1] = 1e30
    codes, _ = sample(backend, logits, place(24))
    assert torch.equal(codes.long(), logits.argmax(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 700, 2100])
@each_kernel
def test_a_bad_logit_anywhere_gives_nan(backend: str, bad: float, column: int):
    logits = torch.zeros(2, 2101)
    logits[1, column] = bad
    codes, confidence = sample(backend, logits, place(2))
    assert confidence.isnan().tolist() == [False, True]
    assert ((codes >= 0) & (codes < 2101)).all()


@each_kernel
def test_leading_forbidden_spans(backend: str):
    logits = torch.full((3, 5000), -math.inf)
    logits[:, 4321] = 2.0
    codes, confidence = sample(backend, logits, place(3))
    assert codes.tolist() == [4321] * 3
    assert confidence.tolist() == [0.0] * 3


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("columns", [64, 2048 + 16, 2500])
@each_case
def test_the_place_in_memory_does_not_matter(backend: str, dtype: torch.dtype, columns: int, offset: int):
    """Rows that 16-byte loads can read, and the same rows where they cannot: the same bits."""
    logits, uncond, where = torch.randn(3, columns).to(dtype), torch.randn(3, columns).to(dtype), place(3)
    wide = torch.full((3, columns + 5), math.nan, dtype=dtype)[:, offset : offset + columns].copy_(logits)
    dense, other = (torch.full((3 * columns + offset,), math.nan, dtype=dtype)[offset:].view(3, -1) for _ in range(2))
    expected = sample(backend, logits, where, 0.9, uncond, 1.5)
    cond = dense.copy_(logits) if offset else wide
    found = sample(backend, cond, where, 0.9, other.copy_(uncond), 1.5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@each_case
def test_head_sample_follows_its_own_logits(backend: str, dtype: torch.dtype):
    """Small whole numbers: products and sums are exact, so every library gives the same logits, and equal tokens."""
    hidden = torch.randint(-2, 3, (37, 24)).to(dtype)
    uncond = torch.randint(-2, 3, (37, 24)).to(dtype)
    weight, bias = torch.randint(-2, 3, (300, 24)).to(dtype), torch.randint(-2, 3, (300,)).to(dtype)
    arguments = (hidden, weight, bias, *place(37).values(), 8.0, uncond, 1.0, 0)
    expected = registered("reference", "head_sample")(*arguments)
    found = registered(backend, "head_sample")(*arguments)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@each_case
def test_remask_reads_every_dtype_and_stride(backend: str, dtype: torch.dtype):
    confidence = -torch.randint(0, 20, (40,)).to(dtype)
    arguments = (torch.tensor([0, 0, 15, 40]), torch.tensor([0, 7, 25]), torch.tensor([3, -4, 2**62]))
    rest = (torch.randperm(80)[::2], torch.tensor([1, 2, 3]).int(), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    found, expected = (registered(name, "remask")(confidence, *arguments, *rest) for name in (backend, "reference"))
    assert torch.equal(found, expected)


def remask_problem(counts: list[int], levels: int) -> dict[str, Tensor]:
    """Confidences of few levels, so that many keys are equal; of equal positions the first row counts."""
    rows, images = sum(counts), len(counts)
    return {
        "log_confidence": -torch.randint(0, levels, (rows,)).float(),
        "row_offsets": torch.tensor([0, *counts]).cumsum(0),
        "keep_unknown": torch.tensor(counts, dtype=torch.int64) // 3,
        "seeds": torch.arange(images),
        "positions": torch.randint(-(2**40), 2**40, (rows,)) // 2**38,
        "steps": torch.arange(images),
        "tau": torch.zeros(images),
    }


@pytest.mark.parametrize("levels", [1, 2, 100_000])
@each_kernel
def test_remask_of_images_larger_than_a_tile(backend: str, levels: int):
    p = remask_problem([1300, 0, 1024], levels)
    assert torch.equal(registered(backend, "remask")(*p.values()), registered("reference", "remask")(*p.values()))


@each_kernel
def test_remask_orders_every_float(backend: str):
    """Infinities, both zeros, subnormal numbers; NaN comes last, as in a sort."""
    values = [math.nan, math.inf, 3e38, 1e-40, 0.0, -0.0, -1e-40, -1.0, -3e38, -math.inf]
    confidence = torch.tensor(values)[torch.randperm(40) % 10]
    for keep in (1, 13, 26, 38):
        p = remask_problem([40], 1) | {"log_confidence": confidence, "keep_unknown": torch.tensor([keep])}
        found = registered(backend, "remask")(*p.values())
        assert torch.equal(found, registered("reference", "remask")(*p.values()))


@pytest.mark.parametrize("offsets", [[1, 2, 5], [0, 4, 3], [0, 2, 2**40], [0, -(2**40), 2**40], [0, 0, 2]])
@pytest.mark.parametrize("keep", [-(2**40), 2**40])
@pytest.mark.parametrize("backend", [name for name in kernels() if name != "native"])
def test_bad_offsets_harm_nobody_where_values_are_unknown(backend: str, offsets: list[int], keep: int):
    """A launcher for GPUs cannot look at them; the kernel addresses nothing outside of the tensors and ends."""
    p = remask_problem([2, 3], 3) | {"row_offsets": torch.tensor(offsets), "keep_unknown": torch.tensor([keep, keep])}
    mask = registered(backend, "remask")(*p.values())
    covered = [any(max(a, 0) <= row < b for a, b in pairwise(offsets)) for row in range(5)]
    assert not mask[~torch.tensor(covered)].any()
