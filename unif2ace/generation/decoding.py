"""Answers and captions: batched next-token decoding with a key/value cache.

An image's rows never see the text behind them, so each image runs once, whatever the number of questions about it; then
every question runs once, and after that one row per sequence and step. Questions of different lengths share a batch:
rows are packed, and their numbers are known on the host. The cache has one shape from the first step to the last.

Greedy by default; with temperature, top-k and top-p, from the same stateless noise as faces.

**An answer depends on its own image, question and seed alone**: on CPUs by the back end `native` in float32 its tokens
and their logits have the same bits alone, in any batch, with any number of threads and after a restart. Dense products
give a row the same bits in any company (`ops/linear.py`). Those of the experts do so by either of two ways, for few
rows or for many: passes over text take the one, passes over images the other, however many rows they have
(`ops.expert_mlp`, `few`). Elsewhere the last bit of a logit may differ between batches, and rarely a token.

Cost: (N + 3) rows per image, the question's rows, one row per token; decoding reads all weights in every step. The host
looks at the tokens every `steps_per_check` steps: on a GPU it would wait for the device, and a sequence that has ended
meanwhile runs along unheeded; on a CPU looking costs nothing, and who has ended leaves the batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.generation.settings import check_answering
from unif2ace.model.attention import KVCache
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import linear, sample_tokens
from unif2ace.ops._noise import TEXT_STREAM
from unif2ace.vocabulary import pack_questions, pack_text_step, pack_understanding_image

STEPS_PER_CHECK = {"cpu": 1, "cuda": 8}

Stop = Callable[[list[int]], bool]


class Piece(NamedTuple):
    """What one look at the tokens brought for the answer to question `index`: its new `tokens`, and is that the end."""

    index: int
    tokens: list[int]
    ended: bool


@torch.no_grad()
def stream_answers(
    model: UniF2ace,
    codes: Tensor,
    questions: Sequence[Sequence[int]],
    features: dict[str, Tensor] | None,
    *,
    images: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
    stop: Stop | None = None,
    steps_per_check: int | None = None,
) -> Iterator[Piece]:
    """Answers as they grow: the pieces of each, in order; those of different answers interleaved.

    Args:
        codes: [P, N] of the images. features: name -> [P, rows, width] of them; None where the model reads none.
        questions: token ids with the template, Q of them.
        images: question q is about image images[q]; None: about image q.
        max_new_tokens: longest answer. An answer ends before the end-of-text token, which is left out.
        temperature: 0 is greedy; above, `top_k` and `top_p` narrow the choice. seeds: one int64 per question.
        stop: stop(tokens so far) ends an answer after these tokens.
        steps_per_check: after so many steps the host looks at the tokens; None takes `STEPS_PER_CHECK`.

    Raises:
        UserError: options out of range, ids that are none, more or fewer images or seeds than questions.
    """
    check_answering(max_new_tokens, temperature, top_k, top_p)
    vocabulary, device = model.vocabulary, model.head.weight.device
    which = list(range(len(questions))) if images is None else list(images)
    if len(which) != len(questions) or any(not 0 <= image < len(codes) for image in which):
        raise UserError(f"answers: expected an image below {len(codes)} for each of {len(questions)} questions")
    if seeds is not None and len(seeds) != len(questions):
        raise UserError(f"answers: expected one seed for each of {len(questions)} questions, got {len(seeds)}")
    weight, bias = model.head.weight[: vocabulary.n_text], model.head.bias[: vocabulary.n_text]
    if not which:
        return
    seed_of = torch.tensor(list(seeds) if seeds is not None else [0] * len(which), device=device)
    every = steps_per_check or STEPS_PER_CHECK.get(device.type, 1)

    length = codes.shape[1] + 3 + 1 + max(map(len, questions)) + max_new_tokens
    cache = model.new_cache(len(which), length)
    _run_images(model, cache, codes, which, features)
    batch = pack_questions(vocabulary, questions, cache.lengths, device)
    hidden = model(batch, cache=cache).hidden[batch.layout.last_rows]

    answers: list[list[int]] = [[] for _ in which]
    active = list(range(len(which)))  # answers that have not ended, in the order of `hidden`
    unread: list[Tensor] = []  # tokens [len(active)] of the steps since the last look
    for step in range(max_new_tokens):
        if not active:
            return
        rows = torch.tensor(active).to(device, non_blocking=True)
        counter = torch.full_like(rows, step)
        logits = _restrict(linear(hidden, weight, bias), temperature, top_k, top_p)
        chosen, _ = sample_tokens(logits, seed_of[rows], counter, counter, temperature=temperature, stream=TEXT_STREAM)
        unread.append(chosen)
        last = step + 1 == max_new_tokens
        if last or len(unread) == every:
            going = []
            for i, tokens in enumerate(torch.stack(unread, dim=1).tolist()):
                piece = _read(active[i], tokens, answers[active[i]], vocabulary.eot, stop)
                yield piece._replace(ended=piece.ended or last)
                if not piece.ended:
                    going.append(i)
            if len(going) < len(active):
                active = [active[i] for i in going]
                chosen = chosen[torch.tensor(going, dtype=torch.int64).to(device, non_blocking=True)]
            unread = []
        if not last and active:
            following = pack_text_step(chosen, [cache.lengths[row] for row in active], active)
            hidden = model(following, cache=cache).hidden


def _read(index: int, tokens: list[int], answer: list[int], end: int, stop: Stop | None) -> Piece:
    """Add `tokens` to `answer` up to its end; the piece that was added."""
    before = len(answer)
    for token in tokens:
        if token == end:
            return Piece(index, answer[before:], True)
        answer.append(token)
        if stop is not None and stop(answer):
            return Piece(index, answer[before:], True)
    return Piece(index, answer[before:], False)


def _run_images(
    model: UniF2ace, cache: KVCache, codes: Tensor, which: list[int], features: dict[str, Tensor] | None
) -> None:
    """Fill row q of the cache with the image of question q; an image that several ask about runs once."""
    rows_of: dict[int, list[int]] = {}
    for row, image in enumerate(which):
        rows_of.setdefault(image, []).append(row)
    asked = list(rows_of)
    if asked != list(range(len(codes))):
        chosen = torch.tensor(asked, dtype=torch.int64, device=codes.device)
        codes = codes[chosen]
        features = (
            None if features is None else {name: value[chosen.to(value.device)] for name, value in features.items()}
        )
    batch = pack_understanding_image(model.vocabulary, codes, [rows_of[image][0] for image in asked])
    model(batch.to(model.head.weight.device), features=features, cache=cache)
    for first, *others in rows_of.values():
        for row in others:
            cache.write_row(row, cache.read_row(first))


def _restrict(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf outside the `top_k` best and outside the smallest set with probability `top_p` (at least the best stays)."""
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], float("-inf"))
    if top_p is not None and temperature > 0:
        ordered, index = logits.sort(dim=1, descending=True, stable=True)
        wide = ordered.to(torch.promote_types(ordered.dtype, torch.float32))  # 16 bits lose the sums of small numbers
        probability = (wide / temperature).softmax(1)
        before = probability.cumsum(1) - probability
        logits = logits.scatter(1, index, ordered.masked_fill(before >= top_p, float("-inf")))
    return logits
