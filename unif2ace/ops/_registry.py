"""Back ends: who can run which op, why not, and who runs this call.

Three back ends may implement an op: `reference` (plain PyTorch, any device), `native` (the compiled module: C++ on CPU
tensors, CUDA on CUDA tensors) and `triton` (GPU; CPU tensors only under Triton's interpreter). Each has one dispatcher
namespace, `unif2ace_reference`, `unif2ace_native` and `unif2ace_triton`, and every registered op has the *same* schema
in all three, written once, in Python, by `define`. So one `opcheck`, one fake (meta) implementation and one
`autograd.Function` serve every back end, and a missing back end is just an op without a kernel.

How a back end supplies kernels:

* reference: the Python function given to `define`;
* native: C++ registers `STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m)` when `unif2ace.native.load()` loads it.
  Ops whose native form is a few library calls (attention) register Python with `implement("native", ...)`;
* triton: `unif2ace.kernels.<op>` holds one function per registered op, of the same name and arguments; it is imported
  the first time somebody asks.

Whether a back end has an op is read from the dispatcher itself, so there is no second list to keep in step.

How a call travels: the public function checks its arguments, asks `choose(op, backend, device, *dtypes)`, and then runs
the plain reference directly (eager mode, `reference`: cheap autograd, double backward) or an `autograd.Function` over
`registered(backend, name)`. While `torch.compile` traces, the reference too goes through its registered op.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import NamedTuple

import torch

from unif2ace.errors import UserError
from unif2ace.ops._checks import dtype_name

BACKENDS = ("reference", "native", "triton")

# Order in which `auto` tries the back ends, per device type; anything else runs the reference. On CPUs it is measured:
# in benchmarks/results/cpu-*.json native is the faster one for every op (16-bit `linear`: as fast). On GPUs not yet.
AUTO_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}

# Ops whose reference is a library call that a GPU has nothing faster for: there it is no fallback.
LIBRARY_OPS = {"linear"}

# Ops that are left to libraries on a GPU, and have no Triton kernel.
WITHOUT_TRITON = {"linear", "omni_attention"}

# What the fast back ends read; float64 is for the reference, which serves as the oracle.
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_libraries = {name: torch.library.Library(f"unif2ace_{name}", "FRAGMENT") for name in BACKENDS}
_ops: dict[str, list[str]] = {}  # op (file stem) -> names of its registered ops
_overloads: dict[tuple[str, str], torch._ops.OpOverload] = {}
_default = "auto"
_warned: set[tuple[str, str]] = set()


class Status(NamedTuple):
    """One row of `unif2ace doctor`: can `backend` run `op` on this device, and if not, why."""

    op: str
    backend: str
    available: bool
    reason: str | None


# ------------------------------------------------------------------------------------------------------- registering


def define(op: str, name: str, schema: str, fake: Callable, reference: Callable) -> None:
    """Register the op `name`, part of the op file `op`, under one schema in all three namespaces.

    Args:
        op: stem of the file that owns it, e.g. `"routing"`.
        name: the registered name, e.g. `"route"` or `"route_backward"`.
        schema: arguments and results without the name, e.g. `"(Tensor x, int k) -> (Tensor, Tensor)"`.
        fake: same arguments; returns empty tensors of the right shape and dtype (for `torch.compile`).
        reference: same arguments; plain PyTorch. Results must not alias arguments or each other.
    """
    _ops.setdefault(op, []).append(name)
    for backend, library in _libraries.items():
        library.define(name + schema)
        torch.library.register_fake(f"unif2ace_{backend}::{name}", fake, lib=library)
        _overloads[backend, name] = getattr(getattr(torch.ops, f"unif2ace_{backend}"), name).default
    implement("reference", name, reference)


def implement(backend: str, name: str, function: Callable) -> None:
    """Give `backend` a Python implementation of the registered op `name`, for every device."""
    _libraries[backend].impl(name, function, "CompositeExplicitAutograd")


def registered(backend: str, name: str) -> torch._ops.OpOverload:
    """The registered op `name` of one back end, ready to call."""
    return _overloads[backend, name]


def as_user_error(error: RuntimeError, name: str) -> Exception:
    """What to raise for an error out of a kernel: `UserError` if it is a refusal by the op `name`, else the error.

    C++ can only throw a RuntimeError; one whose message starts with "<name>: " is a sentence meant for the user.
    """
    sentence = str(error).splitlines()[0] if str(error) else ""
    return UserError(sentence) if sentence.startswith(f"{name}: ") else error


def needs_grad(*arguments: object) -> bool:
    """Will somebody want gradients of a call with these arguments? If not, its `autograd.Function` can be skipped."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)


