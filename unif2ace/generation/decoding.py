"""Answers and captions: batched next-token decoding with a key/value cache.

The image prefix and the question are run once; then one row per sequence and step. Questions of different lengths
share a batch (rows are packed, lengths are known on the host). Greedy by default; with temperature, top-k and top-p,
from the same stateless noise as faces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import linear, sample_tokens
from unif2ace.vocabulary import pack_text_step, pack_understanding

TEXT_STREAM = 2  # noise stream of text decoding (spec: 0 tokens, 1 confidence, 2 text, 3 training masks)


@torch.no_grad()
def decode_answers(
    model: UniF2ace,
    codes: Tensor,
    questions: Sequence[Sequence[int]],
    features: dict[str, Tensor] | None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
    backend: str | None = None,
) -> list[list[int]]:
    """Token ids of one answer per image: `codes` [B, N], `questions` (token ids with the template), features of the
    images.

    Stops at the end-of-text token (left out of the result) or after `max_new_tokens`. `temperature` 0 is greedy.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p: expected a number in (0, 1], got {top_p}")
    vocabulary, device = model.vocabulary, model.head.weight.device
    batch = len(questions)
    weight, bias = model.head.weight[: vocabulary.n_text], model.head.bias[: vocabulary.n_text]
    seed_of = torch.tensor(list(seeds) if seeds is not None else [0] * batch, device=device)
    prompt = pack_understanding(vocabulary, codes, questions).to(device)
    cache = model.new_cache(batch, max(s.rows for s in prompt.layout.sequences) + max_new_tokens)
    hidden = model(prompt, features=features, cache=cache).hidden[prompt.layout.last_rows]

    answers: list[list[int]] = [[] for _ in range(batch)]
    active = list(range(batch))  # sequences that have not ended, in the order of `hidden`
    for step in range(max_new_tokens):
        logits = _restrict(linear(hidden, weight, bias), temperature, top_k, top_p)
        rows = torch.tensor(active, device=device)
        counter = torch.full_like(rows, step)
        chosen, _ = sample_tokens(
            logits, seed_of[rows], counter, counter, temperature=temperature, stream=TEXT_STREAM, backend=backend
        )
        going = []
        for i, token in enumerate(chosen.tolist()):
            if token != vocabulary.eot:
                answers[active[i]].append(token)
                going.append(i)
        if not going or step + 1 == max_new_tokens:
            break
        active = [active[i] for i in going]
        batch_step = pack_text_step(chosen[going].long(), [cache.lengths[row] for row in active], active).to(device)
        hidden = model(batch_step, cache=cache).hidden
    return answers


def _restrict(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf outside the `top_k` best and outside the smallest set with probability `top_p` (at least the best stays)."""
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], float("-inf"))
    if top_p is not None and temperature > 0:
        ordered, index = logits.sort(dim=1, descending=True, stable=True)
        probability = (ordered / temperature).softmax(1)
        before = probability.cumsum(1) - probability
        logits = logits.scatter(1, index, ordered.masked_fill(before >= top_p, float("-inf")))
    return logits
