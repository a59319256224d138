"""What a denoising step needs to know, worked out on the host: index tensors that depend on the schedule alone.

Example: N = 4, so an image has 6 rows, 0 (soi) to 5 (eoi). An image in slot 1 of 2, with guidance, is at a step that
draws its 3 unknown tokens and leaves 1 of them unknown; the step before drew one. Say tokens 1, 3 and 4 are unknown
(only the device knows): `Slots.order` holds [1, 3, 4, 2, 0, 5] from place 6 on, the token drawn last behind them.

    sequences      conditional half in cache row 1, unconditional half in cache row 2 + 1: rows 0 .. 5 and 6 .. 11
    mask_ratio     [3 / 4]              the different ones, and
    ratio_of_image [0, 0]               which of them each half has
    changed        [9, 9]               one token is new, in both halves: order[9] = 2
    wanted         [6, 7, 8, 6, 7, 8]   hidden rows are wanted of tokens 1, 3, 4, each at
    wanted_row     [0, 0, 0, 6, 6, 6]   this row of the pass + order[wanted]
    cond, uncond   [0, 1, 2] [3, 4, 5]  where the two hidden rows of each unknown token are then
    unknown        [6, 7, 8]            the tokens to draw
    stays_at       [6, 6, 6]            the first token that stays moves to place 6 of `order`, a second would to 7, ..
    drawn_at       [7, 8, 9]            and those drawn behind the one that stays: 7, 8 (less those that stay before)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from unif2ace.generation.slots import Drawing, Slots
from unif2ace.layout import Layout, SequenceLayout, ranges


@dataclass(frozen=True)
class StepPlan:
    """One step of B images with R unknown tokens in all. S sequences pass, of which C rows changed and F are wanted.

    Hidden rows are picked from a table: first those of this step's pass, then those of the `prefixes` of images at
    their first step.
    """

    layout: Layout | None  # None: no image needs a pass
    halves: slice | Tensor  # rows of the cache, one for each sequence: a range or [S]
    mask_ratio: Tensor  # [D] different ones
    ratio_of_image: Tensor  # [S] in 0 .. D - 1
    changed: Tensor  # [C] into Slots.order: rows whose token the last step has drawn, and for row 0 of their image
    changed_token: Tensor  # [C] its place in Slots.tokens,
    changed_position: Tensor  # [C] its position in the sequence and
    changed_row: Tensor  # [C] its row in FirstLayer
    wanted: Tensor  # [F] into Slots.order, and
    wanted_row: Tensor  # [F] the first row of that sequence in the pass
    prefixes: tuple[Tensor, ...]
    cond: Tensor  # [R] into the table of hidden rows, and
    uncond: Tensor  # [R] the same for guidance
    groups: tuple[tuple[int, int, float, float], ...]  # tokens first to last share a guidance and a temperature
    unknown: Tensor  # [R] into Slots.order
    token: Tensor  # [R] into Slots.tokens, for row 0
    stays_at: Tensor  # [R] where in Slots.order it goes if it stays unknown, but for those that stay before it, or
    drawn_at: Tensor  # [R] if it does not, but for those that stay before it
    image: Tensor  # [R] 0 .. B - 1
    slot: Tensor  # [B]
    number: Tensor  # [B] of the step
    keep: Tensor  # [B] tokens that stay unknown
    offsets: Tensor  # [B + 1]
    tau: Tensor  # [B]


def plan_step(slots: Slots, drawings: Sequence[Drawing]) -> StepPlan:
    """The next step of these images, of which none is finished. Host work, and one copy to the device."""
    drawings = sorted(drawings, key=_sampling)
    rows = slots.rows
    passing = [(d, row, prefix.text[0].shape[1]) for d in drawings if d.done for row, prefix in d.halves(slots.count)]
    passing.sort(key=lambda half: half[1])  # if all slots pass, their rows of the cache are a range
    sequences = [SequenceLayout("generation", 0, rows, cached=text, cache_row=row) for _, row, text in passing]

    # Where the hidden rows of each half (by its row of the cache) begin in the table.
    begin, shared, size = {}, {}, 0
    for d, row, _ in passing:
        begin[row] = size
        size += d.step.unknown
    for row, prefix in (half for d in drawings if not d.done for half in d.halves(slots.count)):
        if id(prefix) not in shared:
            shared[id(prefix)] = size, prefix.hidden
            size += len(prefix.hidden)
        begin[row] = shared[id(prefix)][0]

    unknown = [d.step.unknown for d in drawings]
    keep = [d.step.keep for d in drawings]
    kept = list(accumulate(keep, initial=0))  # by the images before
    offsets = list(accumulate(unknown, initial=0))
    wanted = [d.step.unknown for d, *_ in passing]
    different = list(dict.fromkeys(wanted))
    drawn = [d.drawn for d, *_ in passing]
    host = {
        "changed": ranges([d.slot * rows + d.step.unknown for d, *_ in passing], drawn),
        "changed_token": _repeat([d.slot * rows for d, *_ in passing], drawn),
        "changed_position": _repeat([text for *_, text in passing], drawn),
        "changed_row": _repeat([row * rows for _, row, _ in passing], drawn),
        "wanted": ranges([d.slot * rows for d, *_ in passing], wanted),
        "wanted_row": _repeat([i * rows for i in range(len(passing))], wanted),
        "cond": ranges([begin[d.slot] for d in drawings], unknown),
        "uncond": ranges([begin.get(slots.count + d.slot, 0) for d in drawings], unknown),
        "unknown": ranges([d.slot * rows for d in drawings], unknown),
        "token": _repeat([d.slot * rows for d in drawings], unknown),
        "stays_at": _repeat([d.slot * rows - before for d, before in zip(drawings, kept, strict=False)], unknown),
        "drawn_at": ranges([d.slot * rows + after for d, after in zip(drawings, kept[1:], strict=True)], unknown),
        "image": _repeat(list(range(len(drawings))), unknown),
        "slot": torch.tensor([d.slot for d in drawings]),
        "number": torch.tensor([d.done for d in drawings]),
        "keep": torch.tensor(keep),
        "offsets": torch.tensor(offsets),
        "ratio_of_image": torch.tensor([different.index(n) for n in wanted], dtype=torch.int64),
    }
    device = slots.tokens.device
    moved = torch.cat(list(host.values())).to(device, non_blocking=True).split([len(x) for x in host.values()])
    edges = [i for i, d in enumerate(drawings) if not i or _sampling(d) != _sampling(drawings[i - 1])]
    return StepPlan(
        layout=slots.layout(sequences) if sequences else None,
        halves=_range_or_indices([sequence.cache_row for sequence in sequences], device),
        mask_ratio=torch.tensor([n / (rows - 2) for n in different], dtype=torch.float32).to(device, non_blocking=True),
        prefixes=tuple(hidden for _, hidden in shared.values()),
        groups=tuple(
            (offsets[first], offsets[last], *_sampling(drawings[first]))
            for first, last in zip(edges, [*edges[1:], len(drawings)], strict=True)
        ),
        tau=torch.tensor([d.step.tau for d in drawings], dtype=torch.float32).to(device, non_blocking=True),
        **dict(zip(host, moved, strict=True)),
    )


def _sampling(drawing: Drawing) -> tuple[float, float]:
    return drawing.guidance, drawing.temperature


def _range_or_indices(values: list[int], device: torch.device) -> slice | Tensor:
    """Increasing values as a slice where they are a range, else [len(values)] int64 on the device."""
    if not values or values[-1] - values[0] == len(values) - 1:
        return slice(values[0], values[-1] + 1) if values else slice(0, 0)
    return torch.tensor(values).to(device, non_blocking=True)


def _repeat(values: Sequence[int], counts: Sequence[int]) -> Tensor:
    """values[i] counts[i] times, [sum of counts] int64."""
    times = torch.tensor(counts, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64).repeat_interleave(times, output_size=sum(counts))
