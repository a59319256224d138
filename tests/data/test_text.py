"""The tokenizer: every string has ids, and they come back as the string in lower case."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tokenizer
from unif2ace.data.text import END_OF_TEXT, TextTokenizer
from unif2ace.errors import UserError


@given(st.text(alphabet=string.ascii_letters + string.digits + string.punctuation + " ", max_size=40))
def test_ascii_round_trip(text):
    ids = tokenizer().encode(text)
    assert all(0 <= token < tokenizer().size for token in ids)
    assert tokenizer().decode(ids) == text.lower().strip()


@pytest.mark.parametrize("text", ["", " ", "\n\t", "é", "日本語", "🙂🙃", "\u202eabc", "a\x00b", "ﬁ"])
def test_every_string_has_ids(text):
    assert all(0 <= token < tokenizer().size for token in tokenizer().encode(text))


def test_case_does_not_matter():
    assert tokenizer().encode("Red HAIR") == tokenizer().encode("red hair")


def test_question_template():
    text = tokenizer()
    assert text.encode_question("Why?") == text.encode("USER: \nWhy? ASSISTANT:")
    # The ids of an answer do not depend on the question before it: training and decoding cut at the same place.
    joined = text.encode("USER: \nWhy? ASSISTANT: red")
    assert joined == text.encode_question("Why?") + text.encode("red")


def test_saved_tokenizer_is_the_same(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    loaded = TextTokenizer.from_pretrained(tmp_path)
    assert (loaded.size, loaded.end_of_text) == (tokenizer().size, tokenizer().end_of_text)
    assert loaded.encode("a smiling person") == tokenizer().encode("a smiling person")
    assert loaded.decode([loaded.end_of_text, *loaded.encode("red hair")]) == "red hair"
    assert loaded.encode(END_OF_TEXT) == [loaded.end_of_text]


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json: expected a tokenizer file, found none"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="expected a tokenizer file of the `tokenizers` library"):
        TextTokenizer.from_pretrained(tmp_path)
