"""One denoising step for any images that are being drawn, each at a step of its own.

The codes are those of plain.py; the work is less, by savings that are exact:

    text               keys and values computed once per prompt, the empty prompt's once per model        prefix.py
    step 0             computed once per prompt, without guidance's half: that one is a constant          prefix.py
    guidance           folded before the head, which is linear: z = W [(1 + w) h_c - w h_u] + b           head_sample
    head, last norm    on rows of unknown tokens only, two thirds of them on average
    sampling           one pass over the logits of a chunk of rows, while they are in the cache           head_sample
    schedule           numbers of unknown tokens follow from the schedule alone, see below

Not among them: the last layer's query and feed-forward of known rows. Nobody reads those rows, but the sequence-level
router of the last layer pools over all rows of an image.

**Static shapes.** How many tokens are unknown at a step is known before the first one (schedule.py), so every index
that does not depend on drawn tokens is computed on the host, in `plan_step`; `run_step` launches kernels of known
shapes and never reads a number back. Which tokens are unknown is kept on the device: `Slots.unknown` lists their
positions, and a step moves those that stay to the front. So the loop over all steps can be captured as one CUDA graph.

**Bits.** All rows run through the same products, and rows are added where there are too few for a product to give a
row the same bits in any company (`prefix.invariant_rows`). A face is then the same whoever shares its batch.

Cost per step: images * (N + 2) rows, twice that with guidance, through the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from unif2ace.generation.prefix import Prefix, invariant_rows
from unif2ace.generation.schedule import Step
from unif2ace.generation.settings import to_signed
from unif2ace.layout import Layout, SequenceLayout, ranges
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import head_sample, remask
from unif2ace.vocabulary import PackedBatch


@dataclass(frozen=True)
class Drawing:
    """An image in slot `slot`: its prefixes (`uncond` None: no guidance) and its steps, of which `done` are done."""

    slot: int
    steps: tuple[Step, ...]
    cond: Prefix
    uncond: Prefix | None = None
    guidance: float = 0.0
    temperature: float = 1.0
    done: int = 0

    @property
    def step(self) -> Step:
        """The step to run next."""
        return self.steps[self.done]


class Slots:
    """Memory for up to `count` images being drawn, on the device of the model.

    `tokens` [count, N + 2]: ids of the image rows. `unknown` [count * N + 1]: positions of the unknown tokens of each
    slot, ascending, from slot * N on; its last element takes what is to be forgotten. The cache has a row for each
    slot, one for its unconditional half (from row `count` on), and spare ones for rows that are added.
    """

    def __init__(self, model: UniF2ace, count: int, max_prompt_tokens: int) -> None:
        vocabulary, device, rows = model.vocabulary, model.head.weight.device, model.config.image_rows
        self.count, self.size = count, model.config.num_image_tokens
        self.min_sequences = -(-invariant_rows(model.config) // rows)
        self.code_start, self.mask = vocabulary.code_start, vocabulary.mask
        # One more slot than images: an all-unknown one for added rows.
        self.tokens = torch.full((count + 1, rows), vocabulary.mask, device=device)
        self.tokens[:, 0], self.tokens[:, -1] = vocabulary.control("soi"), vocabulary.control("eoi")
        self.unknown = torch.zeros(count * self.size + 1, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self.cache = model.new_cache(2 * count + self.min_sequences - 1, max_prompt_tokens + 3 + rows)
        self._layout = Layout([], device)

    def start(self, drawing: Drawing, seed: int, codes: Tensor) -> None:
        """Put a new image into its slot: codes [N] on the host, `mask_code` where unknown."""
        slot, device = drawing.slot, self.tokens.device
        unknown = (codes + self.code_start == self.mask).nonzero()[:, 0]
        self.tokens[slot, 1:-1] = (codes + self.code_start).to(device)
        self.unknown[slot * self.size :][: len(unknown)] = unknown.to(device)
        self.seeds[slot] = to_signed(seed)
        self.cache.write_row(slot, drawing.cond.text)
        if drawing.uncond is not None:
            self.cache.write_row(self.count + slot, drawing.uncond.text)

    def codes(self, slot: int) -> Tensor:
        """[N] int64 on the device, `mask_code` where unknown."""
        return self.tokens[slot, 1:-1] - self.code_start

    def layout(self, sequences: list[SequenceLayout]) -> Layout:
        """The layout of these sequences; the last one is kept, for steps that repeat it."""
        if self._layout.sequences != tuple(sequences):
            self._layout = Layout(sequences, self.tokens.device)
        return self._layout


@dataclass(frozen=True)
class StepPlan:
    """All that one step needs to know beside the tokens: B images, R unknown tokens, S sequences, F hidden rows wanted.

    Hidden rows are picked from a table: first those of this step's pass, then those of the `prefixes` of images at
    their first step.
    """

    layout: Layout | None  # None: no image needs a pass
    sequence_slot: Tensor  # [S]
    mask_ratio: Tensor  # [S]
    wanted: Tensor  # [F] into Slots.unknown, and
    wanted_row: Tensor  # [F] the row of position 0 of that sequence
    prefixes: tuple[Tensor, ...]
    cond: Tensor  # [R] into the table of hidden rows, and
    uncond: Tensor  # [R] the same for guidance
    groups: tuple[tuple[int, int, float, float], ...]  # rows first to last share a guidance and a temperature
    unknown: Tensor  # [R] into Slots.unknown
    token: Tensor  # [R] into Slots.tokens, for position 0
    target: Tensor  # [R] where in Slots.unknown the image's first token that stays goes, less those before it
    image: Tensor  # [R] 0 .. B - 1
    slot: Tensor  # [B]
    number: Tensor  # [B] of the step
    keep: Tensor  # [B]
    offsets: Tensor  # [B + 1]
    tau: Tensor  # [B]


def plan_step(slots: Slots, drawings: Sequence[Drawing]) -> StepPlan:
    """The next step of these images, of which none is finished. Host work, and one copy to the device."""
    drawings = sorted(drawings, key=lambda d: (d.guidance, d.temperature))
    size, rows = slots.size, slots.size + 2
    passing = [d for d in drawings if d.done]
    guided = [d for d in passing if d.uncond is not None]
    halves = [(d, d.slot, d.cond) for d in passing] + [(d, slots.count + d.slot, d.uncond) for d in guided]
    sequences = [
        SequenceLayout("generation", 0, rows, cached=prefix.text[0].shape[1], cache_row=row)
        for _, row, prefix in halves
    ]
    added = max(0, slots.min_sequences - len(sequences)) if sequences else 0
    sequences += [SequenceLayout("generation", 0, rows, cache_row=2 * slots.count + i) for i in range(added)]

    # The table of hidden rows: where the rows of each half of each image begin.
    begin = list(accumulate((d.step.unknown for d, *_ in halves), initial=0))
    place = {("cond", d.slot): at for d, at in zip(passing, begin, strict=False)}
    place |= {("uncond", d.slot): at for d, at in zip(guided, begin[len(passing) :], strict=False)}
    at, tables = begin[-1], {}
    for d in drawings:
        if not d.done:
            for half, prefix in (("cond", d.cond), ("uncond", d.uncond)):
                if prefix is not None and id(prefix) not in tables:
                    tables[id(prefix)] = at, prefix.hidden
                    at += len(prefix.hidden)
                if prefix is not None:
                    place[half, d.slot] = tables[id(prefix)][0]

    counts = [d.step.unknown for d in drawings]
    keeps = [d.step.keep for d in drawings]
    offsets = list(accumulate(counts, initial=0))
    kept = list(accumulate(keeps, initial=0))
    half_counts = [d.step.unknown for d, *_ in halves]

    def per_row(values: list[int], repeats: list[int]) -> Tensor:
        times = torch.tensor(repeats, dtype=torch.int64)
        return torch.tensor(values, dtype=torch.int64).repeat_interleave(times, output_size=sum(repeats))

    host = {
        "sequence_slot": torch.tensor([d.slot for d, *_ in halves] + [slots.count] * added, dtype=torch.int64),
        "wanted": ranges([d.slot * size for d, *_ in halves], half_counts),
        "wanted_row": per_row([i * rows + 1 for i in range(len(halves))], half_counts),
        "cond": ranges([place["cond", d.slot] for d in drawings], counts),
        "uncond": ranges([place.get(("uncond", d.slot), 0) for d in drawings], counts),
        "unknown": ranges([d.slot * size for d in drawings], counts),
        "token": per_row([d.slot * rows + 1 for d in drawings], counts),
        "target": per_row([d.slot * size - before for d, before in zip(drawings, kept, strict=False)], counts),
        "image": per_row(list(range(len(drawings))), counts),
        "slot": torch.tensor([d.slot for d in drawings]),
        "number": torch.tensor([d.done for d in drawings]),
        "keep": torch.tensor(keeps),
        "offsets": torch.tensor(offsets),
    }
    device = slots.tokens.device
    moved = torch.cat(list(host.values())).to(device, non_blocking=True).split([len(x) for x in host.values()])
    edges = [i for i, d in enumerate(drawings) if not i or _sampling(d) != _sampling(drawings[i - 1])]
    ratios = [d.step.unknown / size for d, *_ in halves] + [1.0] * added
    return StepPlan(
        layout=slots.layout(sequences) if sequences else None,
        mask_ratio=torch.tensor(ratios, dtype=torch.float32).to(device, non_blocking=True),
        prefixes=tuple(hidden for _, hidden in tables.values()),
        groups=tuple(
            (offsets[first], offsets[last], *_sampling(drawings[first]))
            for first, last in zip(edges, [*edges[1:], len(drawings)], strict=True)
        ),
        tau=torch.tensor([d.step.tau for d in drawings], dtype=torch.float32).to(device, non_blocking=True),
        **dict(zip(host, moved, strict=True)),
    )


def _sampling(drawing: Drawing) -> tuple[float, float]:
    return drawing.guidance, drawing.temperature


@torch.no_grad()
def run_step(model: UniF2ace, slots: Slots, plan: StepPlan) -> None:
    """Draw every unknown token of the images of the plan, and make the least certain ones unknown again."""
    position = slots.unknown[plan.unknown]
    table = list(plan.prefixes)
    if plan.layout is not None:
        batch = PackedBatch(slots.tokens[plan.sequence_slot].flatten(), plan.layout)
        rows = plan.wanted_row + slots.unknown[plan.wanted]
        passed = model(batch, mask_ratio=plan.mask_ratio, cache=slots.cache, rows=rows)
        table.insert(0, passed.hidden)
    hidden = torch.cat(table) if len(table) > 1 else table[0]

    columns = model.vocabulary.code_columns
    weight, bias = model.head.weight[columns], model.head.bias[columns]
    seed, number = slots.seeds[plan.slot], plan.number
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
    slots.tokens.view(-1).scatter_(0, plan.token + position, ids)
    # A stable compaction: the i-th token that stays goes to place i. Those that do not go to the last element.
    target = torch.where(stays, plan.target + stays.cumsum(0) - 1, len(slots.unknown) - 1)
    slots.unknown.scatter_(0, target, position)
