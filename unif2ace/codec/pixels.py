"""Between stored pixels and the range models work in, what models take, and the one number that compares two images.

Stored images are uint8 [..., H, W, 3] (0..255, channels last: how files and tables hold them). Models take and give
floating point [B, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import torch

from unif2ace.errors import UserError


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1].

    The result keeps the channels-last memory order of the input, which is also the order convolutions are fastest in.
    Raises `UserError` for another dtype or shape. Cost: one pass, 5 bytes of traffic per value.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floating point [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]; values outside the range are clamped.

    `to_uint8(to_float(x)) == x` exactly. Raises `UserError` for another shape or an integer dtype.
    """
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images must be floating point [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def check_images(owner: str, images: torch.Tensor, size: int | None = None) -> None:
    """Raise `UserError` unless images are floating point [B, 3, S, S], with S = size where a size is given."""
    square = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
    fits = square and images.is_floating_point()
    if not fits or (size is not None and images.shape[2] != size):
        side = size or "S"
        raise UserError(
            f"{owner}: images must be floating point [B, 3, {side}, {side}], got {images.dtype} {list(images.shape)}"
        )


def psnr(images: torch.Tensor, targets: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images against targets, both [B, 3, H, W] in [-1, 1].

    10 log10(peak^2 / MSE) with peak = 2 (the width of the range) and the mean squared error over the *whole* set, so
    that one perfect image cannot lift the mean to infinity.
    """
    error = (images.clamp(-1, 1).float() - targets.float()).square().mean()
    return float(10.0 * torch.log10(4.0 / error))
