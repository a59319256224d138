"""The same bits for an image whatever it is read or drawn with: what the convolution networks share for it on CPUs.

A network always runs on the same number of images there (`in_groups`), so that the libraries choose the same kernels,
and takes nothing from PyTorch whose rounding follows how an array is shared out among threads (`gelu`, `group_norm`).
Training needs no equal bits and takes the whole batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES_TOGETHER = 4
DIVIDED_PIXELS = 1024  # from here on PyTorch divides the sums of a channels-last GroupNorm among threads


def in_groups(network: Callable[[Tensor], Tensor], x: Tensor, size: int = IMAGES_TOGETHER) -> Tensor:
    """network(x), x [B, ...] with B > 0; on CPUs `size` images at a time, the last few filled up with zeros."""
    if x.device.type != "cpu":
        return network(x)
    padded = F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % size))
    return torch.cat([network(part) for part in padded.split(size)])[: len(x)]


def gelu(x: Tensor) -> Tensor:
    """gelu(x) = x Phi(x). On CPUs `F.gelu` computes the last numbers of a thread's share by another formula than the
    rest; here all are computed alike, for a tenth more time of a whole decoder.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.gelu(x)
    return torch.erf(x * math.sqrt(0.5)).add_(1.0).mul_(x).mul_(0.5)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x). On CPUs large maps are normalised channels first, where PyTorch leaves an image's sums to one thread."""
    if x.device.type != "cpu" or x.shape[2] * x.shape[3] < DIVIDED_PIXELS:
        return norm(x)
    return norm(x.contiguous()).contiguous(memory_format=torch.channels_last)
