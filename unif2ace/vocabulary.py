"""One token space for text, control and image tokens, and how sequences are packed into one flat batch.

    0 .. n_text-1      text (`end_of_text` serves as sot and as eot)
    n_text + 0..9      pad soi eoi sov eov t2i mmu t2v v2v lvg
    n_text + 10 ..     image codes, codebook_size of them
    last               mask

Two layouts (N codes of a square grid, row major):

    generation      [t2i][sot] text [eot] | [soi] codes*N [eoi]
    understanding   [mmu] | [soi] codes*N [eoi] | [sot] text [eot]

A batch is *packed*: all sequences lie one after the other in one axis of T rows, with no pads, so every row-wise layer
is one plain matrix product and ragged texts cost nothing. Who may see whom is a list of rectangular attention blocks
per sequence (never a mask tensor):

    generation      text: causal over text            image rows: all text and all image rows
    understanding   mmu + image rows: each other      text: causal over everything before it

*Image rows* are soi, the N codes and eoi; in understanding the row of mmu belongs to the full block but is no image
row.

Sequences may continue a key/value cache: `cached` rows of the sequence are already in row `cache_row` of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from unif2ace.config import UniF2aceConfig
from unif2ace.errors import UserError
from unif2ace.layout import Layout, SequenceLayout

CONTROL_TOKENS = ("pad", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")


@dataclass(frozen=True)
class Vocabulary:
    """The unified ids. `n_text` counts every id of the text tokenizer; `end_of_text` is its `<|endoftext|>`."""

    n_text: int
    codebook_size: int
    end_of_text: int

    @classmethod
    def of(cls, config: UniF2aceConfig) -> Vocabulary:
        """The vocabulary of a model configuration."""
        return cls(config.n_text, config.codebook_size, config.end_of_text)

    def control(self, name: str) -> int:
        """Id of a control token, by name."""
        if name not in CONTROL_TOKENS:
            raise UserError(f"Vocabulary: unknown control token {name!r}, expected one of {', '.join(CONTROL_TOKENS)}")
        return self.n_text + CONTROL_TOKENS.index(name)

    @property
    def sot(self) -> int:
        """Start of text (the same id as `eot`)."""
        return self.end_of_text

    @property
    def eot(self) -> int:
        """End of text."""
        return self.end_of_text

    @property
    def code_start(self) -> int:
        """Id of image code 0."""
        return self.n_text + len(CONTROL_TOKENS)

    @property
    def code_columns(self) -> slice:
        """The columns of the language-model head that score image codes."""
        return slice(self.code_start, self.code_start + self.codebook_size)

    @property
    def mask(self) -> int:
        """Id of the mask token."""
        return self.code_start + self.codebook_size

    @property
    def mask_code(self) -> int:
        """The mask as a *code index* (one past the last code), so that `code_start + codes` covers both."""
        return self.codebook_size

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.mask + 1


@dataclass(frozen=True)
class PackedBatch:
    """`token_ids` [T] int64 and the `layout` they follow."""

    token_ids: Tensor
    layout: Layout

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy on another device."""
        return PackedBatch(self.token_ids.to(device), self.layout.to(device))

    def with_codes(self, vocabulary: Vocabulary, codes: Tensor) -> PackedBatch:
        """The same generation batch with other codes [B, N] (`mask_code` = unknown); derived tensors are shared."""
        if codes.numel() != len(self.layout.code_rows):
            raise UserError(
                f"with_codes: codes must be [B, N] with {len(self.layout.code_rows)} entries, got {list(codes.shape)}"
            )
        ids = self.token_ids.clone()
        ids[self.layout.code_rows] = codes.reshape(-1) + vocabulary.code_start
        return PackedBatch(ids, self.layout)


def _fill(
    vocabulary: Vocabulary, sequences: list[SequenceLayout], lead: list[list[int]], codes: Tensor | None
) -> PackedBatch:
    """Token ids from per-sequence text rows (`lead`) and codes [B, N]; one vectorised write per kind of row."""
    layout = Layout(sequences, codes.device if codes is not None else "cpu")
    ids = torch.empty(layout.num_rows, dtype=torch.int64, device=layout.device)
    pairs = list(zip(sequences, layout.starts, strict=False))
    text_rows = layout.ranges([start + s.prefix for s, start in pairs], [s.text for s in sequences])
    ids[text_rows] = layout.index(list(chain.from_iterable(lead)))
    if codes is not None:
        soi, eoi, mmu = (torch.tensor([vocabulary.control(name)]) for name in ("soi", "eoi", "mmu"))
        frame = torch.cat([soi, eoi]).to(layout.device).expand(len(codes), 2)
        image = torch.cat([frame[:, :1], codes + vocabulary.code_start, frame[:, 1:]], dim=1)
        ids[layout.image_rows] = image.reshape(-1)
        prefixed = [start for s, start in pairs if s.prefix]
        if prefixed:
            ids[layout.index(prefixed)] = mmu.to(layout.device)
    return PackedBatch(ids, layout)


def _check_texts(name: str, vocabulary: Vocabulary, texts: Sequence[Sequence[int]], count: int | None) -> None:
    if count is not None and len(texts) != count:
        raise UserError(f"{name}: expected one text per image, got {len(texts)} texts and {count} images")
    low = min((min(text) for text in texts if text), default=0)
    high = max((max(text) for text in texts if text), default=0)
    if low < 0 or high >= vocabulary.n_text:
        raise UserError(f"{name}: text ids must lie in 0..{vocabulary.n_text - 1}, got {low if low < 0 else high}")


