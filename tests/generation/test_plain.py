"""The loop: an image is a function of its prompt and seed; known tokens stay; and it is the formula, written out."""

import pytest
import torch

from tests.tiny import TOKENS, build_parts
from unif2ace.errors import UserError
from unif2ace.generation.plain import generate_codes
from unif2ace.generation.schedule import schedule_steps
from unif2ace.generation.settings import to_signed
from unif2ace.ops import remask, sample_tokens, use_backend
from unif2ace.vocabulary import pack_generation

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
SEEDS = [3, 2**63 + 5, 0, 11]


@pytest.fixture(scope="module")
def model():
    return build_parts().model


def test_an_image_does_not_depend_on_its_batch(model):
    together = generate_codes(model, PROMPTS, SEEDS, steps=5)
    for index in range(len(PROMPTS)):
        alone = generate_codes(model, PROMPTS[index : index + 1], SEEDS[index : index + 1], steps=5)
        assert torch.equal(alone[0], together[index])
    shuffled = generate_codes(model, PROMPTS[::-1], SEEDS[::-1], steps=5)
    assert torch.equal(shuffled, together.flip(0))


def test_prompt_and_seed_both_matter(model):
    codes = generate_codes(model, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [1, 2, 1], steps=3)
    assert codes.shape == (3, TOKENS)
    assert 0 <= codes.min() <= codes.max() < model.config.codebook_size
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_known_tokens_are_never_touched(model):
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(0, model.config.codebook_size, (4, TOKENS), generator=generator)
    known = torch.rand(4, TOKENS, generator=generator) < torch.tensor([0.1, 0.5, 0.9, 1.0])[:, None]
    codes = generate_codes(model, PROMPTS, SEEDS, steps=4, known_codes=wanted, known=known)
    assert torch.equal(codes[known], wanted[known])
    assert not torch.equal(codes[~known], wanted[~known])
    assert codes.max() < model.config.codebook_size  # nothing is left unknown


def test_greedy_without_noise_ignores_the_seed(model):
    codes = generate_codes(model, [PROMPTS[0]] * 2, [1, 2], steps=3, temperature=0.0, tau=0.0)
    assert torch.equal(codes[0], codes[1])


def test_on_step_is_called_after_every_step(model):
    calls = []
    generate_codes(model, PROMPTS[:1], [0], steps=3, on_step=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@torch.no_grad()
def written_out(model, prompt, seed, steps, guidance):
    """One image, and sampling of its unknown tokens alone."""
    vocabulary, columns = model.vocabulary, model.vocabulary.code_columns
    codes = torch.full((1, TOKENS), vocabulary.mask_code)
    for k, step in enumerate(schedule_steps(TOKENS, steps)):
        ratio = torch.tensor([step.unknown / TOKENS], dtype=torch.float64)
        unknown = (codes[0] == vocabulary.mask_code).nonzero()[:, 0]
        logits = []
        for text in (prompt, []):
            batch = pack_generation(vocabulary, [text], codes)
            hidden = model(batch, mask_ratio=ratio).hidden[batch.layout.code_rows]
            logits.append(hidden[unknown] @ model.head.weight[columns].T + model.head.bias[columns])
        seeds, count = torch.full_like(unknown, seed), torch.full_like(unknown, k)
        sampled, confidence = sample_tokens(
            logits[0], seeds, unknown, count, uncond_logits=logits[1], guidance=guidance, backend="reference"
        )
        stays = remask(
            confidence,
            torch.tensor([0, len(unknown)]),
            torch.tensor([step.keep]),
            torch.tensor([seed]),
            unknown,
            torch.tensor([k]),
            torch.tensor([step.tau]),
            backend="reference",
        )
        codes[0, unknown[~stays]] = sampled[~stays].long()
    return codes[0]


def test_the_batched_loop_gives_the_tokens_of_one_image_written_out():
    model = build_parts().model.double()  # float64: the two orders of summation cannot flip a token
    for prompt, seed in zip(PROMPTS[:2], [3, 4], strict=True):
        with use_backend("reference"):
            codes = generate_codes(model, [prompt, [3]], [seed, 9], steps=4, guidance=1.5)
        assert torch.equal(codes[0], written_out(model, prompt, seed, 4, 1.5))


def test_guidance_zero_runs_the_conditional_half_only(model, monkeypatch):
    rows = []
    forward = type(model).forward

    def counted(self, batch, **options):
        rows.append(batch.layout.num_rows)
        return forward(self, batch, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    generate_codes(model, PROMPTS[:2], SEEDS[:2], steps=2, guidance=0.0)
    text = sum(len(prompt) + 3 for prompt in PROMPTS[:2])
    assert rows == [text + 2 * (TOKENS + 2)] * 2
    generate_codes(model, PROMPTS[:2], SEEDS[:2], steps=2, guidance=1.0)
    assert rows[2:] == [text + 2 * (TOKENS + 2), 2 * (3 + TOKENS + 2)] * 2


def test_every_prompt_has_a_seed_and_none_has_none(model):
    assert generate_codes(model, [], []).shape == (0, TOKENS)
    with pytest.raises(UserError, match="generate: expected one seed for each of 4 prompts, got 3"):
        generate_codes(model, PROMPTS, SEEDS[:3])


def test_known_codes_of_another_shape_are_refused(model):
    with pytest.raises(UserError, match=r"must be \[1, 16\]"):
        generate_codes(model, PROMPTS[:1], [0], known_codes=torch.zeros(1, 4).long(), known=torch.ones(1, 4).bool())


def test_seeds_of_64_bits_keep_their_bits():
    assert [to_signed(seed) for seed in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]
