"""One denoising step for any images that are being drawn, each at a step of its own.

The codes are those of plain.py; the work is less, by savings that are exact:

    text               keys and values computed once per prompt, the empty prompt's once per model        prefix.py
    step 0             computed once per prompt, without guidance's half: that one is a constant          prefix.py
    first layer        its token-wise part once per token drawn, not per step                       first_layer.py
    noise expert       what it adds, a function of the mask ratio, once per different ratio       model/sequence_moe.py
    guidance           folded before the head, which is linear: z = W [(1 + w) h_c - w h_u] + b           head_sample
    head, last norm    on rows of unknown tokens only, two thirds of them on average
    sampling           one pass over the logits of a chunk of rows, while they are in the cache           head_sample
    schedule           numbers of unknown tokens follow from the schedule alone, see below

Not among them: the last layer's query and feed-forward of known rows. Nobody reads those rows, but the sequence-level
router of the last layer pools over all rows of an image.

**Static shapes.** How many tokens are unknown at a step is known before the first one (schedule.py), so every index
that does not depend on drawn tokens is computed on the host, in `plan_step`; `run_step` launches kernels of known
shapes and never reads a number back. Which tokens are unknown is kept on the device: `Slots.order` has them first, and
a step moves those it draws behind those that stay. So the loop over all steps can be captured as one CUDA graph.

**Bits.** Which product a row runs through depends on its own image alone, and the products give a row the same bits in
any company (`ops/linear.py`, `ops.expert_mlp`). A face is then the same whoever shares its batch.

Cost per step: images * (N + 2) rows, twice that with guidance, through the transformer.
"""

from __future__ import annotations

import torch

from unif2ace.generation.plan import StepPlan
from unif2ace.generation.slots import Slots
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import head_sample, remask


@torch.no_grad()
def run_step(model: UniF2ace, slots: Slots, plan: StepPlan) -> None:
    """Draw every unknown token of the images of the plan, and make the least certain ones unknown again."""
    table = list(plan.prefixes)
    if plan.layout is not None:
        row = slots.order[plan.changed]
        tokens = slots.tokens.view(-1)[plan.changed_token + row]
        slots.first_layer.update(model, tokens, row, plan.changed_position + row, plan.changed_row + row)
        passed = model.resume(
            slots.first_layer.read(plan.halves),
            plan.layout,
            mask_ratio=plan.mask_ratio,
            ratio_of_image=plan.ratio_of_image,
            cache=slots.cache,
            rows=plan.wanted_row + slots.order[plan.wanted],
        )
        table.insert(0, passed.hidden)
    hidden = torch.cat(table) if len(table) > 1 else table[0]

    columns = model.vocabulary.code_columns
    weight, bias = model.head.weight[columns], model.head.bias[columns]
    seed, number = slots.seeds[plan.slot], plan.number
    row = slots.order[plan.unknown]
    position = row - 1
    row_seed, row_number = seed[plan.image], number[plan.image]
    drawn = []
    for first, last, guidance, temperature in plan.groups:
        part = slice(first, last)
        drawn.append(
            head_sample(
                hidden.index_select(0, plan.cond[part]),
                weight,
                bias,
                row_seed[part],
                position[part],
                row_number[part],
                temperature=temperature,
                uncond_hidden=hidden.index_select(0, plan.uncond[part]) if guidance > 0 else None,
                guidance=guidance,
            )
        )
    codes, confidence = drawn[0] if len(drawn) == 1 else map(torch.cat, zip(*drawn, strict=True))
    stays = remask(confidence, plan.offsets, plan.keep, seed, position, number, plan.tau)

    ids = torch.where(stays, slots.mask, codes.long() + slots.code_start)
    slots.tokens.view(-1).scatter_(0, plan.token + row, ids)
    # A stable partition of each image's tokens: those that stay, then those drawn.
    before = stays.cumsum(0)
    slots.order.scatter_(0, torch.where(stays, plan.stays_at + before - 1, plan.drawn_at - before), row)
