"""`sampling`: logits -> codes and confidence, the head in front of it, and the choice of what to mask again.

Cost model of `sample_tokens`: R*V logits read once, twice with guidance, 8 bytes written per row, about 75 operations
per logit whose noise is needed. `head_sample` adds the head: 2*R*H*V FLOPs. `remask` orders R numbers.

Logits: "peaked" are as wide as those of the bundled model halfway through a face, where conditional logits have a
standard deviation of 2.2 over the codes, their distance to the unconditional ones 0.9, and guided ones (w = 3) about
4.3, an entropy of 2 to 3 nats: u = 2 n_1 and c = u + 0.9 n_2 with Gaussian n give all of that. "flat" ones, of an
untrained model, have a standard deviation of 0.02, so that every code may win.

Goals on two CPU cores, shape "laptop-512" (512 rows of 8192 codes, guidance), native, in float32 and bfloat16: 20x
against reference, 15x against the exponential race in plain PyTorch, and no slower than torch's guided logsumexp
alone, which samples nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.problems import Problem, each_dtype, each_size
from unif2ace.ops import BACKENDS, head_sample, remask, sample_tokens

GUIDANCE = 3.0  # default of the bundled model
SPREADS = {"peaked": (2.0, 0.9), "flat": (0.02, 0.02)}  # standard deviation of u, and of c - u
BLOCK_ROWS = 32  # of the plain samplers and ceilings on a CPU: 1 MiB of float32; 16, 32, 64, 128 and all rows measured
FLIPPED = 0.01  # share of codes that may differ in `head_sample`


def make_rows(shape: shapes.SamplingShape, device: str) -> dict[str, Tensor]:
    """Where the noise of each row comes from: one seed per image, its positions, one step."""
    rows = shape.images * shape.rows
    return {
        "seeds": torch.arange(shape.images, device=device).repeat_interleave(shape.rows),
        "positions": torch.arange(shape.rows, device=device).repeat(shape.images),
        "steps": torch.full((rows,), 7, device=device),
    }


def make_logits(shape: shapes.SamplingShape, spread: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """`logits`, and `uncond_logits` where the shape has guidance."""
    generator = torch.Generator().manual_seed(0)
    size = shape.images * shape.rows, shape.columns
    width, distance = SPREADS[spread]
    uncond = width * torch.randn(size, generator=generator)
    logits = uncond + distance * torch.randn(size, generator=generator)
    found = {"logits": logits.to(device, dtype)}
    return found | {"uncond_logits": uncond.to(device, dtype)} if shape.guidance else found


def tokens_gate(problem: Problem, guidance: float) -> Callable[[str], None]:
    """Back ends must give the reference's codes and confidences; a sampler with other noise, its distribution."""

    def check(name: str) -> None:
        if name in problem.ceilings:
            return
        with torch.no_grad():
            codes, confidence = problem.functions[name](**problem.inputs)
            want_codes, want_confidence = problem.functions["reference"](**problem.inputs)
            if name in BACKENDS:
                assert torch.equal(codes, want_codes), f"{name}: codes differ from the reference"
                torch.testing.assert_close(confidence, want_confidence, rtol=1e-5, atol=1e-5)
                return
            log_p = peers.guided(**problem.inputs, guidance=guidance).log_softmax(1)
        torch.testing.assert_close(confidence, log_p.gather(1, codes[:, None])[:, 0], rtol=1e-4, atol=1e-4)
        # Each confidence is a draw with the mean sum_v p_v log p_v: their mean must lie within 6 standard errors.
        mean = (log_p.exp() * log_p).sum(1)
        error = ((log_p.exp() * log_p.square()).sum(1) - mean.square()).clamp(min=1e-12).sum().sqrt() / len(codes)
        distance = (confidence.mean() - mean.mean()).abs()
        assert distance <= 6 * error, (
            f"{name}: mean log-confidence is off by {distance:.3e}, standard error {error:.3e}"
        )

    return check


def logsumexp_alone(inputs: dict[str, Tensor], guidance: float, block: int) -> dict[str, Callable[[], object]]:
    """Torch's guided logsumexp: written as one would, and on blocks of rows that stay in the cache."""
    blocks = [
        dict(zip(inputs, parts, strict=True)) for parts in zip(*(x.split(block) for x in inputs.values()), strict=True)
    ]
    return {
        "ceiling: guided logsumexp": lambda: peers.guided(**inputs, guidance=guidance).logsumexp(1),
        "ceiling: guided logsumexp, in blocks": lambda: torch.cat(
            [peers.guided(**part, guidance=guidance).logsumexp(1) for part in blocks]
        ),
    }


