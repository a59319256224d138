"""csrc/cuda/sampling.cu on the emulator: what only a kernel of many threads can do wrong.

Tokens, borders and masks are those of every kernel: test_sampling_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests import emulated
from tests.bits import needs_native
from tests.ops.places import place
from tests.ops.test_sampling_kernels import remask_problem
from tests.oracle import DTYPES, noncontiguous, poisoned
from unif2ace import native
from unif2ace.ops import head_sample, sample_tokens

pytestmark = [
    needs_native,
    pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or ""),
    pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="the emulator takes CPU tensors"),
]


@pytest.fixture
def cuda() -> Iterator[SimpleNamespace]:
    native.load()
    ops = emulated.load("sampling", "sample_tokens", "head_sample", "remask")
    ops.setup(2, 0)
    yield ops
    ops.setup(2, 0)


@pytest.mark.parametrize("columns", [1, 13, 2048, 4100])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guided_rows(cuda: SimpleNamespace, dtype: torch.dtype, temperature: float, columns: int):
    logits, uncond, where = torch.randn(5, columns).mul(3).to(dtype), torch.randn(5, columns).to(dtype), place(5)
    expected = sample_tokens(
        logits, **where, temperature=temperature, uncond_logits=uncond, guidance=2.5, backend="reference"
    )
    for cond, other in ((logits, uncond), (noncontiguous(logits), uncond.t().contiguous().t())):
        with poisoned(20):
            found = cuda.sample_tokens(cond, *where.values(), temperature, other, 2.5, 0)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


def test_the_order_of_threads_does_not_matter(cuda: SimpleNamespace):
    logits, where, p = torch.randn(6, 5003).round(), place(6), remask_problem([300, 7], 2)
    results = []
    for backwards in (0, 1):
        cuda.setup(2, backwards)
        results.append((*cuda.sample_tokens(logits, *where.values(), 1.0, None, 0.0, 0), cuda.remask(*p.values())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_head_in_chunks(cuda: SimpleNamespace):
    """Small whole numbers, so that products are exact; 130 rows are two chunks of the emulator's small cache."""
    hidden, uncond, weight = (torch.randint(-2, 3, (rows, 16)).float() for rows in (130, 130, 300))
    where = place(130)
    found = cuda.head_sample(hidden, weight, None, *where.values(), 4.0, uncond, 1.0, 0)
    expected = head_sample(
        hidden, weight, None, **where, temperature=4.0, uncond_hidden=uncond, guidance=1.0, backend="reference"
    )
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_no_rows(cuda: SimpleNamespace):
    empty, where = torch.empty(0, 8), place(0)
    assert cuda.sample_tokens(empty, *where.values(), 1.0, None, 0.0, 0)[0].shape == (0,)
    assert cuda.head_sample(empty, torch.ones(3, 8), None, *where.values(), 1.0, None, 0.0, 0)[1].shape == (0,)
    assert cuda.remask(*remask_problem([], 1).values()).shape == (0,)
    assert cuda.remask(*remask_problem([0, 0], 1).values()).shape == (0,)


def test_malformed_arguments_are_refused(cuda: SimpleNamespace):
    logits, where = torch.randn(3, 8), place(3)
    for bad in (logits.double(), logits[0], logits[:2], torch.empty(3, 0)):
        with pytest.raises(RuntimeError, match=r"^sample_tokens: "):
            cuda.sample_tokens(bad, *where.values(), 1.0, None, 0.0, 0)
    with pytest.raises(RuntimeError, match=r"^sample_tokens: uncond_logits must have the shape"):
        cuda.sample_tokens(logits, *where.values(), 1.0, logits[:, :7], 1.0, 0)
    with pytest.raises(RuntimeError, match=r"^head_sample: bias must be"):
        cuda.head_sample(logits, logits, logits[0], *where.values(), 1.0, None, 0.0, 0)
    p = remask_problem([2, 3], 1)
    with pytest.raises(RuntimeError, match=r"^remask: tau must have 2 elements"):
        cuda.remask(*{**p, "tau": torch.zeros(3)}.values())
