"""The same bits for an image whatever it is read or drawn with, on CPUs and without gradients.

`nn.Conv2d` chooses between libraries by the number of images and threads, `F.gelu` computes the last numbers of each
thread's share by another formula than the rest, and a channels-last `nn.GroupNorm` divides the sums of a large map
among threads. The forms here do none of it. That oneDNN's convolutions add up an image's products in one order, for any
number of images and threads, is what tests/codec/test_invariant.py holds them to.

Training needs no equal bits and runs PyTorch's own forms; so do GPUs, and convolutions in dtypes other than float32 or
by a torch without oneDNN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Images in a pass: more at once leave the caches. Reading 32 pictures with avatars-tiny, one thread: 36 ms by four, 31
# by eight, 34 all at once.
IMAGES_TOGETHER = 8
DIVIDED_PIXELS = 1024  # from here on PyTorch divides the sums of a channels-last GroupNorm among threads


def in_parts(network: Callable[[Tensor], Tensor], x: Tensor, size: int = IMAGES_TOGETHER) -> Tensor:
    """network(x), x [B, C, H, W] with B > 0; on CPUs channels last, and at most `size` images at a time."""
    if x.device.type != "cpu":
        return network(x)
    # Through one dimension: a single image may have any stride over images, and some are taken for channels first.
    x = x.permute(0, 2, 3, 1).reshape(-1).view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    return network(x) if len(x) <= size else torch.cat([network(part) for part in x.split(size)])


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, same parameters; oneDNN's also for a single image, where PyTorch would take a loop of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H', W']."""
        if not _on_cpu(x) or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )


def gelu(x: Tensor) -> Tensor:
    """gelu(x) = x Phi(x), all of it by one formula, for a tenth more time of a whole decoder."""
    if not _on_cpu(x):
        return F.gelu(x)
    return torch.erf(x * math.sqrt(0.5)).add_(1.0).mul_(x).mul_(0.5)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, same parameters; large maps are normalised channels first: an image's sums stay on one thread."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if not _on_cpu(x) or x.shape[2] * x.shape[3] < DIVIDED_PIXELS:
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled()
