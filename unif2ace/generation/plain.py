"""Text to face, the loop of the paper written plainly: masked discrete diffusion over the codes of an image.

Every step runs whole sequences, with the prompt and without it, through transformer and head, as Show-o's code does;
combines the halves' logits; samples every position; and masks the least certain ones again, as many as the schedule
says. Only the codes are kept from step to step. `denoise.py` draws the same faces with less work and must equal this.

Cost: steps * 2 (with guidance) * images * (text + N + 2) rows through the transformer and the whole head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.generation.schedule import Step, schedule_steps
from unif2ace.generation.settings import codes_to_draw, to_signed
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import linear, remask, sample_tokens
from unif2ace.vocabulary import pack_generation


@torch.no_grad()
def generate_codes(
    model: UniF2ace,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    steps: int = 18,
    guidance: float = 3.0,
    temperature: float = 1.0,
    tau: float = 1.0,
    schedule: str = "cosine",
    known_codes: Tensor | None = None,
    known: Tensor | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Codes [B, N] int64 for one image per prompt (token ids) and seed.

    guidance w >= 0, z = (1 + w) z_cond - w z_uncond; 0 runs the conditional half only. temperature: of the token
    choice, 0 is greedy. tau: initial scale of the re-masking noise. known_codes, known (bool), both [B, N]: codes to
    keep, which are never touched. on_step(done, total) is called after each step. Raises `UserError` for what does not
    fit.
    """
    if len(seeds) != len(prompts):
        raise UserError(f"generate: expected one seed for each of {len(prompts)} prompts, got {len(seeds)}")
    vocabulary, device = model.vocabulary, model.head.weight.device
    batch, size = len(prompts), model.config.num_image_tokens
    codes = codes_to_draw((batch, size), vocabulary.mask_code, known_codes, known).to(device)
    counts = (codes == vocabulary.mask_code).sum(1).tolist()
    plans = [schedule_steps(n, steps, tau=tau, num_tokens=size, schedule=schedule) for n in counts]
    texts = [list(prompts), [[]] * batch] if guidance > 0 else [list(prompts)]
    halves = [pack_generation(vocabulary, text, codes) for text in texts]
    seed = torch.tensor([to_signed(value) for value in seeds], device=device)
    position = torch.arange(size, device=device).repeat(batch)
    for k in range(max(map(len, plans), default=0)):
        now = [plan[k] if k < len(plan) else Step(0, 0, 0.0) for plan in plans]
        ratio = torch.tensor([step.unknown / size for step in now], device=device).clamp(min=1 / size)
        logits = []
        for half in halves:
            hidden = model(half.with_codes(vocabulary, codes), mask_ratio=ratio).hidden
            scores = linear(hidden, model.head.weight, model.head.bias)
            logits.append(scores[half.layout.code_rows, vocabulary.code_columns])
        uncond = {"uncond_logits": logits[1], "guidance": guidance} if guidance > 0 else {}
        noise = (seed.repeat_interleave(size), position, torch.full_like(position, k))
        sampled, confidence = sample_tokens(logits[0], *noise, temperature=temperature, **uncond)
        unknown = codes == vocabulary.mask_code
        stays = remask(
            torch.where(unknown.flatten(), confidence, math.inf),  # what is known is certain
            torch.arange(0, batch * size + 1, size, device=device),
            torch.tensor([step.keep for step in now], device=device),
            seed,
            position,
            torch.full_like(seed, k),
            torch.tensor([step.tau for step in now], device=device),
        )
        codes = torch.where(unknown & ~stays.view_as(codes), sampled.view_as(codes).long(), codes)
        if on_step is not None:
            on_step(k + 1, steps)
    return codes
