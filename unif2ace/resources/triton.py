"""Compile every Triton kernel that a call launches, for a chip that need not be here, instead of launching it."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from unif2ace.errors import UserError
from unif2ace.kernels import _device
from unif2ace.resources import cubin
from unif2ace.resources.calls import CALLS
from unif2ace.resources.kernel import Kernel


class _Chip:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are remembered per device: one number per chip keeps them apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def launches(op: str, capability: int) -> list[Kernel]:
    """Make the calls of `op` on meta tensors and give each launch configuration once.

    Triton's active driver is replaced for good: give this a process of its own.

    Raises:
        UserError: Triton's interpreter is on in this process, so nothing can be compiled.
    """
    if _device.INTERPRETED:
        raise UserError("kernel resources need Triton's compiler: start Python without TRITON_INTERPRET=1")
    functions = importlib.import_module(f"unif2ace.kernels.{op}")
    driver.set_active(_Chip(capability))
    found: dict[str, Kernel] = {}
    for call in CALLS[op]():
        with _compiling(capability) as compilations:
            getattr(functions, call.function)(*call.arguments)
        for function, arguments, compiled in compilations:
            if compiled.hash not in found:
                constants = {p.name: arguments[p.name] for p in function.params if p.is_constexpr}
                found[compiled.hash] = Kernel(
                    op,
                    function.__name__,
                    "triton",
                    capability,
                    _dtype(arguments),
                    call.label,
                    _plain(constants),
                    32 * compiled.metadata.num_warps,
                    _facts(compiled),
                )
    return list(found.values())


@contextlib.contextmanager
def _compiling(capability: int) -> Iterator[list[tuple[JITFunction, dict[str, Any], CompiledKernel]]]:
    """Within: a launch compiles for that chip and adds (kernel, its arguments by name, what came out) to the list."""
    compilations = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> CompiledKernel:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        defaults = {p.name: p.default for p in self.params if p.has_default}
        compilations.append((self, {**defaults, **dict(zip(self.arg_names, args, strict=False)), **options}, compiled))
        return compiled

    with mock.patch.object(JITFunction, "run", compile_only), _device.compiling_for(capability):
        yield compilations


def _facts(compiled: Any) -> cubin.Facts:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (facts,) = cubin.read(path).values()
    # Triton's shared memory is asked for at launch; what the code declares (1 KiB for the system) comes on top.
    return facts._replace(shared_bytes=facts.shared_bytes + compiled.metadata.shared)


def _dtype(arguments: dict[str, Any]) -> str:
    """Name of the first floating-point tensor's dtype, which is what a row is about."""
    tensors = (getattr(x, "base", x) for x in arguments.values())  # base: the tensor behind a tensor descriptor
    dtypes = (x.dtype for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point())
    return str(next(dtypes, "")).removeprefix("torch.")


def _plain(constants: dict[str, object]) -> dict[str, object]:
    """Constants as JSON takes them; None and False say nothing and are left out."""
    plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in constants.items()}
    return {name: value for name, value in plain.items() if value not in ("None", False)}