@each_dtype
@pytest.mark.parametrize("spread", list(SPREADS))
@each_size(shapes.SAMPLING)
def bench_sample_tokens(
    shape: str, spread: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.SAMPLING[shape]
    guidance = GUIDANCE if size.guidance else 0.0
    rows, inputs = make_rows(size, device), make_logits(size, spread, dtype, device)

    def on(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda **logits: sample_tokens(**logits, **rows, guidance=guidance, backend=backend)

    block = BLOCK_ROWS if device == "cpu" else len(inputs["logits"])
    functions = {backend: on(backend) for backend in backends("sampling", dtype)}
    problem = Problem(
        inputs,
        functions
        | peers.present("sampling", device, guidance, block)
        | peers.compiled(peers.exponential_race(guidance, block), device),
        logsumexp_alone(inputs, guidance, block),
    )
    compare(
        problem.variants("forward"),
        baseline="reference",
        op="sample_tokens",
        shape=shape,
        case="forward" if spread == "peaked" else f"forward {spread}",
        dtype=dtype,
        bytes=sum(x.nbytes for x in inputs.values()) + 8 * len(inputs["logits"]),
        gate=tokens_gate(problem, guidance),
    )


@each_dtype
@each_size(shapes.SAMPLING)
def bench_head_sample(shape: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable) -> None:
    size = shapes.SAMPLING[shape]
    guidance, rows = GUIDANCE if size.guidance else 0.0, make_rows(size, device)
    # Rows as spread as the logits of `make_logits`, through a head of unit gain.
    hidden = make_logits(replace(size, columns=size.hidden), "peaked", dtype, device)
    weight = torch.randn(size.columns, size.hidden, generator=torch.Generator().manual_seed(1))
    inputs = {"hidden": hidden["logits"], "weight": (weight * size.hidden**-0.5).to(device, dtype)}
    uncond_hidden = hidden.get("uncond_logits")

    def on(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda hidden, weight: head_sample(
            hidden, weight, None, **rows, uncond_hidden=uncond_hidden, guidance=guidance, backend=backend
        )

    problem = Problem(inputs, {backend: on(backend) for backend in backends("sampling", dtype)})
    compare(
        problem.variants("forward"),
        baseline="reference",
        op="head_sample",
        shape=shape,
        case="forward",
        dtype=dtype,
        flops=2 * len(inputs["hidden"]) * size.hidden * size.columns,
        gate=head_gate(problem),
    )


def head_gate(problem: Problem) -> Callable[[str], None]:
    """Heads multiplied by other libraries differ in the last bits of their logits, and then a few codes differ."""

    def check(name: str) -> None:
        codes, _ = problem.functions[name](**problem.inputs)
        want, _ = problem.functions["reference"](**problem.inputs)
        other = int((codes != want).sum())
        assert other <= 1 + FLIPPED * len(codes), f"{name}: {other} of {len(codes)} codes differ from the reference"

    return check


@each_size(shapes.SAMPLING)
def bench_remask(shape: str, device: str, backends: Callable, compare: Callable) -> None:
    size = shapes.SAMPLING[shape]
    generator = torch.Generator().manual_seed(0)
    inputs = {"log_confidence": -torch.rand(size.images * size.rows, generator=generator).to(device)}
    per_image = {
        "row_offsets": torch.arange(size.images + 1, device=device) * size.rows,
        "keep_unknown": torch.full((size.images,), size.rows // 2, device=device),
        "seeds": torch.arange(size.images, device=device),
        "steps": torch.full((size.images,), 7, device=device),
        "tau": torch.full((size.images,), 0.5, device=device),
    }
    positions = make_rows(size, device)["positions"]

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        return lambda log_confidence: (remask(log_confidence, positions=positions, **per_image, backend=backend),)

    problem = Problem(inputs, {backend: on(backend) for backend in backends("sampling", torch.float32)})
    compare(
        problem.variants("forward"),
        baseline="reference",
        op="remask",
        shape=shape,
        case="forward",
        gate=masks_gate(problem),
    )


def masks_gate(problem: Problem) -> Callable[[str], None]:
    """Equal masks; ranks are compared in the float32 of the contract, so float64 has no say here."""

    def check(name: str) -> None:
        (mask,), (want,) = (problem.functions[who](**problem.inputs) for who in (name, "reference"))
        assert torch.equal(mask, want), f"{name}: the mask differs from the reference"

    return check
