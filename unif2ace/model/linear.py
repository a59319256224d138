"""`nn.Linear` whose product is the op `linear`, so that it follows the chosen back end like every other op."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from unif2ace.ops.linear import INVARIANT_ROWS, linear, linear_gelu


class Linear(nn.Linear):
    """Same parameters, initialisation and state dict as `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """[..., in_features] -> gelu_tanh of [..., out_features]."""
        return linear_gelu(x, self.weight, self.bias)


class ImageLinear(Linear):
    """A `Linear` over one or a few rows per image, whose results do not depend on how many images share the batch."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return invariant_linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """[..., in_features] -> gelu_tanh of [..., out_features]."""
        return invariant_linear(x, self.weight, self.bias, linear_gelu)


def invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, product: Callable[..., Tensor] = linear
) -> Tensor:
    """`linear` or `linear_gelu`, in 16 bits of at least `INVARIANT_ROWS` rows: zeros are added, and dropped again."""
    rows = x.reshape(-1, x.shape[-1])
    missing = max(0, INVARIANT_ROWS - len(rows)) if x.element_size() == 2 else 0
    if not missing:
        return product(x, weight, bias)
    padded = product(functional.pad(rows, (0, 0, 0, missing)), weight, bias)
    return padded[: len(rows)].view(*x.shape[:-1], weight.shape[0])
