"""Rows of a packed batch: who sits where, who sees whom, and the index tensors that follow.

Everything here is a function of a few integers per sequence (text rows, image rows, cached rows), known on the host.
`Layout` derives index tensors from them once and keeps them, so that passes which repeat a layout (denoising steps)
derive nothing, and no pass reads a value back from the device.

Attention blocks are rectangles `(q_start, q_end, k_start, k_end, causal)`; a causal one is bottom-right aligned. Each
sequence gives at most two: text causal then image full (generation), prefix full then text causal (understanding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from unif2ace.config import TASKS
from unif2ace.errors import UserError
from unif2ace.ops.omni_attention import AttentionBlocks


@dataclass(frozen=True)
class SequenceLayout:
    """One sequence of a packed batch, in row counts.

    `text` counts text rows with their control tokens (t2i, sot, eot), `image` is N + 2 or 0. `cached` rows already lie
    in row `cache_row` of the cache.
    """

    task: str
    text: int
    image: int
    cached: int = 0
    cache_row: int = 0

    @property
    def prefix(self) -> int:
        """Rows of the fully connected understanding prefix (mmu and the image)."""
        return self.image + 1 if self.task == "understanding" and self.image else 0

    @property
    def rows(self) -> int:
        """Rows this sequence takes in the batch."""
        return self.text + (self.prefix or self.image)

    @property
    def kept(self) -> int:
        """Rows whose keys and values stay valid after this pass: all but the image rows of generation."""
        return self.cached + (self.text if self.task == "generation" else self.rows)

    def blocks(self, q: int, k: int) -> AttentionBlocks:
        """(q_start, q_end, k_start, k_end, causal) with the first row at `q`, its keys starting at `k`."""
        generation = self.task == "generation"
        first = self.text if generation else self.prefix  # generation: text, image; understanding: prefix, text
        middle, end = k + self.cached + first, k + self.cached + self.rows
        both = (q, q + first, k, middle, generation), (q + first, q + self.rows, k, end, not generation)
        return tuple(block for block in both if block[1] > block[0])


def ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Concatenation of start .. start + length - 1 over the sequences, [sum of lengths] int64, on the host."""
    begin, count = torch.tensor(starts, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
    # No Python loop over rows.
    shift = (begin - count.cumsum(0) + count).repeat_interleave(count, output_size=sum(lengths))
    return torch.arange(shift.numel()) + shift


def rotary_angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, dim / 2] in `dtype` (computed in float32), of positions [T]."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions.float()[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _blocks(sequences: Sequence[SequenceLayout], rows: Sequence[int], keys: Sequence[int]) -> AttentionBlocks:
    """Attention blocks of all sequences, whose first rows and first keys are given."""
    return tuple(chain.from_iterable(s.blocks(q, k) for s, q, k in zip(sequences, rows, keys, strict=True)))


class CacheAccess(NamedTuple):
    """What a batch stores in a cache, flattened to [rows * max_length, ...], and where it finds its keys.

    Rows that stay valid are stored; image rows of generation do not, the next step has others. If all rows stay, the
    keys are those of the cache. Else they are those of the batch, with `past` behind those of the cache.
    """

    blocks: AttentionBlocks
    slots: Tensor  # [K] where stored rows go, and
    stored: Tensor | None = None  # [K] which they are; None: all
    past: bool = False


