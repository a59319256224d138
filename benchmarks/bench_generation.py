"""Faces by the batch engine against the plain loop, and each of its exact savings alone (`benchmarks/savings.py`).

    reference     the plain loop (`unif2ace/generation/plain.py`) on reference ops: the baseline
    plain         the plain loop on the ops of the back end `auto`
    plain, ...    the same with one saving
    engine        `GenerationEngine`: all of them, requests and decoded pictures included

FLOPs are those of the engine's products, so its roofline share is what of the machine's matrix rate the model's
arithmetic gets, everything around it included. The gate, in float32: the codes of most faces are those
of the baseline; one rounding that flips a token changes the rest of its face.

Goals on two CPU cores: engine against reference 4x in a batch of 32 and 3x alone; engine against plain 1.5x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.savings import SAVINGS, draw
from unif2ace.config import UniF2aceConfig
from unif2ace.evaluation import speed
from unif2ace.generation.engine import GenerationEngine, Request
from unif2ace.generation.plain import generate_codes
from unif2ace.generation.schedule import schedule_steps
from unif2ace.pipeline import UniF2acePipeline

SAME_SHARE = 0.75  # of the faces must be those of the baseline
GUIDANCE = 3.0

load = cache(speed.load)  # one model for all of its benchmarks


def encoded_prompts(pipe: UniF2acePipeline, size: shapes.BatchShape) -> list[list[int]]:
    """Token ids of one prompt per face."""
    return [pipe.tokenizer.encode(speed.PROMPTS[index % len(speed.PROMPTS)]) for index in range(size.requests)]


def drawing_by_engine(pipe: UniF2acePipeline, size: shapes.BatchShape) -> Callable[[], Tensor]:
    """A call that draws one face per prompt by the batch engine and returns codes [B, N]."""
    prompts, options = encoded_prompts(pipe, size), {"steps": size.steps, "guidance": GUIDANCE}

    def run() -> Tensor:
        engine = GenerationEngine(pipe.model, pipe.codec, len(prompts), max_prompt_tokens=max(map(len, prompts)))
        requests = [Request(prompt, [seed], key=seed, **options) for seed, prompt in enumerate(prompts)]
        faces = sorted(engine.stream(requests), key=lambda face: face.request.key)
        return torch.stack([face.codes for face in faces])

    return run


def variants(pipe: UniF2acePipeline, size: shapes.BatchShape) -> dict[str, Callable[[], Tensor]]:
    """Name -> a call that draws one face per prompt and returns codes [B, N]."""
    prompts, options = encoded_prompts(pipe, size), {"steps": size.steps, "guidance": GUIDANCE}
    seeds = range(len(prompts))

    def plain() -> Tensor:
        return generate_codes(pipe.model, prompts, seeds, **options)

    def saving(name: str) -> Callable[[], Tensor]:
        return lambda: draw(pipe.model, prompts, seeds, {name}, **options)

    calls = {"reference": speed.on_backend("reference", plain), "plain": speed.on_backend("auto", plain)}
    if pipe.device.type == "cpu":  # the loop with single savings is a CPU one
        calls |= {f"plain, {name}": speed.on_backend("auto", saving(name)) for name in SAVINGS}
    return calls | {"engine": speed.on_backend("auto", drawing_by_engine(pipe, size))}


def engine_flops(config: UniF2aceConfig, prompts: list[list[int]], steps: int) -> int:
    """FLOPs of the engine's products: projections, experts and attention of all image rows it runs, and the head."""
    hidden, moe, sequence = config.hidden_size, config.token_moe, config.sequence_moe
    keys = config.image_rows + 3 + sum(map(len, prompts)) / len(prompts) / 2  # half of the rows see no prompt
    if moe is None:
        feed_forward = 2 * hidden * config.ffn_width
    else:
        feed_forward = 2 * hidden * (moe.num_experts + moe.top_k * moe.expert_width + moe.shared_width)
    layer = 4 * hidden**2 + 2 * keys * hidden + feed_forward
    tokenwise = 3 * hidden**2 + (feed_forward if config.parallel_block else 0)
    plan = schedule_steps(config.num_image_tokens, steps)
    sequences = 2 * len(prompts) * (len(plan) - 1) + len(set(map(tuple, prompts))) + 1
    products = sequences * config.image_rows * config.num_layers * layer
    if len(plan) > 1:  # the first layer: only rows whose token is new since the last pass
        skipped = (len(plan) - 1) * config.image_rows - (plan[0].unknown - plan[-1].unknown)
        products -= 2 * len(prompts) * skipped * tokenwise
    if sequence is not None and "noise" in sequence.generation_experts:  # once a step: all images have one mask ratio
        products += len(plan) * config.image_rows * config.num_layers * sequence.resampler_width * hidden
    products += len(prompts) * sum(step.unknown for step in plan) * config.codebook_size * hidden
    return round(2 * products)


@pytest.mark.parametrize("shape", list(shapes.BATCHES))
def bench_generation(shape: str, device: str, compare: Callable) -> None:
    size = shapes.BATCHES[shape]
    pipe = load(size.model, device)
    calls = variants(pipe, size)

    def gate(name: str) -> None:
        same = (calls[name]() == expected()).all(1).sum().item()
        assert same >= SAME_SHARE * size.requests, f"{same} of {size.requests} faces are those of the reference"

    expected = cache(calls["reference"])
    compare(
        calls,
        baseline="reference",
        op="generation",
        shape=shape,
        case="forward",
        dtype=pipe.dtype,
        flops=engine_flops(pipe.model.config, encoded_prompts(pipe, size), size.steps),
        gate=gate if pipe.dtype == torch.float32 else None,
        items=(size.requests, "faces"),
    )
