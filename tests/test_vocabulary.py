"""The token space and the packed layouts."""

from __future__ import annotations

import pytest
import torch

from unif2ace.config import preset
from unif2ace.errors import UserError
from unif2ace.layout import Layout, SequenceLayout
from unif2ace.vocabulary import (
    Vocabulary,
    concatenate,
    pack_generation,
    pack_generation_step,
    pack_questions,
    pack_text_step,
    pack_understanding,
)

SMALL = Vocabulary(n_text=20, codebook_size=8, end_of_text=2)
PAD, SOI, EOI, T2I, MMU = 20, 21, 22, 25, 26
CODES = torch.tensor([[0, 1, 2, 3], [4, 8, 6, 7]])  # 8 is the mask


def test_ids_of_phi():
    v = Vocabulary.of(preset("unif2ace-1.8b"))
    names = ("pad", "soi", "eoi", "t2i", "mmu")
    assert [v.control(name) for name in names] == [50295, 50296, 50297, 50300, 50301]
    assert (v.code_columns.start, v.code_columns.stop - 1, v.mask, v.size) == (50305, 58496, 58497, 58498)
    assert v.sot == v.eot == 50256
    assert v.size == preset("unif2ace-1.8b").vocabulary_size
    with pytest.raises(UserError, match="unknown control token 'soy'"):
        v.control("soy")


def test_ids_of_a_small_tokenizer():
    v = Vocabulary.of(preset("avatars-tiny", n_text=640))
    assert (v.control("pad"), v.code_start, v.mask, v.size, v.sot) == (640, 650, 1674, 1675, 0)


def test_generation_layout():
    batch = pack_generation(SMALL, [[5, 6, 7], []], CODES)
    first = [T2I, 2, 5, 6, 7, 2, SOI, 30, 31, 32, 33, EOI]
    second = [T2I, 2, 2, SOI, 34, 38, 36, 37, EOI]  # the unconditional prompt
    assert batch.token_ids.tolist() == first + second
    layout = batch.layout
    assert batch.layout.positions.tolist() == [*range(12), *range(9)]
    assert layout.token_group.tolist() == [1] * 21
    assert layout.token_group.dtype == torch.int32
    assert layout.image_rows.tolist() == [*range(6, 12), *range(15, 21)]
    assert layout.code_rows.tolist() == [*range(7, 11), *range(16, 20)]
    assert layout.image_offsets.tolist() == [0, 6, 12]
    assert layout.num_images == (0, 2)
    assert layout.blocks == ((0, 6, 0, 6, True), (6, 12, 0, 12, False), (12, 15, 12, 15, True), (15, 21, 12, 21, False))
    flipped = batch.with_codes(SMALL, CODES.flip(0))
    assert flipped.token_ids[layout.code_rows].tolist() == [34, 38, 36, 37, 30, 31, 32, 33]


def test_understanding_layout():
    batch = pack_understanding(SMALL, CODES % 8, [[5, 9, 10, 2], [6, 7, 2]])
    first = [MMU, SOI, 30, 31, 32, 33, EOI, 2, 5, 9, 10, 2]
    second = [MMU, SOI, 34, 30, 36, 37, EOI, 2, 6, 7, 2]
    layout = batch.layout
    assert batch.token_ids.tolist() == first + second
    assert layout.token_group.tolist() == [0] * 23
    assert layout.image_rows.tolist() == [*range(1, 7), *range(13, 19)]
    assert layout.blocks == ((0, 7, 0, 7, False), (7, 12, 0, 12, True), (12, 19, 12, 19, False), (19, 23, 12, 23, True))
    assert layout.last_rows.tolist() == [11, 22]


