"""Arguments of `mix_sequences`, and its definition row by row, for the tests of it."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from benchmarks.shapes import MixShape
from unif2ace.ops import mix_sequences

Tensors = dict[str, torch.Tensor]


def problem(shape: MixShape, full: bool = True, spare: int = 0) -> tuple[Tensors, torch.Tensor]:
    """Tensors by name (features as s0, s1, ..) and the row offsets; `spare` rows belong to no sequence."""
    rows, batch = shape.rows + spare, len(shape.lengths)
    tensors = {
        "x": torch.randn(rows, shape.hidden),
        "scale": torch.randn(batch),
        "coefficients": torch.randn(batch, shape.features),
    }
    tensors.update({f"s{j}": torch.randn(rows, shape.hidden) for j in range(shape.features)})
    if full:
        tensors["residual"] = torch.randn(rows, shape.hidden)
        tensors["layer_scale"] = torch.tensor(0.7)
    return tensors, torch.tensor([0, *accumulate(shape.lengths)], dtype=torch.int32)


def run_mix(
    tensors: Tensors, row_offsets: torch.Tensor, backend: str | None, feature_starts: torch.Tensor | None = None
) -> torch.Tensor:
    tensors = dict(tensors)
    features = [tensors.pop(f"s{j}") for j in range(tensors["coefficients"].shape[1])]
    options = {"feature_starts": feature_starts, "backend": backend}
    return mix_sequences(**tensors, features=features, row_offsets=row_offsets, **options)


def mix_row_by_row(tensors: Tensors, row_offsets: torch.Tensor) -> torch.Tensor:
    x = tensors["x"]
    result = torch.zeros_like(x)
    for b, (low, high) in enumerate(pairwise(row_offsets.tolist())):
        for r in range(low, high):
            result[r] = tensors["scale"][b] * x[r]
            for j in range(tensors["coefficients"].shape[1]):
                result[r] += tensors["coefficients"][b, j] * tensors[f"s{j}"][r]
    return tensors.get("residual", 0) + tensors.get("layer_scale", 1) * result