def _check_codes(name: str, vocabulary: Vocabulary, codes: Tensor) -> Tensor:
    if codes.dim() != 2 or codes.dtype not in (torch.int64, torch.int32):
        raise UserError(f"{name}: codes must be integers [B, N], got {list(codes.shape)} {codes.dtype}")
    if codes.device.type == "cpu" and codes.numel():  # reading values on a GPU would wait for it
        low, high = (int(value) for value in codes.aminmax())
        if low < 0 or high > vocabulary.mask_code:
            raise UserError(
                f"{name}: codes must lie in 0..{vocabulary.mask_code} (the last is the mask), got {low}..{high}"
            )
    return codes.long()


def pack_generation(
    vocabulary: Vocabulary, prompts: Sequence[Sequence[int]], codes: Tensor | None = None
) -> PackedBatch:
    """`[t2i][sot] prompt [eot] [soi] codes*N [eoi]` for every prompt; an empty prompt is the unconditional one.

    Args: prompts, text ids without control tokens; codes [B, N] with `vocabulary.mask_code` where unknown, or None for
    the text rows alone (to prefill a cache). Raises `UserError` for ids out of range and unequal counts.
    """
    if codes is not None:
        codes = _check_codes("pack_generation", vocabulary, codes)
    _check_texts("pack_generation", vocabulary, prompts, None if codes is None else len(codes))
    start, end = [vocabulary.control("t2i"), vocabulary.sot], [vocabulary.eot]
    lead = [[*start, *prompt, *end] for prompt in prompts]
    image = 0 if codes is None else codes.shape[1] + 2
    sequences = [SequenceLayout("generation", len(text), image, cache_row=i) for i, text in enumerate(lead)]
    return _fill(vocabulary, sequences, lead, codes)


def pack_generation_step(
    vocabulary: Vocabulary, codes: Tensor, cached: Sequence[int], cache_rows: Sequence[int] | None = None
) -> PackedBatch:
    """Image rows alone, `[soi] codes*N [eoi]`, behind `cached[b]` text rows that lie in the cache.

    Keep the batch and call `with_codes` for the following steps: the layout does not change.
    """
    codes = _check_codes("pack_generation_step", vocabulary, codes)
    rows = range(len(codes)) if cache_rows is None else cache_rows
    sequences = [
        SequenceLayout("generation", 0, codes.shape[1] + 2, cached=length, cache_row=row)
        for length, row in zip(cached, rows, strict=True)
    ]
    return _fill(vocabulary, sequences, [], codes)


def pack_understanding(vocabulary: Vocabulary, codes: Tensor, texts: Sequence[Sequence[int]]) -> PackedBatch:
    """`[mmu] [soi] codes*N [eoi] [sot] text` for every image: a question, or a conversation with its answers and eot.

    Args: codes [B, N]; texts, ids without control tokens but eot. Raises `UserError` as `pack_generation` does.
    """
    codes = _check_codes("pack_understanding", vocabulary, codes)
    _check_texts("pack_understanding", vocabulary, texts, len(codes))
    lead, image = [[vocabulary.sot, *text] for text in texts], codes.shape[1] + 2
    sequences = [SequenceLayout("understanding", len(text), image, cache_row=i) for i, text in enumerate(lead)]
    return _fill(vocabulary, sequences, lead, codes)


def pack_understanding_image(vocabulary: Vocabulary, codes: Tensor, cache_rows: Sequence[int]) -> PackedBatch:
    """`[mmu] [soi] codes*N [eoi]` alone, to fill row `cache_rows[b]` of a cache: no image row ever sees the text."""
    codes = _check_codes("pack_understanding_image", vocabulary, codes)
    sequences = [SequenceLayout("understanding", 0, codes.shape[1] + 2, cache_row=row) for row in cache_rows]
    return _fill(vocabulary, sequences, [], codes)


def pack_questions(
    vocabulary: Vocabulary, questions: Sequence[Sequence[int]], cached: Sequence[int], device: torch.device | str
) -> PackedBatch:
    """`[sot] question` behind the `cached[b]` rows of an image that lie in row b of the cache."""
    _check_texts("pack_questions", vocabulary, questions, len(cached))
    lead = [[vocabulary.sot, *question] for question in questions]
    sequences = [
        SequenceLayout("understanding", len(text), 0, cached=length, cache_row=row)
        for row, (text, length) in enumerate(zip(lead, cached, strict=True))
    ]
    return _fill(vocabulary, sequences, lead, None).to(device)


def pack_text_step(token_ids: Tensor, cached: Sequence[int], cache_rows: Sequence[int] | None = None) -> PackedBatch:
    """One further text row per understanding sequence: `token_ids` [B] int64 behind `cached[b]` rows in the cache."""
    if token_ids.dim() != 1 or len(token_ids) != len(cached):
        raise UserError(
            f"pack_text_step: token_ids must be [B] with B = {len(cached)} cached lengths, got {list(token_ids.shape)}"
        )
    rows = range(len(cached)) if cache_rows is None else cache_rows
    pairs = zip(cached, rows, strict=True)
    sequences = [SequenceLayout("understanding", 1, 0, cached=length, cache_row=row) for length, row in pairs]
    return PackedBatch(token_ids.long(), Layout(sequences, token_ids.device))


def concatenate(batches: Sequence[PackedBatch]) -> PackedBatch:
    """One batch of all sequences, in order (mixed training). Put batches of one task together: fewer, longer segments.

    Cache rows are renumbered 0, 1, 2, ... over the result.
    """
    if len({batch.layout.device for batch in batches}) != 1:
        raise UserError(f"concatenate: expected batches on one device, got {[str(b.layout.device) for b in batches]}")
    sequences = chain.from_iterable(batch.layout.sequences for batch in batches)
    renumbered = [replace(sequence, cache_row=i) for i, sequence in enumerate(sequences)]
    return PackedBatch(torch.cat([batch.token_ids for batch in batches]), Layout(renumbered, batches[0].layout.device))
