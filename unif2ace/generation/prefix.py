"""What the images of one prompt share: the keys and values of its text, and the whole first step.

Text rows see only earlier text, so their keys and values are the same at every step, for every image of the prompt. And
before step 0 all images of a prompt hold the same tokens (`mask`, but for what is kept): the hidden rows of that step
are computed once for all of them. For the empty prompt of guidance that is once for all prompts, a constant of the
model. So an image starts at its second pass through the transformer, and with what the first layer has computed of its
rows (first_layer.py).

Cost: text + N + 2 rows per prompt, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unif2ace.generation.first_layer import side_by_side
from unif2ace.model.transformer import UniF2ace
from unif2ace.vocabulary import pack_generation


class Prefix(NamedTuple):
    """`text`: keys and values [layers, text rows, heads, head_dim]. `hidden` [u0, H]: the unknown rows at step 0.

    `first` [N + 2, 4, H]: `side_by_side` of the image rows at step 0.
    """

    text: tuple[Tensor, Tensor]
    hidden: Tensor
    first: Tensor


@torch.no_grad()
def run_prefixes(model: UniF2ace, prompts: Sequence[Sequence[int]], codes: Sequence[Tensor]) -> list[Prefix]:
    """The prefix of every pair of a prompt (text ids) and codes [N] on the host, `mask_code` where unknown.

    One pass over all of them. Raises `UserError` for ids or codes out of range.
    """
    vocabulary, config, device = model.vocabulary, model.config, model.head.weight.device
    size, texts, images = config.num_image_tokens, [list(prompt) for prompt in prompts], list(codes)
    batch = pack_generation(vocabulary, texts, torch.stack(images))
    unknown = [(image == vocabulary.mask_code).nonzero()[:, 0] for image in images]
    counts = [len(positions) for positions in unknown]
    different = list(dict.fromkeys(counts))
    first = batch.layout.code_rows[::size].repeat_interleave(torch.tensor(counts))
    cache = model.new_cache(len(texts), max(map(len, texts)) + 3)
    batch = batch.to(device)
    started = model.start(batch)
    hidden = model.resume(
        started,
        batch.layout,
        mask_ratio=torch.tensor([max(1, count) / size for count in different], device=device),
        ratio_of_image=torch.tensor([different.index(count) for count in counts], device=device),
        cache=cache,
        rows=(first + torch.cat(unknown)).to(device),
    ).hidden
    of_images = side_by_side(started).index_select(0, batch.layout.image_rows).split(config.image_rows)
    pairs = zip(hidden.split(counts), of_images, strict=True)
    return [Prefix(cache.read_row(row), *(part.clone() for part in pair)) for row, pair in enumerate(pairs)]
