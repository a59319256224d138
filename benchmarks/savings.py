"""The plain loop with any of the engine's savings switched on: what each of them is worth by itself.

    text        keys and values of the text are computed once, image rows alone run at every step
    step 0      the first step is run once per different prompt, and once for guidance
    rows        the head runs on unknown tokens only
    guidance    is folded before the head, half its work
    one pass    the head and the choice of tokens in one op, a chunk of rows at a time (with `guidance`)

`unif2ace/generation/denoise.py` has them all, and the static schedule, whose gain is on a GPU: no wait for numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from unif2ace.generation.schedule import schedule_steps
from unif2ace.generation.settings import to_signed
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import head_sample, linear, remask, sample_tokens
from unif2ace.vocabulary import pack_generation, pack_generation_step

SAVINGS = ("text", "step 0", "rows", "guidance", "one pass")


class Half:
    """The prompts, or as many empty ones: hidden rows of all codes, by the savings that concern them."""

    def __init__(
        self, model: UniF2ace, texts: Sequence[Sequence[int]], codes: Tensor, savings: Collection[str]
    ) -> None:
        self.model, self.vocabulary, self.savings, self.cache = model, model.vocabulary, savings, None
        different = list(dict.fromkeys(map(tuple, texts)))
        self.first = pack_generation(self.vocabulary, different, codes[:1].expand(len(different), -1))
        self.which = torch.tensor([different.index(tuple(text)) for text in texts])
        if "text" in savings:
            self.cache = model.new_cache(len(texts), max(map(len, texts)) + 3 + model.config.image_rows)
            model(pack_generation(self.vocabulary, texts), cache=self.cache)
            self.batch = pack_generation_step(self.vocabulary, codes, self.cache.lengths)
        else:
            self.batch = pack_generation(self.vocabulary, texts, codes)

    def hidden(self, codes: Tensor, step: int, ratio: float) -> Tensor:
        """[B, N, H] for codes [B, N]."""
        if step == 0 and "step 0" in self.savings:
            ratios = torch.full((len(self.first.layout.sequences),), ratio)
            hidden = self.model(self.first, mask_ratio=ratios).hidden[self.first.layout.code_rows]
            return hidden.view(len(ratios), codes.shape[1], -1)[self.which]
        batch = self.batch.with_codes(self.vocabulary, codes)
        hidden = self.model(batch, mask_ratio=torch.full((len(codes),), ratio), cache=self.cache).hidden
        return hidden[batch.layout.code_rows].view(*codes.shape, -1)


@torch.no_grad()
def draw(
    model: UniF2ace,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    savings: Collection[str] = (),
    *,
    steps: int = 18,
    guidance: float = 3.0,
) -> Tensor:
    """Codes [B, N] as `generate_codes` draws them, guidance > 0, nothing known."""
    vocabulary, batch, size = model.vocabulary, len(prompts), model.config.num_image_tokens
    codes = torch.full((batch, size), vocabulary.mask_code)
    halves = [Half(model, texts, codes, savings) for texts in (prompts, [()] * batch)]
    weight, bias = model.head.weight[vocabulary.code_columns], model.head.bias[vocabulary.code_columns]
    seed = torch.tensor([to_signed(value) for value in seeds])
    for k, step in enumerate(schedule_steps(size, steps)):
        unknown = codes == vocabulary.mask_code
        rows = unknown if "rows" in savings else torch.ones_like(unknown)
        image, position = rows.nonzero(as_tuple=True)
        hidden = [half.hidden(codes, k, step.unknown / size)[image, position] for half in halves]
        noise = (seed[image], position, torch.full_like(position, k))
        if "one pass" in savings:
            drawn, confidence = head_sample(hidden[0], weight, bias, *noise, uncond_hidden=hidden[1], guidance=guidance)
        elif "guidance" in savings:
            folded = (1.0 + guidance) * hidden[0] - guidance * hidden[1]
            drawn, confidence = sample_tokens(linear(folded, weight, bias), *noise)
        else:
            logits = [linear(half, weight, bias) for half in hidden]
            drawn, confidence = sample_tokens(logits[0], *noise, uncond_logits=logits[1], guidance=guidance)
        stays = remask(
            torch.where(unknown[image, position], confidence, torch.inf),
            torch.nn.functional.pad(rows.sum(1).cumsum(0), (1, 0)),
            torch.full((batch,), step.keep),
            seed,
            position,
            torch.full((batch,), k),
            torch.full((batch,), step.tau),
        )
        decided = ~stays & unknown[image, position]
        codes[image[decided], position[decided]] = drawn[decided].long()
    return codes
