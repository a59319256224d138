"""What a launcher may ask about the device of its tensors: the chip's generation, multiprocessors and L2 cache.

Tensors of three kinds reach a launcher, and only the first has a device to ask:

* CUDA tensors;
* CPU tensors, under Triton's interpreter (`INTERPRETED`), where the answer decides nothing but speed;
* meta tensors, when `unif2ace.resources` compiles the kernels ahead of time for a chip that need not be here:
  `compiling_for` says for which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # the environment variable TRITON_INTERPRET, as triton.jit read it

# By compute capability, for compiling ahead of time: A100 and H100 / H200 (SXM).
MULTIPROCESSORS = {80: 108, 90: 132}
L2_BYTES = {80: 40 << 20, 90: 50 << 20}

_target = 80


def capability(device: torch.device) -> int:
    """Compute capability as one number: 80 for A100, 90 for H100 and H200."""
    return _of_cuda(device.index)[0] if device.type == "cuda" else _target


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a persistent grid has to fill. Under the interpreter 2: programs run one by one."""
    if device.type == "cuda":
        return _of_cuda(device.index)[1]
    return 2 if device.type == "cpu" else MULTIPROCESSORS[_target]


def l2_bytes(device: torch.device) -> int:
    """Size of the second-level cache. Under the interpreter 2 MiB."""
    if device.type == "cuda":
        return _of_cuda(device.index)[2]
    return 2 << 20 if device.type == "cpu" else L2_BYTES[_target]


@contextlib.contextmanager
def compiling_for(target: int) -> Iterator[None]:
    """Let meta tensors stand for tensors on a device of compute capability `target`, a key of `MULTIPROCESSORS`."""
    global _target
    before, _target = _target, target
    try:
        yield
    finally:
        _target = before


@cache
def _of_cuda(index: int | None) -> tuple[int, int, int]:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return capability, properties.multi_processor_count, properties.L2_cache_size
