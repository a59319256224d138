"""Mixed training batches: text to face and questions about faces, packed into one sequence axis.

A step's batch is a function of (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen.

* generation: a caption and the face's codes, part of them masked. Per face t ~ U(0, 1), mask ratio cos(pi t / 2),
  n = max(1, round(N m)) positions chosen uniformly; the *realised* ratio n / N goes to the loss. One prompt
  in ten is replaced by nothing (condition dropout), which trains the unconditional half of guidance.
* understanding: a face's codes, then either a request for a description or several questions in a row, each answer
  closed by the end-of-text token. Only answers are trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unif2ace.data.language import describe_prompt, full_caption
from unif2ace.data.loader import FaceTable
from unif2ace.data.text import TextTokenizer
from unif2ace.vocabulary import PackedBatch, Vocabulary, concatenate, pack_generation, pack_understanding


@dataclass(frozen=True)
class MixedBatch:
    """One step: `packed` with generation sequences first, and what its rows must predict.

    code_rows [R], code_targets [R] (token ids), code_mask_ratio [R]: the masked image rows. answer_rows [A],
    answer_targets [A] (token ids): rows whose next token is trained. mask_ratio [B_gen] and features feed the
    sequence-level experts.
    """

    packed: PackedBatch
    mask_ratio: Tensor
    features: dict[str, Tensor] | None
    code_rows: Tensor
    code_targets: Tensor
    code_mask_ratio: Tensor
    answer_rows: Tensor
    answer_targets: Tensor


@dataclass(frozen=True)
class TokenizedFaces:
    """A split ready for the transformer: `codes` [n, N] int64, frozen encoder `features` name -> [n, rows, width],
    and the texts.
    """

    table: FaceTable
    codes: Tensor
    features: dict[str, Tensor]


def random_masks(count: int, num_tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(masked bool [count, num_tokens], realised ratio float64 [count]) by the cosine schedule."""
    ratio = np.cos(0.5 * math.pi * rng.random(count))
    number = np.maximum(1, np.rint(num_tokens * ratio)).astype(np.int64)
    rank = rng.random((count, num_tokens)).argsort(1).argsort(1)  # a uniform random order of the positions
    return rank < number[:, None], number / num_tokens


class MixedBatches:
    """`batches(rows, rng) -> MixedBatch`; the first `generation` of the rows are drawn, the rest are asked about."""

    def __init__(
        self,
        faces: TokenizedFaces,
        tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        *,
        generation: int,
        turns: int,
        caption_share: float,
        condition_dropout: float,
    ) -> None:
        self.faces, self.tokenizer, self.vocabulary = faces, tokenizer, vocabulary
        self.generation, self.turns = generation, turns
        self.caption_share, self.condition_dropout = caption_share, condition_dropout

    def __call__(self, rows: Tensor, rng: np.random.Generator) -> MixedBatch:
        drawn, asked = rows[: self.generation], rows[self.generation :]
        packed, mask_ratio, masked, codes = self._generation(drawn, rng)
        understanding, answer_rows, answer_targets = self._understanding(asked, rng)
        offset = packed.layout.num_rows
        code_rows = packed.layout.code_rows[masked.flatten()]
        number = masked.sum(1)
        return MixedBatch(
            packed=concatenate([packed, understanding]),
            mask_ratio=mask_ratio,
            features={name: value[asked] for name, value in self.faces.features.items()} or None,
            code_rows=code_rows,
            code_targets=codes[masked] + self.vocabulary.code_start,
            code_mask_ratio=mask_ratio.repeat_interleave(number),
            answer_rows=answer_rows + offset,
            answer_targets=answer_targets,
        )

    def _generation(self, rows: Tensor, rng: np.random.Generator) -> tuple[PackedBatch, Tensor, Tensor, Tensor]:
        codes = self.faces.codes[rows]
        masked, ratio = random_masks(*codes.shape, rng)
        masked = torch.from_numpy(masked)
        prompts = []
        for row in rows.tolist():
            captions = self.faces.table.captions[row]
            text = captions[rng.integers(len(captions))].text
            prompts.append([] if rng.random() < self.condition_dropout else self.tokenizer.encode(text))
        visible = codes.masked_fill(masked, self.vocabulary.mask_code)
        packed = pack_generation(self.vocabulary, prompts, visible)
        return packed, torch.from_numpy(ratio).float(), masked, codes

    def _understanding(self, rows: Tensor, rng: np.random.Generator) -> tuple[PackedBatch, Tensor, Tensor]:
        talks = [self._talk(row, rng) for row in rows.tolist()]
        packed = pack_understanding(self.vocabulary, self.faces.codes[rows], [ids for ids, _ in talks])
        answer_rows: list[int] = []
        answer_targets: list[int] = []
        for (ids, trained), start, sequence in zip(talks, packed.layout.starts, packed.layout.sequences, strict=False):
            first = start + sequence.prefix  # the row of sot, which predicts ids[0]
            answer_rows += [first + position for position in trained]
            answer_targets += [ids[position] for position in trained]
        return packed, torch.tensor(answer_rows), torch.tensor(answer_targets)

    def _talk(self, row: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Token ids of a conversation about face `row`, and the positions in it that are trained."""
        if rng.random() < self.caption_share:
            turns: Sequence[tuple[str, str]] = [(describe_prompt(rng), full_caption(self.faces.table.attributes[row]))]
        else:
            pairs = self.faces.table.questions[row]
            chosen = rng.permutation(len(pairs))[: self.turns]
            turns = [(pairs[i].question, pairs[i].answer) for i in chosen]
        ids: list[int] = []
        trained: list[int] = []
        for question, answer in turns:
            ids += self.tokenizer.encode_question(question)
            reply = [*self.tokenizer.encode(answer), self.vocabulary.eot]
            trained += range(len(ids), len(ids) + len(reply))
            ids += reply
        return ids, trained
