"""The plain loop with any of the engine's savings switched on: what each of them is worth by itself.

    text        keys and values of the text are computed once, image rows alone run at every step
    step 0      the first step is run once per different prompt, and once for guidance
    layer 0     the token-wise part of the first layer runs once per token drawn, not per step (text with it)
    noise       what the noise expert adds is computed once for all images of a step, not for each
    rows        the head runs on rows of unknown tokens and columns of codes only
    guidance    is folded before the head, half its work
    one pass    the head and the choice of tokens in one op, a chunk of rows at a time (guidance and columns with it)

`unif2ace/generation/denoise.py` has them all, and the static schedule, whose gain is on a GPU: no wait for numbers.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from unif2ace.generation.first_layer import FirstLayer
from unif2ace.generation.schedule import schedule_steps
from unif2ace.generation.settings import to_signed
from unif2ace.model.block import Tokenwise
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import head_sample, linear, remask, sample_tokens
from unif2ace.vocabulary import PackedBatch, pack_generation, pack_generation_step

SAVINGS = ("text", "step 0", "layer 0", "noise", "rows", "guidance", "one pass")


class Half:
    """The prompts, or as many empty ones: hidden rows of all codes, by the savings that concern them."""

    def __init__(self, model: UniF2ace, texts: Sequence[Sequence[int]], codes: Tensor, savings: Set[str]) -> None:
        self.model, self.vocabulary, self.savings, self.cache = model, model.vocabulary, savings, None
        different = list(dict.fromkeys(map(tuple, texts)))
        self.first = pack_generation(self.vocabulary, different, codes[:1].expand(len(different), -1))
        self.which = torch.tensor([different.index(tuple(text)) for text in texts])
        if savings & {"text", "layer 0"}:
            self.cache = model.new_cache(len(texts), max(map(len, texts)) + 3)
            model(pack_generation(self.vocabulary, texts), cache=self.cache)
            self.batch = pack_generation_step(self.vocabulary, codes, self.cache.lengths)
        else:
            self.batch = pack_generation(self.vocabulary, texts, codes)
        if "layer 0" in savings:
            self.layer, self.seen = FirstLayer(model, len(texts)), torch.full_like(self.batch.token_ids, -1)

    def run(self, codes: Tensor, step: int, ratio: float) -> tuple[Tensor, Tensor]:
        """Hidden rows [T, H] of a pass, and which of them belong to codes [B, N]."""
        first = step == 0 and "step 0" in self.savings
        batch = self.first if first else self.batch.with_codes(self.vocabulary, codes)
        images = len(batch.layout.sequences)
        options = {"mask_ratio": torch.full((images,), ratio), "cache": None if first else self.cache}
        if "noise" in self.savings:
            options |= {"mask_ratio": torch.tensor([ratio]), "ratio_of_image": torch.zeros(images, dtype=torch.int64)}
        if "layer 0" in self.savings and not first:
            hidden = self.model.resume(self.tokenwise(batch), batch.layout, **options).hidden
        else:
            hidden = self.model(batch, **options).hidden
        rows = batch.layout.code_rows.view(images, -1)
        return hidden, rows[self.which] if first else rows

    def tokenwise(self, batch: PackedBatch) -> Tokenwise:
        """The first layer's part of all rows, after those whose token has changed."""
        ids, positions = batch.token_ids, batch.layout.positions
        rows = (ids != self.seen).nonzero()[:, 0]
        places = rows % self.model.config.image_rows
        self.layer.update(self.model, ids[rows], places, positions[rows], rows)
        self.seen = ids
        return self.layer.read(slice(None))


@torch.no_grad()
def draw(
    model: UniF2ace,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    savings: Set[str] = frozenset(),
    *,
    steps: int = 18,
    guidance: float = 3.0,
) -> Tensor:
    """Codes [B, N] as `generate_codes` draws them, guidance > 0, nothing known."""
    vocabulary, batch, size = model.vocabulary, len(prompts), model.config.num_image_tokens
    codes = torch.full((batch, size), vocabulary.mask_code)
    halves = [Half(model, texts, codes, savings) for texts in (prompts, [()] * batch)]
    whole, columns = (model.head.weight, model.head.bias), vocabulary.code_columns
    codes_only = (model.head.weight[columns], model.head.bias[columns])

    def logits(rows: Tensor) -> Tensor:
        return linear(rows, *codes_only) if "rows" in savings else linear(rows, *whole)[:, columns]

    seed = torch.tensor([to_signed(value) for value in seeds])
    for k, step in enumerate(schedule_steps(size, steps)):
        unknown = codes == vocabulary.mask_code
        wanted = unknown if "rows" in savings else torch.ones_like(unknown)
        image, position = wanted.nonzero(as_tuple=True)
        passed = [half.run(codes, k, step.unknown / size) for half in halves]
        noise = (seed[image], position, torch.full_like(position, k))
        if savings & {"rows", "guidance", "one pass"}:
            cond, uncond = (hidden[rows[image, position]] for hidden, rows in passed)
        if "one pass" in savings:
            drawn, confidence = head_sample(cond, *codes_only, *noise, uncond_hidden=uncond, guidance=guidance)
        elif "guidance" in savings:
            drawn, confidence = sample_tokens(logits((1.0 + guidance) * cond - guidance * uncond), *noise)
        else:
            if "rows" in savings:
                scores = [logits(cond), logits(uncond)]
            else:
                scores = [logits(hidden)[rows[image, position]] for hidden, rows in passed]
            drawn, confidence = sample_tokens(scores[0], *noise, uncond_logits=scores[1], guidance=guidance)
        stays = remask(
            torch.where(unknown[image, position], confidence, torch.inf),
            torch.nn.functional.pad(wanted.sum(1).cumsum(0), (1, 0)),
            torch.full((batch,), step.keep),
            seed,
            position,
            torch.full((batch,), k),
            torch.full((batch,), step.tau),
        )
        decided = ~stays & unknown[image, position]
        codes[image[decided], position[decided]] = drawn[decided].long()
    return codes
