"""What the first layer computes of an image row by itself, kept from step to step.

Up to its attention the first layer sees nothing of a row but its token and its place: the products of query, key and
value and, in a parallel block, the whole feed-forward (`Block.tokenwise`). A token changes once, when it is drawn. So
this part runs once per prompt, for the image before its first step, and then for tokens just drawn, instead of for all
rows at every step.

Saved: nearly 1 / L of these products in a model of L layers. Cost: 4 H numbers in memory per row, read once a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from unif2ace.model.block import Tokenwise
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops.linear import INVARIANT_ROWS


def side_by_side(part: Tokenwise) -> Tensor:
    """[T, 4, H]: residual stream, query, key and value of each row."""
    return torch.stack([part.x, part.query.flatten(1), part.key.flatten(1), part.value.flatten(1)], dim=1)


class FirstLayer:
    """`kept` [halves, image rows, 4, H]: `side_by_side` of the rows of every half."""

    def __init__(self, model: UniF2ace, halves: int) -> None:
        config = model.config
        self.head_shape = config.num_heads, config.head_dim
        self.kept = model.head.weight.new_empty(halves, config.image_rows, 4, config.hidden_size)
        self.min_rows = INVARIANT_ROWS if self.kept.element_size() == 2 else 0  # as in model/linear.py

    def update(self, model: UniF2ace, tokens: Tensor, places: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Rows whose token is new, all [R] int64: ids, places in their image, positions, half * image rows + place."""
        count = len(rows)
        padding = (0, max(0, self.min_rows - count))
        padded = (functional.pad(values, padding) for values in (tokens, places, positions))
        new = side_by_side(model.start_image_rows(*padded))
        self.kept.flatten(0, 1).index_copy_(0, rows, new[:count])

    def read(self, halves: slice | Tensor) -> Tokenwise:
        """All rows of `halves`, one half after the other: of a range without a copy, or of indices [S]."""
        kept = self.kept[halves] if isinstance(halves, slice) else self.kept.index_select(0, halves)
        x, *projected = kept.flatten(0, 1).unbind(1)
        return Tokenwise(x, *(part.unflatten(1, self.head_shape) for part in projected))
