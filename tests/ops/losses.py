"""Heads, targets and mask ratios for the tests of `linear_loss` and `d3diff_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.shapes import LossShape
from unif2ace.ops import d3diff_loss
from unif2ace.ops.diffusion_loss import D3DiffLoss

IMAGE_TOKENS = 16


def head(shape: LossShape, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    width = shape.hidden**-0.5
    return {
        "hidden": torch.randn(shape.rows, shape.hidden, dtype=dtype),
        "weight": torch.randn(shape.columns, shape.hidden, dtype=dtype) * 2 * width,
        "bias": torch.randn(shape.columns, dtype=dtype),
    }


def code_columns(shape: LossShape) -> tuple[int, int]:
    """Codes and `mask` end the vocabulary."""
    return shape.columns - shape.code_columns, shape.columns - 1


def code_targets(shape: LossShape) -> Tensor:
    targets = torch.randint(*code_columns(shape), (shape.rows,))
    targets[1::3] = -100
    return targets


def mask_ratios(rows: int) -> Tensor:
    """Realised ratios, from one masked token to all of them."""
    return (1.0 + torch.arange(rows) % IMAGE_TOKENS) / IMAGE_TOKENS


def d3diff(targets: Tensor, code_columns: tuple[int, int], **arguments: object) -> D3DiffLoss:
    """`d3diff_loss` of images of `IMAGE_TOKENS` tokens with the ratios above."""
    ratio = mask_ratios(len(targets))
    return d3diff_loss(
        targets=targets, mask_ratio=ratio, num_image_tokens=IMAGE_TOKENS, code_columns=code_columns, **arguments
    )
