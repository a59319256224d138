"""Answers as text: pieces join to the decoded answer, cut at the first stop text, characters whole."""

import pytest

from tests.tiny import tokenizer
from unif2ace.generation.answer_text import AnswerText, cut, has_stop

TEXT = "the hair is red. grüße, 你好!"


def pieces_of(text, stops=(), size=1):
    ids = tokenizer().encode(text)
    answer = AnswerText(tokenizer(), stops)
    pieces = [answer.add(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [*pieces, answer.finish()]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_pieces_join_to_the_text(size):
    pieces = pieces_of(TEXT, size=size)
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 1 or size == 100


@pytest.mark.parametrize("stops", [["."], ["is red"], ["red", "hair is"], ["nowhere"], ["grüße, 你"]])
def test_a_stop_text_is_never_shown(stops):
    pieces = pieces_of(TEXT, stops)
    shown = ""
    for piece in pieces:
        shown += piece
        assert not has_stop(shown, stops)
    assert shown == cut(TEXT, stops)


def test_what_might_begin_a_stop_text_waits():
    answer = AnswerText(tokenizer(), ["end"])
    assert answer.add(tokenizer().encode("the e")) == "the "
    assert answer.finish() == "e"


def test_an_answer_that_breaks_off_within_a_character_shows_that():
    ids = tokenizer().encode("你")
    assert len(ids) > 2  # a space and some bytes
    answer = AnswerText(tokenizer())
    assert answer.add(ids[:-1]) == ""
    assert answer.finish() == "\ufffd"
