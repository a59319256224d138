"""Answers and captions by batched decoding with a cache, against recomputing everything for every token.

    reference     image, question and answer so far in full for every token, as Show-o's published code decodes them,
                  but for all questions in one batch; on reference ops: the baseline
    recompute     the same on the ops of the back end `auto`
    engine        `UniF2acePipeline.answer`, pictures read included, as in the others

The gate, in float32: most answers are those of the baseline; one rounding that flips a token changes the rest.

Goal on two CPU cores: engine against recomputing 5x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from PIL import Image

from benchmarks import shapes
from unif2ace.evaluation import speed
from unif2ace.inputs import as_pixels
from unif2ace.ops import linear
from unif2ace.pipeline import CAPTION_REQUEST, UniF2acePipeline
from unif2ace.vocabulary import pack_understanding

SAME_SHARE = 0.75  # of the answers must be those of the baseline

load = cache(speed.load)  # one model for all of its benchmarks


@torch.no_grad()
def answers_by_recomputing(pipe: UniF2acePipeline, images: list[Image.Image], questions: list[str]) -> list[str]:
    """What `pipe.answer` returns, without a cache."""
    model, limit = pipe.model, pipe.defaults.max_new_tokens
    vocabulary = model.vocabulary
    weight, bias = model.head.weight[: vocabulary.n_text], model.head.bias[: vocabulary.n_text]
    pixels, which = as_pixels("image", images, pipe.image_size)
    codes, features = pipe.read_images(pixels)
    texts = [pipe.tokenizer.encode_question(question) for question in questions]
    answers: list[list[int]] = [[] for _ in questions]
    active = list(range(len(questions)))
    for _ in range(limit):
        rows = [which[i] for i in active]
        batch = pack_understanding(vocabulary, codes[rows], [texts[i] + answers[i] for i in active])
        hidden = model(batch, features={name: value[rows] for name, value in features.items()}).hidden
        tokens = linear(hidden[batch.layout.last_rows], weight, bias).argmax(1).tolist()
        for i, token in zip(active, tokens, strict=True):
            answers[i] += [token] * (token != vocabulary.eot)
        active = [i for i, token in zip(active, tokens, strict=True) if token != vocabulary.eot]
        if not active:
            break
    return [pipe.tokenizer.decode(answer) for answer in answers]


def asked(pipe: UniF2acePipeline, what: str, number: int) -> tuple[list[Image.Image], list[str]]:
    """So many pictures and questions: captions are of different faces, of the questions four are about each."""
    if what == "captions":
        return speed.pictures(pipe, number), [CAPTION_REQUEST] * number
    images, questions = speed.asked(pipe, -(-number // len(speed.QUESTIONS)))
    return images[:number], questions[:number]


@pytest.mark.parametrize("shape", list(shapes.BATCHES))
@pytest.mark.parametrize("what", ["answers", "captions"])
def bench_answers(what: str, shape: str, device: str, compare: Callable) -> None:
    size = shapes.BATCHES[shape]
    pipe = load(size.model, device)
    images, questions = asked(pipe, what, size.requests)

    def recompute() -> list[str]:
        return answers_by_recomputing(pipe, images, questions)

    def engine() -> list[str]:
        return pipe.answer(images, questions, batch_size=size.requests)

    calls = {
        "reference": speed.on_backend("reference", recompute),
        "recompute": speed.on_backend("auto", recompute),
        "engine": speed.on_backend("auto", engine),
    }
    expected = cache(calls["reference"])

    def gate(name: str) -> None:
        same = sum(answer == other for answer, other in zip(calls[name](), expected(), strict=True))
        assert same >= SAME_SHARE * len(questions), f"{same} of {len(questions)} answers are those of the reference"

    compare(
        calls,
        baseline="reference",
        op=what,
        shape=shape,
        case="forward",
        dtype=pipe.dtype,
        gate=gate if pipe.dtype == torch.float32 else None,
        items=(len(questions), what),
    )
