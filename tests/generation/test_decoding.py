"""Answers: the cached, batched, ragged loop gives what one full pass per token gives."""

import hashlib
import random

import pytest
import torch

from tests.bits import needs_native, run_python
from tests.tiny import TOKENS, build_parts
from unif2ace.errors import UserError
from unif2ace.generation import decoding
from unif2ace.generation.decoding import stream_answers
from unif2ace.ops import use_backend
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


@pytest.fixture
def ending(parts):
    """The same, for answers that end after different numbers of tokens."""
    bias, end = parts[0].head.bias.data, parts[0].vocabulary.eot
    before = bias[end].item()
    bias[end] += END_BIAS
    yield parts
    bias[end] = before


def picture(index, codes, features):
    """Codes and features of picture `index` alone."""
    row = slice(index, index + 1)
    return codes[row], {name: value[row] for name, value in features.items()}


def decode_answers(model, *arguments, **options):
    """Token ids of every answer."""
    answers = {}
    for piece in stream_answers(model, *arguments, **options):
        answers.setdefault(piece.index, []).extend(piece.tokens)
    return [answers[index] for index in range(len(answers))]


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
    model, *pictures = parts
    together = decode_answers(model, pictures[0], QUESTIONS, pictures[1], max_new_tokens=6)
    for index, question in enumerate(QUESTIONS):
        codes, features = picture(index, *pictures)
        assert decode_answers(model, codes, [question], features, max_new_tokens=6) == [together[index]]
        assert one_shot(model, codes, question, features, 6) == together[index]


def test_sequences_leave_the_batch_when_they_end(ending):
    model, codes, features = ending
    answers = decode_answers(model, codes, QUESTIONS, features, max_new_tokens=6)
    for index, question in enumerate(QUESTIONS):
        codes_of_one, features_of_one = picture(index, codes, features)
        assert one_shot(model, codes_of_one, question, features_of_one, 6) == answers[index]
    assert len({len(answer) for answer in answers}) > 1  # they ended at different steps
    assert all(model.vocabulary.eot not in answer for answer in answers)


@pytest.mark.parametrize("steps_per_check", [2, 3, 64])
def test_how_often_the_host_looks_changes_nothing(ending, steps_per_check):
    model, codes, features = ending
    options = {"max_new_tokens": 7, "temperature": 1.0, "seeds": [1, 2, 3]}
    expected = decode_answers(model, codes, QUESTIONS, features, **options, steps_per_check=1)
    found = decode_answers(model, codes, QUESTIONS, features, **options, steps_per_check=steps_per_check)
    assert found == expected
    assert len({len(answer) for answer in expected}) > 1


def test_an_image_runs_once_for_all_questions_about_it(parts, monkeypatch):
    model, codes, features = parts
    which, questions = [2, 0, 2, 2, 0], [*QUESTIONS, [3, 4], [17]]
    expected = []
    for index, question in zip(which, questions, strict=True):
        codes_of_one, features_of_one = picture(index, codes, features)
        expected += decode_answers(model, codes_of_one, [question], features_of_one, max_new_tokens=4)
    rows, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda batch, **k: rows.append(len(batch.token_ids)) or forward(batch, **k))
    assert decode_answers(model, codes, questions, features, images=which, max_new_tokens=4) == expected
    assert rows[0] == 2 * (TOKENS + 3)
    assert rows[1] == sum(len(question) + 1 for question in questions)


def test_pieces_of_an_answer_are_the_answer(parts):
    model, codes, features = parts
    options = {"max_new_tokens": 6, "steps_per_check": 2}
    answers, ended = [[] for _ in QUESTIONS], []
    for piece in stream_answers(model, codes, QUESTIONS, features, **options):
        assert piece.index not in ended
        assert 0 < len(piece.tokens) <= 2 or piece.ended
        answers[piece.index] += piece.tokens
        ended += [piece.index] * piece.ended
    assert answers == decode_answers(model, codes, QUESTIONS, features, max_new_tokens=6)
    assert sorted(ended) == [0, 1, 2]


def test_a_stop_ends_an_answer(parts):
    model, codes, features = parts
    whole = decode_answers(model, codes, QUESTIONS, features, max_new_tokens=6)
    word = whole[1][2]
    found = decode_answers(model, codes, QUESTIONS, features, max_new_tokens=6, stop=lambda ids: ids[-1] == word)
    for short, long in zip(found, whole, strict=True):
        assert short == long[: long.index(word) + 1 if word in long else len(long)]


def test_no_question_has_no_answer(parts):
    model, codes, features = parts
    assert decode_answers(model, codes, [], features) == []


def test_images_and_seeds_that_are_not_there_are_refused(parts):
    model, codes, features = parts
    with pytest.raises(UserError, match="expected an image below 3 for each of 3 questions"):
        decode_answers(model, codes, QUESTIONS, features, images=[0, 1, 3])
    with pytest.raises(UserError, match="expected one seed for each of 3 questions, got 2"):
        decode_answers(model, codes, QUESTIONS, features, seeds=[1, 2])


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


