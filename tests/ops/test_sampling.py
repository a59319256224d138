"""Sampling: exact tokens on every back end, the right distribution, independence of the batch.

`head_sample` is in test_sampling_head.py, which tokens are masked again in test_sampling_remask.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.shapes import SAMPLING_SMALL, SamplingShape
from tests.ops.places import place
from tests.oracle import assert_close, available_backends, backend_cases, noncontiguous, poisoned, registered, seeded
from unif2ace.errors import UserError
from unif2ace.ops import _noise, _registry, sample_tokens
from unif2ace.ops.sampling import reference_sample_tokens

BACKENDS = available_backends("sampling")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
CASES = backend_cases("sampling")
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
each_shape = pytest.mark.parametrize("shape", SAMPLING_SMALL.values(), ids=SAMPLING_SMALL.keys())


def problem(shape: SamplingShape, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    rows = shape.images * shape.rows
    logits = torch.randn(rows, shape.columns).mul(3).to(dtype)
    guided = {"uncond_logits": torch.randn(rows, shape.columns).to(dtype), "guidance": 2.5} if shape.guidance else {}
    return {"logits": logits, **place(rows), **guided}


@each_shape
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@each_case
def test_every_back_end_gives_the_same_tokens(
    backend: str, temperature: float, shape: SamplingShape, dtype: torch.dtype
):
    arguments = problem(shape, dtype)
    truth = sample_tokens(
        **{k: x.double() if k.endswith("logits") else x for k, x in arguments.items()}, temperature=0.0
    )
    codes, confidence = sample_tokens(**arguments, temperature=temperature, backend="reference")
    with registered(), poisoned(4 * codes.numel()):
        found, found_confidence = sample_tokens(**arguments, temperature=temperature, backend=backend)
    assert found.dtype == torch.int32
    assert torch.equal(found, codes)
    if temperature == 0.0 and torch.equal(codes, truth[0]):
        assert_close("log_confidence", found_confidence, truth[1].double(), confidence)
    torch.testing.assert_close(found_confidence, confidence)


@each_backend
def test_against_the_definition_row_by_row(backend: str):
    """Guided logits, noise and argmax with Python's numbers."""
    arguments = problem(SamplingShape(2, 5, 23))
    codes, confidence = sample_tokens(**arguments, temperature=0.8, backend=backend)
    noise = _noise.gumbel_noise(arguments["seeds"], arguments["positions"], arguments["steps"], 0, 23)
    for row in range(10):
        cond, uncond = arguments["logits"][row].tolist(), arguments["uncond_logits"][row].tolist()
        z = [3.5 * c - 2.5 * u for c, u in zip(cond, uncond, strict=True)]
        key = [x / 0.8 + g for x, g in zip(z, noise[row].tolist(), strict=True)]
        best = max(range(23), key=key.__getitem__)
        assert int(codes[row]) == best
        assert float(confidence[row]) == pytest.approx(z[best] - math.log(sum(map(math.exp, z))), abs=1e-5)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@each_backend
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vary", ["seeds", "positions", "steps"])
def test_tokens_follow_the_softmax(backend: str, vary: str, temperature: float):
    rows, columns = 20_000, 21
    logits = torch.randn(columns)
    where = {name: torch.zeros(rows, dtype=torch.int64) for name in ("seeds", "positions", "steps")}
    where[vary] = torch.arange(rows)
    codes, _ = sample_tokens(logits.expand(rows, -1), **where, temperature=temperature, backend=backend)
    counts = torch.bincount(codes.long(), minlength=columns).double()
    statistic = chi_square(counts, rows * (logits.double() / temperature).softmax(0))
    assert statistic < 45.3  # 99.9 % quantile with 20 degrees of freedom; seeds are fixed