class Layout:
    """Host-side description of a packed batch and the index tensors derived from it, each built once on first use.

    All sequences with image rows must have the same number of them.
    """

    def __init__(self, sequences: Sequence[SequenceLayout], device: torch.device | str = "cpu") -> None:
        self.sequences = tuple(sequences)
        self.device = torch.device(device)
        self.image_length = max((s.image for s in self.sequences), default=0)
        self._per_cache_length: dict[int, CacheAccess] = {}
        self._rotary: dict[tuple[int, float, torch.dtype], tuple[Tensor, Tensor]] = {}
        if any(s.image not in (0, self.image_length) for s in self.sequences):
            lengths = sorted({s.image for s in self.sequences})
            raise UserError(f"Layout: all images of a batch must have one number of tokens, got image rows {lengths}")
        if any(s.task == "understanding" and s.image and s.cached for s in self.sequences):
            raise UserError("Layout: an understanding image starts its sequence, got one behind cached rows")

    def index(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """A host list as a tensor on the device of the layout."""
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    def ranges(self, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """`ranges` on the device of the layout."""
        return ranges(starts, lengths).to(self.device, non_blocking=True)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each sequence, and the number of rows as the last entry."""
        return tuple(accumulate((s.rows for s in self.sequences), initial=0))

    @property
    def num_rows(self) -> int:
        """T."""
        return self.starts[-1]

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64, position of each row inside its sequence (cached rows count)."""
        return self.ranges([s.cached for s in self.sequences], [s.rows for s in self.sequences])

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(start, end, group) runs of consecutive rows of one task; groups are indices into `config.TASKS`."""
        runs: list[tuple[int, int, int]] = []
        for sequence, start in zip(self.sequences, self.starts, strict=False):
            group = TASKS.index(sequence.task)
            if runs and runs[-1][2] == group:
                runs[-1] = (runs[-1][0], start + sequence.rows, group)
            else:
                runs.append((start, start + sequence.rows, group))
        return tuple(runs)

    @cached_property
    def continues_text(self) -> bool:
        """True when every row is text behind cached rows: questions and the steps of answers."""
        return not self.image_length and all(s.cached for s in self.sequences)

    @cached_property
    def token_group(self) -> Tensor:
        """[T] int32: 0 understanding, 1 generation."""
        groups = torch.empty(self.num_rows, dtype=torch.int32, device=self.device)
        for start, end, group in self.segments:  # fills on the device: steps of drawing make layouts within a graph
            groups[start:end] = group
        return groups

    def _image_starts(self, task: str) -> list[int]:
        """Row of soi in every sequence of `task` that has an image."""
        pairs = zip(self.sequences, self.starts, strict=False)
        return [start + (s.text if task == "generation" else 1) for s, start in pairs if s.task == task and s.image]

    @cached_property
    def num_images(self) -> tuple[int, int]:
        """Images per task: (understanding, generation)."""
        return len(self._image_starts(TASKS[0])), len(self._image_starts(TASKS[1]))

    @cached_property
    def image_rows(self) -> Tensor:
        """[R] int64 rows soi .. eoi, *understanding images first, then generation*, each in sequence order."""
        starts = [start for task in TASKS for start in self._image_starts(task)]
        return self.ranges(starts, [self.image_length] * len(starts))

    @cached_property
    def image_rows_are_all(self) -> bool:
        """True when the batch is image rows in `image_rows` order and nothing else (a denoising step)."""
        return bool(self.sequences) and all(s.task == "generation" and s.rows == s.image for s in self.sequences)

    @cached_property
    def image_offsets(self) -> Tensor:
        """[images + 1] int32 exclusive prefix sums of image rows, in `image_rows` order."""
        return self.index([i * self.image_length for i in range(sum(self.num_images) + 1)], torch.int32)

    @cached_property
    def image_group(self) -> Tensor:
        """[images] int32 task of each image, in `image_rows` order."""
        return self.index([0] * self.num_images[0] + [1] * self.num_images[1], torch.int32)

    @cached_property
    def code_rows(self) -> Tensor:
        """[images of generation * N] int64 rows of the image codes to predict, sequence after sequence."""
        starts = self._image_starts("generation")
        return self.ranges([start + 1 for start in starts], [self.image_length - 2] * len(starts))

    @cached_property
    def last_rows(self) -> Tensor:
        """[sequences] int64 last row of each sequence: where the next token of an answer is predicted."""
        return self.index([end - 1 for end in self.starts[1:]])

    @cached_property
    def blocks(self) -> AttentionBlocks:
        """Attention blocks when the keys are the rows of this batch (no cache)."""
        return _blocks(self.sequences, self.starts[:-1], self.starts[:-1])

    def cache_access(self, max_length: int) -> CacheAccess:
        """How this batch uses a cache of `max_length` rows per sequence."""
        if max_length not in self._per_cache_length:
            self._per_cache_length[max_length] = self._cache_access(max_length)
        return self._per_cache_length[max_length]

    def _cache_access(self, max_length: int) -> CacheAccess:
        sequences, starts = self.sequences, self.starts[:-1]
        bases = [s.cache_row * max_length for s in sequences]
        stored = [s.kept - s.cached for s in sequences]  # the first rows of a sequence stay, if any
        slots = self.ranges([base + s.cached for s, base in zip(sequences, bases, strict=True)], stored)
        if sum(stored) == self.num_rows:
            return CacheAccess(_blocks(sequences, starts, bases), slots)
        blocks, past = self.blocks, any(s.cached for s in sequences)
        if past:
            triples = zip(sequences, starts, bases, strict=True)
            blocks = tuple(  # keys of the batch as if nothing were cached, then where the cached ones are
                (*block, base, base + s.cached)
                for s, start, base in triples
                for block in replace(s, cached=0).blocks(start, start)
            )
        return CacheAccess(blocks, slots, self.ranges(starts, stored), past)

    def rotary(self, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`rotary_angles` of the positions of this batch."""
        key = (dim, theta, dtype)
        if key not in self._rotary:
            self._rotary[key] = rotary_angles(self.positions, dim, theta, dtype)
        return self._rotary[key]

    def to(self, device: torch.device | str) -> Layout:
        """The same layout for another device."""
        return self if torch.device(device) == self.device else Layout(self.sequences, device)
