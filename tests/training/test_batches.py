"""Mixed batches: masks by the schedule, targets that address the right rows, functions of (seed, step) alone."""

import numpy as np
import pytest
import torch

from unif2ace.data.attributes import ATTRIBUTES, visible
from unif2ace.data.avatars import sample_face
from unif2ace.data.language import caption, full_caption, questions
from unif2ace.data.loader import FaceTable
from unif2ace.data.text import TextTokenizer
from unif2ace.training.batches import MixedBatches, TokenizedFaces, random_masks
from unif2ace.vocabulary import Vocabulary

FACES, TOKENS, CODES = 12, 16, 50


@pytest.fixture(scope="module")
def parts():
    rng = np.random.default_rng(0)
    faces = [sample_face(rng) for _ in range(FACES)]
    table = FaceTable(
        images=torch.zeros(FACES, 8, 8, 3, dtype=torch.uint8),
        labels=torch.zeros(FACES, len(ATTRIBUTES), dtype=torch.int64),
        attributes=[visible(face) for face in faces],
        captions=[[caption(face, rng)] for face in faces],
        questions=[questions(face, rng) for face in faces],
    )
    texts = [full_caption(seen) for seen in table.attributes]
    tokenizer = TextTokenizer.train(texts, 400)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, CODES, (FACES, TOKENS), generator=generator)
    tokenized = TokenizedFaces(table, codes, {"clip": torch.randn(FACES, 3, 5, generator=generator)})
    return tokenized, tokenizer, Vocabulary(tokenizer.size, CODES, tokenizer.end_of_text)


def make(parts, **changes):
    tokenized, tokenizer, vocabulary = parts
    settings = {"generation": 4, "turns": 3, "caption_share": 0.5, "condition_dropout": 0.0} | changes
    return MixedBatches(tokenized, tokenizer, vocabulary, **settings)


def test_masks_follow_the_cosine_schedule():
    masked, ratio = random_masks(4000, 64, np.random.default_rng(0))
    assert np.array_equal(masked.sum(1) / 64, ratio)
    assert masked.sum(1).min() >= 1
    assert abs(ratio.mean() - 2 / np.pi) < 0.02  # mean of cos(pi t / 2)
    assert np.abs(masked.mean(0) - ratio.mean()).max() < 0.05  # every position alike


def test_code_rows_hold_the_mask_and_their_targets(parts):
    tokenized, _, vocabulary = parts
    rows = torch.arange(8)
    batch = make(parts)(rows, np.random.default_rng(1))
    assert (batch.packed.token_ids[batch.code_rows] == vocabulary.mask).all()
    rest = batch.packed.token_ids[batch.packed.layout.code_rows]
    truth = (tokenized.codes[rows[:4]] + vocabulary.code_start).flatten()
    known = rest != vocabulary.mask
    assert torch.equal(rest[known], truth[known])
    assert torch.equal(batch.code_targets, truth[~known])
    counts = torch.bincount((~known).nonzero()[:, 0] // TOKENS, minlength=4)
    assert torch.equal(batch.mask_ratio, counts / TOKENS)
    assert torch.equal(batch.code_mask_ratio, batch.mask_ratio.repeat_interleave(counts))


def test_answer_targets_are_the_next_tokens_and_read_as_answers(parts):
    tokenized, tokenizer, vocabulary = parts
    batch = make(parts, caption_share=1.0)(torch.arange(8), np.random.default_rng(2))
    ids = batch.packed.token_ids
    layout = batch.packed.layout
    for index, start, end in zip(range(4, 8), layout.starts[4:], layout.starts[5:], strict=False):
        inside = (batch.answer_rows >= start) & (batch.answer_rows < end)
        answer = batch.answer_targets[inside].tolist()
        assert torch.equal(ids[batch.answer_rows[inside] + 1], batch.answer_targets[inside])
        assert answer[-1] == vocabulary.eot
        assert tokenizer.decode(answer) == full_caption(tokenized.table.attributes[index])


def test_each_turn_of_a_conversation_is_trained(parts):
    _, _, vocabulary = parts
    batch = make(parts, caption_share=0.0)(torch.arange(8), np.random.default_rng(3))
    assert (batch.answer_targets == vocabulary.eot).sum() == 4 * 3


def test_condition_dropout_replaces_the_prompt_by_nothing(parts):
    batch = make(parts, condition_dropout=1.0)(torch.arange(8), np.random.default_rng(4))
    assert all(sequence.text == 3 for sequence in batch.packed.layout.sequences[:4])  # t2i, sot, eot


def test_the_same_random_state_gives_the_same_batch(parts):
    one, two, other = (make(parts)(torch.arange(8), np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.packed.token_ids, two.packed.token_ids)
    assert not torch.equal(one.code_mask_ratio[:4], other.code_mask_ratio[:4])
