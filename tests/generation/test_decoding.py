"""Answers: the cached, batched, ragged loop gives what one full pass per token gives."""

import pytest
import torch

from tests.tiny import TOKENS, build_parts
from unif2ace.errors import UserError
from unif2ace.generation.decoding import decode_answers
from unif2ace.vocabulary import pack_understanding

END_BIAS = 5.0  # makes this random model end its answers after different numbers of tokens
QUESTIONS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def parts():
    """(model in float64, codes, features): in float64 no two logits are close enough to change places."""
    built = build_parts()
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, built.model.config.codebook_size, (3, TOKENS), generator=generator)
    features = {
        name: torch.randn(3, *built.model.config.sequence_moe.feature_shape(name), generator=generator).double()
        for name in ("clip", "face")
    }
    return built.model.double(), codes, features


@torch.no_grad()
def one_shot(model, codes, question, features, count):
    """Greedy decoding that runs image, question and answer so far in full for every token."""
    text, answer = list(question), []
    weight, bias = model.head.weight[: model.vocabulary.n_text], model.head.bias[: model.vocabulary.n_text]
    for _ in range(count):
        batch = pack_understanding(model.vocabulary, codes, [text + answer])
        hidden = model(batch, features=features).hidden[batch.layout.last_rows]
        token = int((hidden @ weight.T + bias).argmax())
        if token == model.vocabulary.eot:
            break
        answer.append(token)
    return answer


def test_incremental_equals_one_shot(parts):
    model, codes, features = parts
    together = decode_answers(model, codes, QUESTIONS, features, max_new_tokens=6)
    for index, question in enumerate(QUESTIONS):
        row = slice(index, index + 1)
        mine = {name: value[row] for name, value in features.items()}
        assert decode_answers(model, codes[row], [question], mine, max_new_tokens=6) == [together[index]]
        assert one_shot(model, codes[row], question, mine, 6) == together[index]


def test_sequences_leave_the_batch_when_they_end(parts):
    model, codes, features = parts
    eot = model.vocabulary.eot
    before = model.head.bias[eot].item()
    try:
        with torch.no_grad():
            model.head.bias[eot] += END_BIAS
        answers = decode_answers(model, codes, QUESTIONS, features, max_new_tokens=6)
        for index, question in enumerate(QUESTIONS):
            row = slice(index, index + 1)
            mine = {name: value[row] for name, value in features.items()}
            assert one_shot(model, codes[row], question, mine, 6) == answers[index]
    finally:
        with torch.no_grad():
            model.head.bias[eot] = before
    assert len({len(answer) for answer in answers}) > 1  # they ended at different steps
    assert all(eot not in answer for answer in answers)


def test_max_new_tokens_is_a_limit(parts):
    model, codes, features = parts
    assert all(len(answer) <= 2 for answer in decode_answers(model, codes, QUESTIONS, features, max_new_tokens=2))


def test_narrow_sampling_is_greedy(parts):
    model, codes, features = parts
    greedy = decode_answers(model, codes, QUESTIONS, features, max_new_tokens=5)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}):
        sampled = decode_answers(
            model, codes, QUESTIONS, features, max_new_tokens=5, temperature=1.0, seeds=[1, 2, 3], **narrow
        )
        assert sampled == greedy


def test_sampled_answers_depend_on_their_own_seed_alone(parts):
    model, codes, features = parts
    options = {"max_new_tokens": 5, "temperature": 3.0}
    together = decode_answers(model, codes, QUESTIONS, features, seeds=[7, 8, 9], **options)
    row = slice(1, 2)
    mine = {name: value[row] for name, value in features.items()}
    assert decode_answers(model, codes[row], QUESTIONS[row], mine, seeds=[8], **options) == together[row]
    assert decode_answers(model, codes[row], QUESTIONS[row], mine, seeds=[80], **options) != together[row]


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_options_out_of_range_are_refused(parts, options):
    model, codes, features = parts
    with pytest.raises(UserError, match=f"^{next(iter(options))}: expected"):
        decode_answers(model, codes, QUESTIONS, features, **options)
