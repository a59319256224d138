"""Three scores of a model on labelled faces that it has not seen, each between 0 and 1 and each split by attribute.

* generation: faces are drawn from captions, and a classifier (the judge) looks for every attribute that the caption
  *states*. The judge errs too, so its own accuracy on the real faces of the same captions stands beside: a perfect
  generator scores about that.
* answers: exact match of the whole answer, over every question about a face (open, yes/no, true or false).
* captions: the share of a face's visible attributes that the model's description states correctly (recall).

`macro` is the mean over attributes, so that rare attributes count as much as frequent ones; `overall` is the mean over
all single judgements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from PIL import Image

from unif2ace.codec.pixels import to_float
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.language import parse_full_caption
from unif2ace.data.loader import FaceTable
from unif2ace.errors import UserError
from unif2ace.evaluation.judge import Judge
from unif2ace.pipeline import UniF2acePipeline

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """Accuracy per attribute, over `counts` judgements each; `items` faces or questions took `seconds`."""

    per_attribute: dict[str, float]
    counts: dict[str, int]
    macro: float
    overall: float
    items: int
    seconds: float

    @classmethod
    def of(cls, judgements: Iterable[tuple[str, bool]], items: int, seconds: float) -> Score:
        """From (attribute, was it right) pairs; attributes appear in the order of `ATTRIBUTES`."""
        right, counts = dict.fromkeys(ATTRIBUTES, 0), dict.fromkeys(ATTRIBUTES, 0)
        for name, correct in judgements:
            right[name] += correct
            counts[name] += 1
        seen = {name: count for name, count in counts.items() if count}
        if not seen:
            raise UserError("evaluation: expected faces with labelled attributes, got none")
        accuracy = {name: right[name] / count for name, count in seen.items()}
        overall = sum(right.values()) / sum(seen.values())
        return cls(accuracy, seen, sum(accuracy.values()) / len(accuracy), overall, items, seconds)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def evaluate_generation(
    pipe: UniF2acePipeline,
    judge: Judge,
    table: FaceTable,
    num_faces: int | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    batch_size: int = 32,
    on_step: Progress | None = None,
) -> tuple[Score, Score]:
    """(score of the drawn faces, the judge's own score on the real faces), both over the attributes captions state.

    The first caption of each of the first `num_faces` faces (default all) is drawn once, face i with seed `seed` + i.
    """
    count = _count(table, num_faces)
    captions = [table.captions[row][0] for row in range(count)]
    started = time.perf_counter()
    faces = pipe.generate(
        [caption.text for caption in captions],
        steps=steps,
        guidance_scale=guidance_scale,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        on_step=on_step,
    )
    seconds = time.perf_counter() - started
    stated = [caption.attributes for caption in captions]
    drawn = judge_labels(judge, torch.stack([_pixels(face) for face in faces]), batch_size)
    real = judge_labels(judge, table.images[:count], batch_size)
    return (
        Score.of(_agreements(table.attributes, drawn, stated), count, seconds),
        Score.of(_agreements(table.attributes, real, stated), count, 0.0),
    )


def evaluate_answers(
    pipe: UniF2acePipeline,
    table: FaceTable,
    num_faces: int | None = None,
    *,
    batch_size: int = 64,
    on_answer: Progress | None = None,
) -> Score:
    """Exact match over all questions about the first `num_faces` faces; a question counts for the attribute it asks."""
    count = _count(table, num_faces)
    asked = [(row, question) for row in range(count) for question in table.questions[row]]
    images = to_images(table, count)
    started = time.perf_counter()
    replies = pipe.answer(
        [images[row] for row, _ in asked],
        [question.question for _, question in asked],
        batch_size=batch_size,
        on_answer=on_answer,
    )
    seconds = time.perf_counter() - started
    pairs = zip(asked, replies, strict=True)
    return Score.of([(q.attribute, reply == q.answer) for (_, q), reply in pairs], len(asked), seconds)


def evaluate_captions(
    pipe: UniF2acePipeline,
    table: FaceTable,
    num_faces: int | None = None,
    *,
    batch_size: int = 64,
    on_answer: Progress | None = None,
) -> Score:
    """Recall of the visible attributes in the model's descriptions of the first `num_faces` faces."""
    count = _count(table, num_faces)
    started = time.perf_counter()
    captions = pipe.caption(to_images(table, count), batch_size=batch_size, on_answer=on_answer)
    seconds = time.perf_counter() - started
    judgements = []
    for seen, text in zip(table.attributes, captions, strict=False):
        stated = parse_full_caption(text)
        judgements += [(name, stated.get(name) == value) for name, value in seen.items()]
    return Score.of(judgements, count, seconds)


def to_images(table: FaceTable, count: int) -> list[Image.Image]:
    """The first `count` pictures of `table`."""
    return [Image.fromarray(image.numpy()) for image in table.images[:count]]


@torch.no_grad()
def judge_labels(judge: Judge, images: torch.Tensor, batch_size: int) -> list[dict[str, str]]:
    """What the judge sees in uint8 images [n, S, S, 3]: attribute name -> value, for each."""
    known = {name: len(attribute.values) for name, attribute in ATTRIBUTES.items()}
    if judge.config.classes != known:
        raise UserError("judge: expected one trained on the attributes of this version, got another; train it again")
    device = next(judge.parameters()).device
    seen = []
    for part in images.split(batch_size):
        for row in judge.predict(to_float(part).to(device)).tolist():
            pairs = zip(judge.names, row, strict=True)
            seen.append({name: ATTRIBUTES[name].values[index] for name, index in pairs})
    return seen


def score_table(scores: dict[str, Score]) -> str:
    """Aligned text, in percent: one row per attribute, then the mean over attributes and over all judgements."""
    titles = {name: name.replace("_", " ") for name in scores}
    rows = [["attribute", *titles.values()]]
    for attribute in ATTRIBUTES:
        values = [score.per_attribute.get(attribute) for score in scores.values()]
        if any(value is not None for value in values):
            rows.append([attribute, *("-" if value is None else f"{100 * value:.1f}" for value in values)])
    rows.append(["mean over attributes", *(f"{100 * score.macro:.1f}" for score in scores.values())])
    rows.append(["mean over judgements", *(f"{100 * score.overall:.1f}" for score in scores.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def _agreements(
    truth: list[dict[str, str]], seen: list[dict[str, str]], stated: list[list[str]]
) -> list[tuple[str, bool]]:
    triples = zip(truth, seen, stated, strict=False)  # `truth` may hold more faces than were drawn
    return [(name, found[name] == face[name]) for face, found, names in triples for name in names]


def _pixels(face: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(face.tobytes()), dtype=torch.uint8).view(face.height, face.width, 3)


def _count(table: FaceTable, num_faces: int | None) -> int:
    if num_faces is not None and num_faces < 1:
        raise UserError(f"faces: expected at least 1, got {num_faces}")
    return len(table) if num_faces is None else min(num_faces, len(table))
