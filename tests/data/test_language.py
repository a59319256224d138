"""Sentences say what is true, say which attributes they state, and descriptions can be read back."""

import numpy as np
import pytest

from unif2ace.data.attributes import ATTRIBUTES, NONE, visible
from unif2ace.data.avatars import sample_face
from unif2ace.data.language import caption, describe_prompt, full_caption, parse_full_caption, questions
from unif2ace.pipeline import CAPTION_REQUEST


@pytest.fixture(scope="module")
def faces():
    rng = np.random.default_rng(1)
    return [sample_face(rng) for _ in range(300)]


def test_a_caption_names_the_values_it_states(faces):
    rng = np.random.default_rng(0)
    for face in faces:
        text, stated = caption(face, rng)
        assert set(stated) <= set(visible(face))
        for name in stated:
            assert face[name] == NONE or face[name] in text, (name, text)
    assert caption(faces[0], np.random.default_rng(5)) == caption(faces[0], np.random.default_rng(5))


def test_a_caption_without_mentions_states_nothing(faces):
    for face in faces[:20]:
        text, stated = caption(face, np.random.default_rng(0), mention=0.0)
        assert stated == []
        assert text in ("a person", "a face", "somebody")


def test_a_colour_is_only_said_of_a_thing_that_is_named(faces):
    rng = np.random.default_rng(0)
    for face in faces:
        stated = caption(face, rng, mention=0.5).attributes
        for color in ("hair color", "headwear color", "facial hair color", "clothing color"):
            assert color not in stated or color.removesuffix(" color") in stated


def test_descriptions_are_complete_and_can_be_read_back(faces):
    for face in faces:
        seen = visible(face)
        assert parse_full_caption(full_caption(seen)) == seen


def test_foreign_descriptions_state_only_what_they_share():
    assert parse_full_caption("a person with fair skin, nonsense, smiling") == {"skin": "fair", "mouth": "smiling"}
    assert parse_full_caption("") == {}


def test_answers_are_true(faces):
    rng = np.random.default_rng(0)
    truths = []
    for face in faces:
        seen, asked = visible(face), questions(face, rng)
        assert len(asked) >= 10
        for question, answer, name in asked:
            if question in ATTRIBUTES[name].question:
                assert answer == seen[name]
            elif question.startswith("Is this true? "):
                claim = question.removeprefix("Is this true? ").removeprefix(f"{name}: ")
                assert claim in ATTRIBUTES[name].values
                assert answer == ("yes" if seen[name] == claim else "no")
                truths.append(answer)
            else:
                assert answer == ("no" if seen[name] == NONE else "yes")
    assert 0.4 < truths.count("yes") / len(truths) < 0.6


def test_the_request_for_a_description_is_one_the_model_was_trained_on():
    rng = np.random.default_rng(0)
    assert CAPTION_REQUEST in {describe_prompt(rng) for _ in range(50)}
