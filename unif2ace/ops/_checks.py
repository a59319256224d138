"""Small helpers for refusing bad arguments in the same words everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from unif2ace.errors import UserError


def describe(x: Tensor) -> str:
    """`[3, 4] float32`: what came, for a message."""
    return f"{list(x.shape)} {dtype_name(x.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def expect(op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Refuse the argument `name` of `op` unless it has this shape and dtype; `dtype=None` asks for any integer type."""
    right_kind = is_integer(x) if dtype is None else x.dtype == dtype
    if tuple(x.shape) != shape or not right_kind:
        kind = "integer" if dtype is None else dtype_name(dtype)
        raise UserError(f"{op}: {name} must be {list(shape)} {kind}, got {describe(x)}")


def one_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Refuse arguments that are not where `x` is: a CUDA kernel would read them through a pointer into other memory."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise UserError(f"{op}: all tensors must be on {x.device}, but {name} is on {other.device}")


def as_int32(op: str, name: str, x: Tensor) -> Tensor:
    """`x` as int32; what int32 cannot hold would come out as another number, so on a CPU it is refused."""
    narrow = x.to(torch.int32)
    if x.dtype == torch.int64 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        lost = narrow != x
        if bool(lost.any()):
            raise UserError(f"{op}: {name} must fit into int32, got {int(x[lost][0])}")
    return narrow
