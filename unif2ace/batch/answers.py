"""A table of questions about pictures to answers.

| column | meaning |
|---|---|
| `image` | a picture file; a relative path starts at the folder of the table |
| `question` | one question |
| `caption` | true: describe the picture; stands in the place of a question |
| `id` | text or an integer, copied into the result; where it is missing, the row's index |

The result's `number` is the row, counted from 0: row i is line i + 1 of a .jsonl file.

Answers are greedy. A picture that several rows of a batch ask about is read and encoded once.

An answer depends on its own row alone (`generation/decoding.py`): by the native back end on CPUs of one kind, in
float32, neither the size of the batches nor the processes that share the table, nor their threads, change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
from PIL import Image

from unif2ace import inputs
from unif2ace.batch.record import Line
from unif2ace.batch.table import Row
from unif2ace.errors import UserError
from unif2ace.generation.engine import FAILURES
from unif2ace.pipeline import CAPTION_REQUEST, UniF2acePipeline

COLUMNS = ("image", "question", "caption", "id")
FIELDS = (
    ("number", pa.int64()),
    ("id", pa.string()),
    ("image", pa.string()),
    ("question", pa.string()),
    ("caption", pa.bool_()),
    ("answer", pa.string()),
    ("model_sha256", pa.string()),
    ("error", pa.string()),
)


@dataclass(frozen=True)
class AnswerTask:
    """One row; or why it has no answer. Holds what JSON can hold."""

    numbers: list[int]
    id: str
    image: str | None = None
    question: str | None = None
    caption: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Answers:
    """What answering a table takes beside the model: where its pictures are, and whether they may be fitted."""

    task_type: ClassVar[type] = AnswerTask

    folder: Path
    fit: bool
    model_sha256: str
    max_batch: int

    def count(self, row: Row) -> int:
        """A row has one answer."""
        return 1

    def tasks(self, row: Row, first: int, numbers: list[int]) -> Iterator[AnswerTask]:
        """The work of a row."""
        caption = row.values.get("caption") is True
        known = (numbers, row.id, row.text("image"), row.text("question"), caption)
        try:
            row.check()
            _check_columns(row.values)
            yield AnswerTask(*known)
        except UserError as error:
            yield AnswerTask(*known, error=str(error))

    def run(self, pipe: UniF2acePipeline, tasks: Iterable[AnswerTask], partial: Path) -> Iterator[list[Line]]:
        """Answer, a batch at a time."""
        tasks = iter(tasks)
        while batch := list(islice(tasks, self.max_batch)):
            yield self._answer(pipe, batch)

    def _answer(self, pipe: UniF2acePipeline, batch: list[AnswerTask]) -> list[Line]:
        pictures: dict[str, Image.Image] = {}
        good: list[AnswerTask] = []
        lines: list[Line] = []
        for task in batch:
            try:
                self._check(pipe, task)
                if task.image not in pictures:
                    pictures[task.image] = inputs.open_face(self.folder / task.image, pipe.image_size, self.fit)
                good.append(task)
            except UserError as error:  # the result tells paths as the table does, wherever that lies
                lines.append(self._line(task, error=str(error).replace(f"{self.folder}/", "")))
        try:
            return lines + self._ask(pipe, good, pictures)
        except FAILURES:  # what cannot be checked beforehand: memory
            for task in good:
                try:
                    lines += self._ask(pipe, [task], pictures)
                except FAILURES as error:
                    lines.append(self._line(task, error=str(error).splitlines()[0]))
        return lines

    def _check(self, pipe: UniF2acePipeline, task: AnswerTask) -> None:
        if task.error is not None:
            raise UserError(task.error)
        limit = pipe.defaults.max_prompt_tokens
        inputs.encode_texts("question", [_question(task)], pipe.tokenizer, limit, question=True)

    def _ask(self, pipe: UniF2acePipeline, tasks: list[AnswerTask], pictures: dict[str, Image.Image]) -> list[Line]:
        if not tasks:
            return []
        texts = pipe.answer([pictures[task.image] for task in tasks], [_question(task) for task in tasks])
        return [self._line(task, answer=text) for task, text in zip(tasks, texts, strict=True)]

    def _line(self, task: AnswerTask, answer: str | None = None, error: str | None = None) -> Line:
        return {
            "number": task.numbers[0],
            "id": task.id,
            "image": task.image,
            "question": task.question,
            "caption": task.caption,
            "answer": answer,
            "model_sha256": self.model_sha256,
            "error": error,
        }


def _question(task: AnswerTask) -> str:
    return CAPTION_REQUEST if task.caption else task.question


def _check_columns(values: dict[str, object]) -> None:
    if "image" not in values:
        raise UserError("image: expected a picture file, got none")
    if values["image"] == "":
        raise UserError("image: expected the path of a picture file, got an empty string")
    if not isinstance(values["image"], str):
        raise UserError(f"image: expected the path of a picture file, got {type(values['image']).__name__}")
    caption = values.get("caption", False)
    if not isinstance(caption, bool):
        raise UserError(f"caption: expected true or false, got {caption!r}")
    if ("question" in values) == caption:
        raise UserError(f"question: expected a question or caption = true, got {'both' if caption else 'neither'}")
    if not caption:
        inputs.as_texts("question", [values["question"]])
