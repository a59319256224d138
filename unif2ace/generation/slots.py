"""The images being drawn: what the host knows of each (`Drawing`), and the memory that holds them (`Slots`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unif2ace.generation.first_layer import FirstLayer
from unif2ace.generation.prefix import Prefix
from unif2ace.generation.schedule import Step
from unif2ace.generation.settings import to_signed
from unif2ace.layout import Layout, SequenceLayout
from unif2ace.model.transformer import UniF2ace


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

    def halves(self, count: int) -> list[tuple[int, Prefix]]:
        """(row of the cache, prefix) of the conditional half and, with guidance, of the other; `count` slots."""
        both = [(self.slot, self.cond), (count + self.slot, self.uncond)]
        return [(row, prefix) for row, prefix in both if prefix is not None]

    @property
    def drawn(self) -> int:
        """How many tokens the last step has drawn."""
        return self.steps[self.done - 1].unknown - self.step.unknown


class Slots:
    """Memory for up to `count` images being drawn, on the device of the model.

    `tokens` [count, N + 2]: ids of the image rows. `order` [count * (N + 2)]: for each slot its image rows 0 .. N + 1,
    those of unknown tokens first and ascending. The cache, of the texts, and `first_layer`, of the images, have a row
    for the conditional half of each slot and, from row `count` on, one for the unconditional half of each.
    """

    def __init__(self, model: UniF2ace, count: int, max_prompt_tokens: int) -> None:
        vocabulary, device, rows = model.vocabulary, model.head.weight.device, model.config.image_rows
        self.count, self.rows = count, rows
        self.code_start, self.mask = vocabulary.code_start, vocabulary.mask
        self.tokens = torch.full((count, rows), vocabulary.mask, device=device)
        self.tokens[:, 0], self.tokens[:, -1] = vocabulary.control("soi"), vocabulary.control("eoi")
        self.order = torch.zeros(count * rows, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self.cache = model.new_cache(2 * count, max_prompt_tokens + 3)
        self.first_layer = FirstLayer(model, 2 * count)
        self._layout = Layout([], device)

    def start(self, drawing: Drawing, seed: int, codes: Tensor) -> None:
        """Put a new image into its slot: codes [N] on the host, `mask_code` where unknown."""
        slot, device = drawing.slot, self.tokens.device
        known = torch.ones(self.rows, dtype=torch.int64)
        known[1:-1] = codes + self.code_start != self.mask
        self.tokens[slot, 1:-1] = (codes + self.code_start).to(device)
        self.order[slot * self.rows :][: self.rows] = known.argsort(stable=True).to(device)
        self.seeds[slot] = to_signed(seed)
        for row, prefix in drawing.halves(self.count):
            self.cache.write_row(row, prefix.text)
            self.first_layer.kept[row] = prefix.first

    def codes(self, slot: int) -> Tensor:
        """[N] int64 on the device, `mask_code` where unknown."""
        return self.tokens[slot, 1:-1] - self.code_start

    def layout(self, sequences: list[SequenceLayout]) -> Layout:
        """The layout of these sequences; the last one is kept, for steps that repeat it."""
        if self._layout.sequences != tuple(sequences):
            self._layout = Layout(sequences, self.tokens.device)
        return self._layout
