"""One transformer layer, in two parts: what acts on each row by itself, and what lets rows see each other.

With the parallel form of Phi (`parallel_block=True`), h = LN(x):

    x = x + Attention(h) + TokenMoE(h)
    x[image rows] = x + s * SequenceMoE(LN2(x))[image rows]

and with `parallel_block=False` attention and token-level MoE follow each other, each behind its own LayerNorm. Without
the MoE levels (`token_moe=None`, `sequence_moe=None`) the layer is Show-o's: attention plus a dense FFN.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from unif2ace.config import UniF2aceConfig
from unif2ace.layout import Layout
from unif2ace.model.attention import Attention, KVCache
from unif2ace.model.sequence_moe import SequenceMoE
from unif2ace.model.token_moe import FeedForward, TokenMoE
from unif2ace.ops import RoutingPlan

Features = dict[str, Tensor]


class Tokenwise(NamedTuple):
    """What a layer computes of each row by itself, before rows see each other.

    `x` [T, H]: the residual stream, in a parallel block with the feed-forward added. `query`, `key`, `value`
    [T, heads, head_dim]. `plan`: token-level routing.
    """

    x: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    plan: RoutingPlan | None = None


class Memory(NamedTuple):
    """What a layer's sequence-level MoE mixes beside x, as `SequenceMoE.forward` takes it."""

    resampled: Features
    noise_starts: Tensor | None = None


class Block(nn.Module):
    """One transformer layer: `tokenwise`, then `mix`."""

    def __init__(self, config: UniF2aceConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.attention = Attention(config)
        self.ffn_norm = None if config.parallel_block else nn.LayerNorm(hidden, eps=eps)
        if config.token_moe is None:
            self.ffn = FeedForward(hidden, config.ffn_width)
        else:
            self.ffn = TokenMoE(config.token_moe, hidden)
        self.sequence_moe = None if config.sequence_moe is None else SequenceMoE(config)

    def _feed_forward(self, h: Tensor, layout: Layout) -> tuple[Tensor, RoutingPlan | None]:
        return self.ffn(h, layout) if isinstance(self.ffn, TokenMoE) else (self.ffn(h), None)

    def tokenwise(self, x: Tensor, layout: Layout, rotary: tuple[Tensor, Tensor]) -> Tokenwise:
        """The part that acts on each row of x [T, H] by itself."""
        h, plan = self.norm(x), None
        if self.ffn_norm is None:
            update, plan = self._feed_forward(h, layout)
            x = x + update
        return Tokenwise(x, *self.attention.project(h, rotary), plan)

    def mix(
        self, own: Tokenwise, layout: Layout, cache: KVCache | None, layer: int, memory: Memory
    ) -> tuple[Tensor, RoutingPlan | None, RoutingPlan | None]:
        """The rest, from where rows see each other on: attention and whole images."""
        plan = own.plan
        x = own.x + self.attention.attend(own.query, own.key, own.value, layout, cache, layer)
        if self.ffn_norm is not None:
            update, plan = self._feed_forward(self.ffn_norm(x), layout)
            x = x + update
        if self.sequence_moe is None or not layout.image_length:
            return x, plan, None
        x, sequence_plan = self.sequence_moe(x, layout, *memory)
        return x, plan, sequence_plan