def test_mixed_batch_lists_understanding_images_first():
    generation = pack_generation(SMALL, [[5]], CODES[:1])
    understanding = pack_understanding(SMALL, CODES[1:] % 8, [[6]])
    batch = concatenate([generation, understanding])
    layout = batch.layout
    assert torch.equal(batch.token_ids, torch.cat([generation.token_ids, understanding.token_ids]))
    assert layout.segments == ((0, 10, 1), (10, 19, 0))
    assert layout.token_group.tolist() == [1] * 10 + [0] * 9
    assert layout.image_rows.tolist() == [*range(11, 17), *range(4, 10)]
    assert layout.image_group.tolist() == [0, 1]
    assert layout.num_images == (1, 1)
    assert layout.code_rows.tolist() == [*range(5, 9)]
    assert [sequence.cache_row for sequence in layout.sequences] == [0, 1]


def test_cached_steps():
    step = pack_generation_step(SMALL, CODES, [6, 3])
    access = step.layout.cache_access(20)
    assert step.layout.image_rows_are_all
    assert step.layout.positions.tolist() == [*range(6, 12), *range(3, 9)]
    assert access.past
    assert access.blocks == ((0, 6, 0, 6, False, 0, 6), (6, 12, 6, 12, False, 20, 23))  # the texts, then themselves
    assert access.slots.tolist() == access.stored.tolist() == []
    text = pack_text_step(torch.tensor([5, 6]), [9, 11], [1, 0])
    access = text.layout.cache_access(20)
    assert access.blocks == ((0, 1, 20, 30, True), (1, 2, 0, 12, True))
    assert access.slots.tolist() == [29, 11]
    assert access.stored is None
    assert not access.past
    assert text.layout.positions.tolist() == [9, 11]


def test_who_continues_text():
    """Questions and steps of answers; nothing that has image rows, and no text that starts a sequence."""
    step = pack_text_step(torch.tensor([5, 6]), cached=[9, 11])
    assert step.layout.continues_text
    assert pack_questions(SMALL, [[3], [4, 5]], [7, 7], "cpu").layout.continues_text
    image = pack_understanding(SMALL, CODES, [[3], [4]])
    others = (image, pack_generation(SMALL, [[3]]), pack_generation_step(SMALL, CODES, cached=[4, 6]))
    for batch in (*others, concatenate([step, image])):
        assert not batch.layout.continues_text


def test_first_passes_store_the_text_alone():
    access = pack_generation(SMALL, [[5], []], CODES).layout.cache_access(20)
    assert access.blocks == ((0, 4, 0, 4, True), (4, 10, 0, 10, False), (10, 13, 10, 13, True), (13, 19, 10, 19, False))
    assert access.slots.tolist() == [*range(4), *range(20, 23)]
    assert access.stored.tolist() == [*range(4), *range(10, 13)]
    assert not access.past


def test_layouts_derive_once():
    one = pack_generation(SMALL, [[5]], CODES[:1]).layout
    assert one.to("cpu") is one
    assert one.image_rows is one.image_rows
    assert one.rotary(4, 1e4, torch.float32) is one.rotary(4, 1e4, torch.float32)
    assert Layout([]).num_rows == 0
    assert Layout([]).positions.tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_generation(SMALL, [[20]], CODES[:1]), "text ids must lie in 0..19, got 20"),
        (lambda: pack_generation(SMALL, [[-1]], CODES[:1]), "got -1"),
        (lambda: pack_generation(SMALL, [[1]], CODES), "got 1 texts and 2 images"),
        (lambda: pack_generation(SMALL, [[1]], CODES[:1] + 9), "codes must lie in 0..8"),
        (lambda: pack_generation(SMALL, [[1]], CODES[0]), r"codes must be integers \[B, N\]"),
        (lambda: pack_generation(SMALL, [[1]], CODES[:1].float()), "float32"),
        (lambda: pack_understanding(SMALL, CODES, [[1]]), "got 1 texts and 2 images"),
        (lambda: pack_generation(SMALL, [[1]], CODES[:1]).with_codes(SMALL, CODES), "with_codes: codes must be"),
        (
            lambda: Layout([SequenceLayout("generation", 1, 6), SequenceLayout("generation", 1, 3)]),
            "one number of tokens",
        ),
        (lambda: Layout([SequenceLayout("understanding", 1, 6, cached=2)]), "behind cached rows"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
