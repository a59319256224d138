"""Tokens of an answer as text, piece by piece, cut where a stop text begins."""

from __future__ import annotations

from collections.abc import Sequence

from unif2ace.data.text import TextTokenizer

INCOMPLETE = "\ufffd"  # how a token that ends within a character is shown


class AnswerText:
    """The text of one growing answer.

    `add(tokens)` returns what can be shown now: whole characters, and nothing that may be the start of a stop text.
    `finish()` returns the rest. All that was returned, joined, is the answer: the decoded tokens up to the first stop
    text.
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self.shown = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Further tokens; the text that is certain now and was not before."""
        self.tokens += tokens
        text = cut(self.tokenizer.decode(self.tokens), self.stops).rstrip(INCOMPLETE)
        return self._show(text[: len(text) - _held_back(text, self.stops)])

    def finish(self) -> str:
        """The text that was held back."""
        return self._show(cut(self.tokenizer.decode(self.tokens), self.stops))

    def _show(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], max(text, self.shown, key=len)
        return new


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Is one of `stops` in `text`?"""
    return any(stop in text for stop in stops)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the first of `stops` in it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop text."""
    ends = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(ends, default=0)
