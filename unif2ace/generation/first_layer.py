"""What the first layer computes of an image row by itself, kept from step to step.

Up to its attention the first layer sees nothing of a row but its token and its place: the products of query, key and
value and, in a parallel block, the whole feed-forward (`Block.tokenwise`). A token changes once, when it is drawn. So
this part runs once for all rows of an image and then for the tokens just drawn, instead of for all rows at every step.
Keys and values stay where attention reads them, in the cache; queries and the residual stream are kept here.

Saved: nearly 1 / L of these products in a model of L layers. Cost: memory of 2 H numbers per row of the cache.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from unif2ace.generation.prefix import invariant_rows
from unif2ace.model.attention import KVCache
from unif2ace.model.transformer import Tokenwise, UniF2ace


class FirstLayer:
    """Queries [slots, heads, head_dim] and residual stream [slots, H] of image rows, at the flat slots of the cache."""

    def __init__(self, model: UniF2ace, cache: KVCache) -> None:
        self.cache = cache
        keys, _ = cache.layer(0)
        self.query = keys.new_zeros(keys.shape)
        self.x = keys.new_zeros(len(keys), model.config.hidden_size)
        self.min_rows = invariant_rows(model.config)

    def update(self, model: UniF2ace, tokens: Tensor, places: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Image rows whose token is new; all [R] int64: ids, rows of their image, positions, flat slots."""
        rows = len(slots)
        padding = (0, max(0, self.min_rows - rows))
        new = model.start_image_rows(*(functional.pad(values, padding) for values in (tokens, places, positions)))
        self.query.index_copy_(0, slots, new.query[:rows])
        self.x.index_copy_(0, slots, new.x[:rows])
        self.cache.write(0, slots, new.key[:rows], new.value[:rows])

    def read(self, slots: Tensor) -> Tokenwise:
        """The rows at flat `slots` [T], to `UniF2ace.resume` from."""
        return Tokenwise(self.x.index_select(0, slots), self.query.index_select(0, slots))