@each_backend
def test_rare_tokens_appear_as_often_as_they_should(backend: str):
    """The tail of the Gumbel numbers: one code of probability 1e-3 each way, drawn 200 times in 200 000."""
    rows = 200_000
    logits = torch.tensor([[math.log(0.999), math.log(0.001)]]).expand(rows, 2)
    zero = torch.zeros(rows, dtype=torch.int64)
    codes, _ = sample_tokens(logits, torch.arange(rows), zero, zero, backend=backend)
    assert abs(int(codes.sum()) - 200) < 4 * math.sqrt(200)


@each_backend
def test_rows_do_not_depend_on_the_batch_around_them(backend: str):
    arguments = problem(SamplingShape(4, 50, 1009))
    codes, confidence = sample_tokens(**arguments, backend=backend)
    shuffled = torch.randperm(200)
    for rows in (slice(0, 1), slice(63, 66), shuffled):
        part = {k: x[rows] if isinstance(x, Tensor) else x for k, x in arguments.items()}
        found = sample_tokens(**part, backend=backend)
        assert torch.equal(found[0], codes[rows])
        assert torch.equal(found[1], confidence[rows])


@each_backend
def test_equal_calls_give_equal_bits(backend: str):
    arguments = problem(SAMPLING_SMALL["primes"])
    calls = [sample_tokens(**arguments, backend=backend) for _ in range(2)]
    for first, second in zip(*calls, strict=True):
        assert torch.equal(first, second)


@each_backend
def test_ties_go_to_the_lowest_code(backend: str):
    logits = torch.zeros(2, 1031)
    logits[0, [700, 900]] = 1.0
    codes, confidence = sample_tokens(logits, **place(2), temperature=0.0, backend=backend)
    assert codes.tolist() == [700, 0]
    torch.testing.assert_close(confidence[1], torch.tensor(-math.log(1031)))


@each_backend
def test_confidence_does_not_depend_on_the_temperature(backend: str):
    logits = torch.randn(64, 40)
    where = place(64)
    for temperature in (0.0, 0.3, 3.0):
        codes, confidence = sample_tokens(logits, **where, temperature=temperature, backend=backend)
        expected = logits.log_softmax(1).gather(1, codes.long()[:, None])[:, 0]
        torch.testing.assert_close(confidence, expected)


@each_backend
def test_forbidden_codes_are_never_drawn(backend: str):
    logits = torch.zeros(500, 6)
    logits[:, ::2] = -math.inf
    codes, confidence = sample_tokens(logits, **place(500), backend=backend)
    assert set(codes.tolist()) == {1, 3, 5}
    torch.testing.assert_close(confidence, torch.full((500,), -math.log(3)))


@each_backend
def test_guidance_zero_and_no_guidance_agree(backend: str):
    arguments = problem(SAMPLING_SMALL["primes"])
    plain = {k: x for k, x in arguments.items() if k not in ("uncond_logits", "guidance")}
    for first, second in zip(
        sample_tokens(**{**arguments, "guidance": 0.0}, backend=backend),
        sample_tokens(**plain, backend=backend),
        strict=True,
    ):
        assert torch.equal(first, second)


@each_backend
def test_streams_are_independent(backend: str):
    logits, where = torch.zeros(400, 64), place(400)
    tokens, _ = sample_tokens(logits, **where, backend=backend)
    text, _ = sample_tokens(logits, **where, stream=_noise.TEXT_STREAM, backend=backend)
    assert 0 <= int((tokens == text).sum()) < 25  # 400 / 64 expected


@each_backend
def test_index_dtypes_and_strides_do_not_matter(backend: str):
    arguments = problem(SAMPLING_SMALL["primes"])
    codes, confidence = sample_tokens(**arguments, backend=backend)
    other = {
        **arguments,
        "logits": noncontiguous(arguments["logits"]),
        "uncond_logits": arguments["uncond_logits"].t().contiguous().t(),
        "positions": arguments["positions"].int(),
        "steps": arguments["steps"].repeat_interleave(2)[::2].long(),
    }
    found = sample_tokens(**other, backend=backend)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], confidence)


