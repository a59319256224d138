"""`nn.Linear` whose product is the op `linear`, so that it follows the chosen back end like every other op."""

from __future__ import annotations

from torch import Tensor, nn

from unif2ace.ops import linear


class Linear(nn.Linear):
    """Same parameters, initialisation and state dict as `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(x, self.weight, self.bias)
