"""Prompts and seeds to pixels, by either engine: the two ways `UniF2acePipeline.generate` works."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unif2ace.codec import SmallCodec
from unif2ace.codec.pixels import to_uint8
from unif2ace.errors import UserError
from unif2ace.generation.engine import GenerationEngine, Request
from unif2ace.generation.plain import generate_codes
from unif2ace.generation.settings import GenerationConfig
from unif2ace.model.transformer import UniF2ace


def draw_fast(
    model: UniF2ace,
    codec: SmallCodec,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: GenerationConfig,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 32,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """uint8 [len(seeds), S, S, 3] on the CPU, by `GenerationEngine`.

    Args:
        prompts: text ids; the seeds are shared out evenly, so many for the first prompt, and so on.
        known: (codes [N], which to keep [N] bool) of every image, or None.
        batch_size: images drawn at a time. on_step(done, total): called after every step of a batch.

    Raises `UserError` for the first image that fails.
    """
    done, total = 0, -(-len(seeds) // batch_size) * settings.steps

    def report() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    engine = GenerationEngine(
        model,
        codec,
        min(batch_size, len(seeds)),
        max_prompt_tokens=max(1, *map(len, prompts)),
        on_step=None if on_step is None else report,
    )
    each = len(seeds) // len(prompts)
    numbers = (settings.steps, settings.guidance_scale, settings.temperature, settings.remask_tau)
    requests = (
        Request(prompt, seeds[index * each : (index + 1) * each], *numbers, *(known or ()), key=index * each)
        for index, prompt in enumerate(prompts)
    )
    faces = torch.empty(len(seeds), codec.image_size, codec.image_size, 3, dtype=torch.uint8)
    for face in engine.stream(requests):
        if face.error is not None:
            raise UserError(face.error)
        faces[face.request.key + face.index] = face.pixels
    return faces


def draw_plain(
    model: UniF2ace,
    codec: SmallCodec,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: GenerationConfig,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 32,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The same by the plain loop, batch after batch."""
    prompts = [prompt for prompt in prompts for _ in range(len(seeds) // len(prompts))]
    batches, faces = -(-len(seeds) // batch_size), []
    for index in range(batches):
        part = slice(index * batch_size, (index + 1) * batch_size)

        def report(done: int, total: int, before: int = index) -> None:
            on_step(before * total + done, batches * total)

        number = len(seeds[part])
        codes = generate_codes(
            model,
            prompts[part],
            seeds[part],
            steps=settings.steps,
            guidance=settings.guidance_scale,
            temperature=settings.temperature,
            tau=settings.remask_tau,
            known_codes=None if known is None else known[0].expand(number, -1),
            known=None if known is None else known[1].expand(number, -1),
            on_step=None if on_step is None else report,
        )
        faces.append(to_uint8(codec.decode(codes)).cpu())
    return torch.cat(faces)


ENGINES = {"fast": draw_fast, "plain": draw_plain}
