"""Incremental passes over a key/value cache equal full recomputation."""

from __future__ import annotations

import pytest
import torch

from unif2ace.errors import UserError
from unif2ace.vocabulary import pack_generation, pack_generation_step, pack_text_step, pack_understanding


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_denoising_steps_equal_full_passes_and_text_keys_stay_constant(model, make):
    made = make("generation", [5, 0, 2])
    cache = model.new_cache(3, 8 + model.config.image_rows)
    prefill = model(pack_generation(made.vocabulary, made.texts), cache=cache)
    assert cache.lengths == [8, 3, 5]
    assert len(prefill.hidden) == 16
    batch = pack_generation_step(made.vocabulary, made.codes, cache.lengths)
    text = [cache.keys[:, row, :length].clone() for row, length in enumerate(cache.lengths)]
    for step in range(3):
        codes = (made.codes + 3 * step) % 17
        ratio = (made.arguments["mask_ratio"] + 0.1 * step).clamp(max=1)
        full = model(pack_generation(made.vocabulary, made.texts, codes), mask_ratio=ratio)
        batch = batch.with_codes(made.vocabulary, codes)
        got = model(batch, mask_ratio=ratio, cache=cache).hidden
        rows = made.batch.layout.image_rows
        close(got, full.hidden[rows])
        assert batch.layout.image_rows_are_all
        assert cache.lengths == [8, 3, 5]
        for row, keys in enumerate(text):
            assert torch.equal(cache.keys[:, row, : keys.shape[1]], keys)


@torch.no_grad()
def test_a_shared_prompt_is_prefilled_once(model, make):
    made = make("generation", [4])
    codes = torch.cat([made.codes, (made.codes + 1) % 17, (made.codes + 2) % 17])
    ratio = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    full = pack_generation(made.vocabulary, made.texts * 3, codes)
    expected = model(full, mask_ratio=ratio).hidden[full.layout.image_rows]
    cache = model.new_cache(4, 7 + model.config.image_rows)
    model(pack_generation(made.vocabulary, made.texts), cache=cache)
    for row in (1, 3):
        cache.write_row(row, cache.read_row(0))
    rows = [3, 0, 1]  # any rows, in any order
    batch = pack_generation_step(made.vocabulary, codes, [cache.lengths[row] for row in rows], rows)
    close(model(batch, mask_ratio=ratio, cache=cache).hidden, expected)


@torch.no_grad()
def test_answer_decoding_equals_full_passes(model, make):
    made = make("understanding", [4, 1, 6])
    answers = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    talks = [text + answer for text, answer in zip(made.texts, answers.tolist(), strict=True)]
    full = pack_understanding(made.vocabulary, made.codes, talks)
    expected = model(full, **made.arguments).hidden
    cache = model.new_cache(3, 24)
    hidden = model(made.batch, cache=cache, **made.arguments).hidden[made.batch.layout.last_rows]
    for step in range(4):
        index = torch.tensor([end - 4 + step for end in full.layout.starts[1:]])  # the last 4 rows: q a a a
        close(hidden, expected[index])
        if step < 3:
            hidden = model(pack_text_step(answers[:, step], cache.lengths), cache=cache).hidden
    assert cache.lengths == [20, 17, 22]


@torch.no_grad()
def test_finished_sequences_may_leave_and_rows_be_used_again(model, make):
    made = make("understanding", [4, 1])
    token = torch.tensor([7])
    full = pack_understanding(made.vocabulary, made.codes, [[*text, 7] for text in made.texts])
    expected = model(full, **made.arguments).hidden[full.layout.last_rows]
    cache = model.new_cache(2, 24)
    model(made.batch, cache=cache, **made.arguments)
    close(model(pack_text_step(token, [cache.lengths[1]], [1]), cache=cache).hidden[0], expected[1])
    model(made.batch, cache=cache, **made.arguments)  # cached == 0 starts both rows anew
    close(model(pack_text_step(token.repeat(2), cache.lengths), cache=cache).hidden, expected)


def test_wrong_uses_are_refused(model, make):
    made = make("generation", [4, 2])
    step = pack_generation_step(made.vocabulary, made.codes, [7, 5])
    with pytest.raises(UserError, match="expected a cache"):
        model(step, **made.arguments)
    with pytest.raises(UserError, match="no_grad"):
        model(made.batch, cache=model.new_cache(2, 30), **made.arguments)
    with torch.no_grad():
        with pytest.raises(UserError, match="holds 0 rows"):
            model(step, cache=model.new_cache(2, 30), **made.arguments)
        with pytest.raises(UserError, match="does not fit max_length = 6"):
            model(made.batch, cache=model.new_cache(2, 6), **made.arguments)
        with pytest.raises(UserError, match="distinct cache rows below 1"):
            model(made.batch, cache=model.new_cache(1, 30), **made.arguments)
    with pytest.raises(UserError, match="pack_text_step"):
        pack_text_step(torch.zeros(2, dtype=torch.int64), [3])