def vjp(function: Callable, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Gradients of `function(*inputs)` with respect to `inputs`, by running it again under autograd.

    For the reference backward ops: they are specification, not speed. `function` returns a tensor or a tuple of
    tensors, `grads` one gradient (or None) for each. Inputs that play no part get zeros.

    A registered op may be entered with the dispatcher's autograd keys switched off (under `torch.compile` it always
    is), where nothing would be recorded; so they are switched on again for the inner run.
    """
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradOther, keys.AutogradFunctionality):
        excluded = excluded.remove(key)
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        leaves = [x.detach().requires_grad_(True) for x in inputs]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in inputs]
        found = torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


# ---------------------------------------------------------------------------------------------------------- choosing


class use_backend:
    """Set the back end of every op that is not told otherwise: `auto`, `reference`, `native` or `triton`.

    `use_backend(name)` changes the default of the process at once; used as `with use_backend(name):` it restores the
    old default at the end of the block. Like `torch.set_default_dtype` it is one setting for all threads. Whole models
    run on `triton` too: the two ops it leaves to libraries (`WITHOUT_TRITON`) are then chosen as by `auto`.

    Raises:
        UserError: unknown name. Whether a back end can run a call is decided (and refused) when the op is called.
    """

    def __init__(self, name: str) -> None:
        global _default
        _check_name(name, "use_backend")
        self.previous, _default = _default, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _default
        _default = self.previous


def default_backend() -> str:
    """The name set by `use_backend`; `auto` when nobody set one."""
    return _default


def choose(op: str, backend: str | None, device: torch.device, *dtypes: torch.dtype) -> str:
    """Name of the back end that runs this call of `op`.

    `backend=None` takes the default of `use_backend`. A back end asked for by name runs the call or is refused with the
    reason. `auto` takes the first of `AUTO_ORDER` that can; where that is the reference on a CUDA device it warns once
    per reason, and with `UNIF2ACE_STRICT=1` raises instead.

    Raises:
        UserError: unknown name, a named back end that cannot run the call, or a forbidden fallback.
    """
    if backend is None:
        backend = "auto" if _default == "triton" and op in WITHOUT_TRITON else _default
    return _resolve(op, backend, device.type, dtypes)


@torch.compiler.assume_constant_result  # traced code sees a string: no environment, imports or warnings in the graph
def _resolve(op: str, asked: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    _check_name(asked, op)
    if asked != "auto":
        reason = why_not(op, asked, device, dtypes)
        if reason is not None:
            raise UserError(f"{op}: back end {asked!r} cannot run this call: {reason}")
        return asked
    reasons = []
    for name in AUTO_ORDER.get(device, ("reference",)):
        reason = why_not(op, name, device, dtypes)
        if reason is None:
            break
        reasons.append(f"{name}: {reason}")
    if name == "reference" and device == "cuda" and op not in LIBRARY_OPS:
        _report_fallback(op, "; ".join(reasons))
    return name


def why_not(
    op: str, backend: str, device: str | torch.device = "cpu", dtypes: Sequence[torch.dtype] = ()
) -> str | None:
    """Why `backend` cannot run `op` on tensors of this device and these dtypes, or None when it can."""
    device = device.type if isinstance(device, torch.device) else device
    missing = _missing(op, backend, device)
    if missing is not None or backend == "reference":
        return missing
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in FAST_DTYPES:
            return f"it takes float32, bfloat16 or float16, not {dtype_name(dtype)}; backend='reference' takes any"
        if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 matrix products wrongly; use float32 or float16"
    return None


def status(device: str | torch.device | None = None) -> list[Status]:
    """Every op on every back end for `device` (default: CUDA where there is one, else CPU)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in _ops:
        for backend in BACKENDS:
            reason = why_not(op, backend, device)
            rows.append(Status(op, backend, reason is None, reason))
    return rows


# -------------------------------------------------------------------------------------------------------- the reasons


@cache
def _missing(op: str, backend: str, device: str) -> str | None:
    """Why `backend` has no kernel of `op` for this device type, or None. Loads the back end when needed."""
    if op not in _ops:
        raise UserError(f"unknown op {op!r}; known ops: {', '.join(_ops)}")
    if backend == "reference":
        return None
    if backend == "native":
        from unif2ace import native

        module = native.load()  # first: where Python too has a native form (attention), the module's takes its place
        if _has_kernels(op, backend, device):
            return None
        return native.why_not() if module is None else f"the compiled module has no {op} kernel for {device} tensors"
    return _missing_triton(op, device)


def _missing_triton(op: str, device: str) -> str | None:
    if op in WITHOUT_TRITON:
        return "left to libraries, there is no Triton kernel"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CPU tensors only under its interpreter: set TRITON_INTERPRET=1 before starting Python"
    if device not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA tensors, not on {device} tensors"
    if not _is_installed("triton"):
        return "Triton is not installed: pip install triton"
    module_name = _kernel_module(op)
    if module_name is None:
        return f"there is no Triton kernel for {op}"
    module = importlib.import_module(module_name)
    if not _has_kernels(op, "triton", device):
        for name in _ops[op]:
            implement("triton", name, _on_its_device(getattr(module, name)))
    return None


def _on_its_device(launcher: Callable) -> Callable:
    """Triton launches on the *current* device, wherever the tensors are: make that of the first one current."""

    @wraps(launcher)
    def launch(first: torch.Tensor, *rest: object) -> object:
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(first, *rest)
        with torch.cuda.device(device):
            return launcher(first, *rest)

    return launch


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _kernel_module(op: str) -> str | None:
    """Import name of the Triton kernels of `op`, or None when there are none."""
    name = f"unif2ace.kernels.{op}"
    return name if _is_installed("unif2ace.kernels") and _is_installed(name) else None


def _has_kernels(op: str, backend: str, device: str) -> bool:
    """Ask the dispatcher whether every registered op of `op` has a kernel of this back end for this device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device, device.upper())
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return all(has(f"unif2ace_{backend}::{name}", key) for name in _ops[op])


def _report_fallback(op: str, reasons: str) -> None:
    message = f"{op}: running the slow reference on a GPU ({reasons})"
    if os.environ.get("UNIF2ACE_STRICT") == "1":
        raise UserError(f"{message}; UNIF2ACE_STRICT=1 forbids that")
    if (op, reasons) not in _warned:
        _warned.add((op, reasons))
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _check_name(name: str, who: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"{who}: unknown back end {name!r}; expected one of auto, {', '.join(BACKENDS)}")