def test_top_p_takes_the_same_tokens_in_16_bits():
    logits = torch.randn(2, 5000).bfloat16()
    wide = decoding._restrict(logits.float(), 0.8, None, 0.9)
    assert torch.equal(decoding._restrict(logits, 0.8, None, 0.9), wide.bfloat16())
    assert (wide.isfinite().sum(1) < 4000).all()


def test_sampled_answers_depend_on_their_own_seed_alone(parts):
    model, codes, features = parts
    options = {"max_new_tokens": 5, "temperature": 3.0}
    together = decode_answers(model, codes, QUESTIONS, features, seeds=[7, 8, 9], **options)
    codes_of_one, features_of_one = picture(1, codes, features)
    for seed, same in ((8, True), (80, False)):
        alone = decode_answers(model, codes_of_one, QUESTIONS[1:2], features_of_one, seeds=[seed], **options)
        assert (alone == together[1:2]) == same


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_options_out_of_range_are_refused(parts, options):
    model, codes, features = parts
    with pytest.raises(UserError, match=f"^{next(iter(options))}: expected"):
        decode_answers(model, codes, QUESTIONS, features, **options)


# ---------------------------------------------------------------------------------------------------------------- bits

SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}


def float32_parts():
    """(model, codes, features, (question, image) pairs): enough pairs for every kernel to see few rows and many."""
    model = build_parts().model
    with torch.no_grad():
        model.head.bias[model.vocabulary.eot] += END_BIAS
    generator, rng = torch.Generator().manual_seed(2), random.Random(2)
    shapes = {name: model.config.sequence_moe.feature_shape(name) for name in ("clip", "face")}
    codes = torch.randint(0, model.config.codebook_size, (5, TOKENS), generator=generator)
    features = {name: torch.randn(5, *shape, generator=generator) for name, shape in shapes.items()}
    pairs = [([rng.randrange(3, 300) for _ in range(rng.randrange(12))], rng.randrange(5)) for _ in range(90)]
    return model, codes, features, pairs


def traced(monkeypatch, parts, chosen, options):
    """Question -> (its tokens, its logits of every step), asked together in the order of `chosen`."""
    model, codes, features, pairs = parts
    logits, sample = {}, decoding.sample_tokens

    def record(rows, seeds, steps, *arguments, **keywords):
        for row, seed, step in zip(rows, seeds.tolist(), steps.tolist(), strict=True):
            logits.setdefault(seed, {})[step] = row.clone()
        return sample(rows, seeds, steps, *arguments, **keywords)

    tokens = {q: [] for q in chosen}
    questions, which = zip(*(pairs[q] for q in chosen), strict=True)
    with monkeypatch.context() as patch, use_backend("native"):
        patch.setattr(decoding, "sample_tokens", record)
        for piece in stream_answers(
            model, codes, questions, features, images=which, seeds=chosen, max_new_tokens=7, **options
        ):
            tokens[chosen[piece.index]] += piece.tokens
    steps = {q: min(7, len(answer) + 1) for q, answer in tokens.items()}  # behind its end a row may run along
    return {q: (tokens[q], [logits[q][step] for step in range(steps[q])]) for q in chosen}


@needs_native
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_alone_and_in_any_batch(monkeypatch, threads, options):
    parts, before, rng = float32_parts(), torch.get_num_threads(), random.Random(threads)
    every = range(len(parts[-1]))
    try:
        torch.set_num_threads(1)
        alone = {}
        for question in every:
            alone |= traced(monkeypatch, parts, [question], options)
        torch.set_num_threads(threads)
        batches = [rng.sample(every, count) for count in (2, 3, 5, 17, 40, 90)]
        for steps_per_check, chosen in enumerate(batches, start=1):
            found = traced(monkeypatch, parts, chosen, {**options, "steps_per_check": steps_per_check})
            for question, (tokens, logits) in found.items():
                assert tokens == alone[question][0]
                assert all(map(torch.equal, logits, alone[question][1]))
    finally:
        torch.set_num_threads(before)
    assert len({tuple(tokens) for tokens, _ in alone.values()}) > 20
    assert len({len(tokens) for tokens, _ in alone.values()}) > 2


def digest_of(found):
    return hashlib.sha256(repr([(q, found[q][0]) for q in sorted(found)]).encode()).hexdigest()


@needs_native
def test_the_same_answers_after_a_restart(monkeypatch):
    program = """
import pytest
from tests.generation.test_decoding import SAMPLED, digest_of, float32_parts, traced
print(digest_of(traced(pytest.MonkeyPatch(), float32_parts(), list(range(90))[::-1], SAMPLED)))
"""
    done, alone, parts = run_python(program), {}, float32_parts()
    assert done.returncode == 0, done.stderr
    for question in range(90):
        alone |= traced(monkeypatch, parts, [question], SAMPLED)
    assert done.stdout.split() == [digest_of(alone)]
