"""Prompts and seeds to pixels, by either engine: the two ways `UniF2acePipeline.generate` works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unif2ace.codec import SmallCodec
from unif2ace.codec.pixels import to_uint8
from unif2ace.errors import UserError
from unif2ace.generation.engine import GenerationEngine, Request
from unif2ace.generation.plain import generate_codes
from unif2ace.generation.settings import GenerationConfig
from unif2ace.model.transformer import UniF2ace


@dataclass(frozen=True, eq=False)
class DrawingTask:
    """Images to draw, one for each seed: the first `images_per_prompt` seeds are the first prompt's, and so on.

    prompts: text ids. known: (codes [N], which to keep [N] bool) of every image, or None. batch_size: images drawn at a
    time. on_step(done, total): called after every step of a batch.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    settings: GenerationConfig
    known: tuple[Tensor, Tensor] | None = None
    batch_size: int = 32
    on_step: Callable[[int, int], None] | None = None

    @property
    def images_per_prompt(self) -> int:
        return len(self.seeds) // len(self.prompts)

    @property
    def batches(self) -> int:
        return -(-len(self.seeds) // self.batch_size)


def draw_fast(model: UniF2ace, codec: SmallCodec, task: DrawingTask) -> Tensor:
    """uint8 [len(seeds), S, S, 3] on the CPU, by `GenerationEngine`. Raises `UserError` for the first that fails."""
    settings, each = task.settings, task.images_per_prompt
    done, total = 0, task.batches * settings.steps

    def report() -> None:
        nonlocal done
        done += 1
        task.on_step(done, total)

    engine = GenerationEngine(
        model,
        codec,
        min(task.batch_size, len(task.seeds)),
        max_prompt_tokens=max(1, *map(len, task.prompts)),
        on_step=None if task.on_step is None else report,
    )
    numbers = (settings.steps, settings.guidance_scale, settings.temperature, settings.remask_tau)
    requests = (
        Request(prompt, task.seeds[first : first + each], *numbers, *(task.known or ()), key=first)
        for first, prompt in zip(range(0, len(task.seeds), each), task.prompts, strict=True)
    )
    faces = torch.empty(len(task.seeds), codec.image_size, codec.image_size, 3, dtype=torch.uint8)
    for face in engine.stream(requests):
        if face.error is not None:
            raise UserError(face.error)
        faces[face.request.key + face.index] = face.pixels
    return faces


def draw_plain(model: UniF2ace, codec: SmallCodec, task: DrawingTask) -> Tensor:
    """The same by the plain loop, batch after batch."""
    settings, faces = task.settings, []
    prompts = [prompt for prompt in task.prompts for _ in range(task.images_per_prompt)]
    for index in range(task.batches):
        part = slice(index * task.batch_size, (index + 1) * task.batch_size)

        def report(done: int, total: int, before: int = index) -> None:
            task.on_step(before * total + done, task.batches * total)

        number = len(task.seeds[part])
        codes = generate_codes(
            model,
            prompts[part],
            task.seeds[part],
            steps=settings.steps,
            guidance=settings.guidance_scale,
            temperature=settings.temperature,
            tau=settings.remask_tau,
            known_codes=None if task.known is None else task.known[0].expand(number, -1),
            known=None if task.known is None else task.known[1].expand(number, -1),
            on_step=None if task.on_step is None else report,
        )
        faces.append(to_uint8(codec.decode(codes)).cpu())
    return torch.cat(faces)


ENGINES = {"fast": draw_fast, "plain": draw_plain}
