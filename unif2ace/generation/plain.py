"""Text to face, the loop of the paper written plainly: masked discrete diffusion over the codes of an image.

Start with every wanted code unknown. Each step runs the transformer over the image rows (the text's keys and values
are cached, they never change), samples all unknown codes at once, and re-masks the least certain ones as the schedule
says. Noise depends on the request's seed, the position and the step alone, so a face draws the same noise in any
batch; what the batch still changes is the last bit of matrix products of another size, which can flip a token.

Cost: steps * 2 (with guidance) * images * (N + 2) rows through the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.generation.schedule import Step, schedule_steps
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import linear, remask, sample_tokens
from unif2ace.vocabulary import pack_generation, pack_generation_step


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
    backend: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Codes [B, N] int64 for one image per prompt (token ids) and seed.

    Args:
        guidance: classifier-free guidance w >= 0, z = (1 + w) z_cond - w z_uncond; 0 runs the conditional half only.
        temperature: of the token choice; 0 is greedy. tau: initial scale of the re-masking noise.
        known_codes [B, N], known [B, N] bool: codes to keep (in-painting); they are never touched.
        on_step(done, total): called after each step.
    """
    vocabulary, device = model.vocabulary, model.head.weight.device
    batch, size = len(prompts), model.config.num_image_tokens
    unknown = torch.ones(batch, size, dtype=torch.bool, device=device) if known is None else ~known.to(device)
    codes = torch.full((batch, size), vocabulary.mask_code, device=device)
    if known is not None:
        if known_codes is None or known_codes.shape != codes.shape or known.shape != codes.shape:
            raise UserError(f"generate: known codes and their mask must be [{batch}, {size}], got {list(known.shape)}")
        codes = torch.where(unknown, codes, known_codes.to(device))
    plans = [schedule_steps(n, steps, tau=tau, num_tokens=size, schedule=schedule) for n in unknown.sum(1).tolist()]

    # Text first, once: conditional prompts, then the empty prompt for every image when guidance is on.
    texts = [list(prompt) for prompt in prompts] + ([[]] * batch if guidance > 0 else [])
    prefix = pack_generation(vocabulary, texts, None).to(device)
    cache = model.new_cache(len(texts), max(map(len, texts)) + 3 + model.config.image_rows)
    model(prefix, cache=cache)
    step_batch = pack_generation_step(vocabulary, codes.repeat(len(texts) // batch, 1), cache.lengths)

    seed_of = torch.tensor([to_signed(seed) for seed in seeds], device=device)
    columns = vocabulary.code_columns
    weight, bias = model.head.weight[columns], model.head.bias[columns]
    for k in range(steps):
        now = [plan[k] if k < len(plan) else Step(0, 0, 0.0) for plan in plans]
        image, position = unknown.nonzero(as_tuple=True)
        if not len(image):
            break
        halves = len(texts) // batch
        ratio = torch.tensor([step.unknown / size for step in now], device=device).clamp(min=1 / size).repeat(halves)
        hidden = model(step_batch.with_codes(vocabulary, codes.repeat(halves, 1)), mask_ratio=ratio, cache=cache).hidden
        hidden = hidden[step_batch.layout.code_rows].view(halves, batch, size, -1)
        logits = [linear(half[image, position], weight, bias) for half in hidden]
        step = torch.full_like(position, k)
        sampled, confidence = sample_tokens(
            logits[0],
            seed_of[image],
            position,
            step,
            temperature=temperature,
            uncond_logits=logits[1] if halves == 2 else None,
            guidance=guidance,
            backend=backend,
        )
        counts = torch.tensor([0, *(entry.unknown for entry in now)], device=device)
        stays = remask(
            confidence,
            counts.cumsum(0).int(),
            torch.tensor([entry.keep for entry in now], dtype=torch.int32, device=device),
            seed_of,
            position,
            torch.full_like(seed_of, k),
            torch.tensor([entry.tau for entry in now], device=device),
            backend=backend,
        )
        decided = ~stays
        codes[image[decided], position[decided]] = sampled[decided].long()
        unknown[image[decided], position[decided]] = False
        if on_step is not None:
            on_step(k + 1, steps)
    return codes


def to_signed(seed: int) -> int:
    """A 64-bit seed as the int64 with the same bits."""
    return (seed + 2**63) % 2**64 - 2**63
