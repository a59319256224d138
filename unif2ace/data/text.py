"""Text <-> token ids: a byte-level BPE from the `tokenizers` library.

Byte-level means every string has ids and no string is out of vocabulary. The small model's tokenizer lower-cases
first, so "Red Hair" and "red hair" are the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unif2ace.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
QUESTION_TEMPLATE = "USER: \n{question} ASSISTANT:"


class TextTokenizer:
    """`encode(text) -> list[int]`, `decode(ids) -> str`; `size` ids, `end_of_text` serves as begin, end and
    separator.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise UserError(f"tokenizer: expected the special token {END_OF_TEXT}, found none")
        self._tokenizer = tokenizer
        self.end_of_text: int = end_of_text
        self.size: int = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> TextTokenizer:
        """Learn at most `size` ids: 256 bytes, merges, the end-of-text token. A second for 100,000 captions."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """Read `tokenizer.json` from `folder`; `UserError` where it is missing or no tokenizer."""
        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise UserError(f"{path}: expected a tokenizer file, found none")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception for malformed JSON
            raise UserError(f"{path}: expected a tokenizer file of the `tokenizers` library, got: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        self._tokenizer.save(str(Path(folder) / TOKENIZER_FILE))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out, without surrounding white space."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def encode_question(self, question: str) -> list[int]:
        """Ids of the question in the template that the model is trained on; the answer follows."""
        return self.encode(QUESTION_TEMPLATE.format(question=question))