def test_float64_logits_use_the_same_noise():
    arguments = problem(SAMPLING_SMALL["primes"])
    double = {k: x.double() if k.endswith("logits") else x for k, x in arguments.items()}
    codes, confidence = sample_tokens(**double)
    assert confidence.dtype == torch.float32
    assert torch.equal(codes, sample_tokens(**arguments)[0])


@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 70),
    temperature=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_sampling_invariants(rows: int, columns: int, temperature: float, seed: int):
    generator = seeded(seed)
    logits = torch.randint(-4, 5, (rows, columns), generator=generator).float()
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    positions, steps = torch.arange(rows), torch.zeros(rows, dtype=torch.int32)
    expected = reference_sample_tokens(logits, seeds, positions, steps, temperature)
    for backend in BACKENDS:
        codes, confidence = sample_tokens(logits, seeds, positions, steps, temperature=temperature, backend=backend)
        assert torch.equal(codes, expected[0])
        assert ((codes >= 0) & (codes < columns)).all()
        assert (confidence <= 0).all()


# ------------------------------------------------------------------------------------------------ registration, refusal


@each_backend
def test_opcheck(backend: str):
    p = problem(SAMPLING_SMALL["primes"])
    where = (p["seeds"], p["positions"], p["steps"])
    torch.library.opcheck(
        _registry.registered(backend, "sample_tokens"), (p["logits"], *where, 0.9, p["uncond_logits"], 2.0, 0)
    )


@each_backend
def test_compiles_into_one_graph(backend: str):
    logits, where = torch.randn(13, 11), place(13)

    def step(logits: Tensor) -> tuple[Tensor, ...]:
        return sample_tokens(2 * logits, **where, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(logits), step(logits), strict=True):
        assert torch.equal(found, expected)


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, "row"])
def test_rows_without_a_distribution_are_refused(backend: str, bad: float | str):
    logits = torch.zeros(5, 4)
    logits[3, 1 if bad != "row" else slice(None)] = -math.inf if bad == "row" else bad
    with pytest.raises(UserError, match="sample_tokens: logits of row 3 hold NaN"):
        sample_tokens(logits, **place(5), backend=backend)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be \[R, V >= 1\] floating point, got \[3\] float32"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, r"logits must be .*, got \[3, 4\] int64"),
        ({"logits": torch.zeros(3, 0)}, r"logits must be .*, got \[3, 0\] float32"),
        ({"seeds": torch.zeros(3, dtype=torch.int32)}, r"seeds must be \[3\] int64, got \[3\] int32"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, r"positions must be \[3\] int32 or int64, got \[2\] int32"),
        ({"steps": torch.zeros(3)}, r"steps must be \[3\] int32 or int64, got \[3\] float32"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be a finite number >= 0, got nan"),
        ({"temperature": 1e-39}, "temperature must be 0 or from 1e-38 to 1e38, got 1e-39"),
        ({"guidance": math.inf}, "guidance must be a finite number >= 0, got inf"),
        ({"guidance": 1.0}, "guidance 1.0 needs uncond_logits, got None"),
        ({"uncond_logits": torch.zeros(3, 5)}, r"uncond_logits must be \[3, 4\] float32 like logits, got \[3, 5\]"),
    ],
)
def test_sample_tokens_refuses_bad_arguments(changes: dict[str, object], message: str):
    arguments = {"logits": torch.zeros(3, 4), **place(3), **changes}
    with pytest.raises(UserError, match=f"^sample_tokens: {message}"):
        sample_tokens(**arguments)


def test_a_back_end_that_cannot_run_is_refused():
    for backend in {"native", "triton"} - set(BACKENDS):
        with pytest.raises(UserError, match=f"sampling: back end '{backend}' cannot run this call"):
            sample_tokens(torch.zeros(3, 4), **place(3), backend=backend)
