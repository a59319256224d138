"""Attention of packed sequences on GPUs: variable-length calls of a flash-attention library, two for all blocks.

A variable-length kernel takes sequences that lie one behind the other, rows cu_q[i] .. cu_q[i+1] of q attending to rows
cu_k[i] .. cu_k[i+1] of k and v, all of them causal (aligned bottom-right) or none. The blocks of `omni_attention`
become such calls without a mask and without pads:

* one call for the causal blocks, one for the full ones (more only if blocks of one kind share keys);
* a call with all query rows in order takes q as it is: every denoising and decoding step. Otherwise its rows are
  gathered, and the results scattered: 4 T H elements over memory beside the 8 H^2 FLOPs per row of the projections;
* keys are not copied (but where a past lies in another tensor, before they come here). Keys that no row of a call sees,
  the image behind a causal text or the unused end of a cache, are a sequence without queries: no forward program looks
  at them, and backward writes their zero gradients.

Everything is computed on the host from the blocks, once, and kept: no device value is read.

Which library: the newest of flash-attn that is installed and runs on this chip, else the flash kernel in PyTorch. All
have the same contract: float16 or bfloat16, head sizes in multiples of 8, one result whatever else is in the batch,
and a deterministic backward when it is asked for (PyTorch takes that from its global setting).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Block = tuple[int, int, int, int, bool]


# ----------------------------------------------------------------------------------------------------------- libraries


class Library(NamedTuple):
    """A flash-attention library: `load` gives its attend(q, k, v, call, scale) -> [rows of q, heads, dim].

    `load` raises ImportError where the library, of the Python package `package`, is missing or unfit.
    """

    name: str
    package: str
    load: Callable[[], Callable[[Tensor, Tensor, Tensor, Call, float], Tensor]]
    capability: int  # least compute capability with forward and backward
    max_dim: int


class Call(NamedTuple):
    """One variable-length call. `rows` are its query rows in the order of its sequences: a range or indices."""

    rows: slice | Tensor
    cu_q: Tensor  # [sequences + 1] int32
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


def _flash_attn_4() -> Callable:
    function = import_module("flash_attn.cute").flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> Tensor:
        result = _flash_attn(function, q, k, v, call, scale)
        return result[0] if isinstance(result, tuple) else result  # first releases give the logsumexp too

    return attend


def _flash_attn_2() -> Callable:
    function = getattr(import_module("flash_attn"), "flash_attn_varlen_func", None)
    if function is None:  # flash-attn-4 alone makes `flash_attn` a namespace with nothing in it
        raise ModuleNotFoundError("No module named 'flash_attn_2_cuda'", name="flash_attn_2_cuda")
    return lambda q, k, v, call, scale: _flash_attn(function, q, k, v, call, scale)


def _flash_attn(function: Callable, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> Tensor | tuple:
    return function(
        q,
        k,
        v,
        cu_seqlens_q=call.cu_q,
        cu_seqlens_k=call.cu_k,
        max_seqlen_q=call.max_q,
        max_seqlen_k=call.max_k,
        softmax_scale=scale,
        causal=call.causal,
        deterministic=True,
    )


def _pytorch() -> Callable:
    function = import_module("torch.nn.attention.varlen").varlen_attn
    takes = inspect.signature(function).parameters
    if "scale" not in takes or "window_size" not in takes:
        raise ImportError("torch.nn.attention.varlen takes no scale before torch 2.11")
    # Splitting the keys of a sequence depends on the batch around it: one part, where there is a choice.
    options = {"num_splits": 1} if "num_splits" in takes else {}

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> Tensor:
        window = (-1, 0 if call.causal else -1)
        return function(
            q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, scale=scale, window_size=window, **options
        )

    return attend


LIBRARIES = (
    Library("flash-attn 4", "flash-attn-4", _flash_attn_4, 90, 128),
    Library("flash-attn 2", "flash-attn", _flash_attn_2, 80, 256),
    Library("PyTorch", "torch", _pytorch, 80, 256),
)


@lru_cache
def _loaded(library: Library) -> tuple[Callable | None, str | None]:
    """Its attend function, or why there is none."""
    try:
        return library.load(), None
    except ModuleNotFoundError as error:
        return None, f"not installed: pip install {library.package} ({error})"
    except ImportError as error:
        return None, f"does not load: {error}"


def why_not(library: Library, capability: int, dim: int = 64) -> str | None:
    """Why this library cannot run heads of size `dim` on a chip of that compute capability, or None."""
    if capability < library.capability:
        return f"needs compute capability {library.capability / 10}, this is {capability / 10}"
    if dim % 8 or dim > library.max_dim:
        return f"takes head sizes in multiples of 8 up to {library.max_dim}, not {dim}"
    return _loaded(library)[1]


def choose(q: Tensor) -> Callable | None:
    """attend(q, k, v, call, scale) of the library that runs tensors like q, or None where none does."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or not q.numel():
        return None
    return _on_device(q.device.index, q.shape[-1])


@lru_cache
def _on_device(index: int, dim: int) -> Callable | None:
    major, minor = torch.cuda.get_device_capability(index)
    return best(10 * major + minor, dim)


def best(capability: int, dim: int) -> Callable | None:
    """attend of the first library that runs heads of size `dim` on a chip of that compute capability, or None."""
    usable = (library for library in LIBRARIES if why_not(library, capability, dim) is None)
    library = next(usable, None)
    return None if library is None else _loaded(library)[0]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's fused backwards add in a fixed order only under this global setting; the others are told per call."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = before[0] and fill  # else every result is filled first
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


# --------------------------------------------------------------------------------------------------------------- calls


class VarlenCalls:
    """The calls that compute `blocks` over `keys` rows of k and v; `join_*` puts their results together."""

    def __init__(self, blocks: Sequence[Block], keys: int, attend: Callable, device: torch.device) -> None:
        self._attend = attend
        self._calls = [_call(part, keys, causal, device) for causal, part in _partition(blocks)]

    def queries(self, x: Tensor) -> list[Tensor]:
        """The query rows of each call."""
        x = _aligned(x)
        return [x[call.rows] if isinstance(call.rows, slice) else x.index_select(0, call.rows) for call in self._calls]

    def keys(self, x: Tensor) -> list[Tensor]:
        """What each call takes for k or v: all of it, each time an alias of its own, to get a gradient of its own."""
        x = _aligned(x)
        return [x.view_as(x) for _ in self._calls]

    def attend(self, i: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Call i."""
        return self._attend(query, key, value, self._calls[i], scale)

    def gradients(self, results: list[Tensor], leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the leaves of recorded calls, whose results have the gradients `grads`."""
        with deterministic():
            return torch.autograd.grad(results, leaves, grads)

    def join_queries(self, like: Tensor, parts: list[Tensor]) -> Tensor:
        """Results, or gradients of the queries, of all calls as one tensor."""
        if len(parts) == 1 and len(parts[0]) == len(like) and isinstance(self._calls[0].rows, slice):
            return parts[0]
        out = like.new_empty(like.shape)
        for call, part in zip(self._calls, parts, strict=True):
            if isinstance(call.rows, slice):
                out[call.rows] = part
            else:
                out.index_copy_(0, call.rows, part)
        return out

    def join_keys(self, like: Tensor, parts: list[Tensor]) -> Tensor:
        """Sum of the gradients that the calls give k or v, in their order."""
        if not parts:
            return like.new_zeros(like.shape)
        return sum(parts[1:], start=parts[0])


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where its rows and heads do not lie at multiples of 16 bytes, which the libraries rely on."""
    if x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _partition(blocks: Sequence[Block]) -> list[tuple[bool, list[Block]]]:
    """(causal, blocks) of each call: blocks of one kind, their keys one behind the other."""
    calls: list[tuple[bool, list[Block]]] = []
    for block in sorted(blocks, key=lambda block: (not block[4], block[2], block[0])):
        q_start, q_end, k_start, _, causal = block
        if q_start == q_end:
            continue
        fitting = (part for kind, part in calls if kind == causal and part[-1][3] <= k_start)
        part = next(fitting, None)
        if part is None:
            calls.append((causal, [block]))
        else:
            part.append(block)
    return calls


def _call(blocks: list[Block], keys: int, causal: bool, device: torch.device) -> Call:
    cu_q, cu_k = [0], [0]
    for q_start, q_end, k_start, k_end, _ in [*blocks, (0, 0, keys, keys, False)]:
        if k_start > cu_k[-1]:
            cu_q.append(cu_q[-1])  # keys that nobody sees
            cu_k.append(k_start)
        if q_end > q_start:
            cu_q.append(cu_q[-1] + q_end - q_start)
            cu_k.append(k_end)
    ends = [block[1] for block in blocks]
    if [block[0] for block in blocks[1:]] == ends[:-1]:
        rows = slice(blocks[0][0], ends[-1])
    else:
        ranges = [torch.arange(block[0], block[1], device="cpu") for block in blocks]
        rows = torch.cat(ranges).to(device, non_blocking=True)
    longest = [max(b - a for a, b in pairwise(cu)) for cu in (cu_q, cu_k)]
    offsets = (torch.tensor(cu, dtype=torch.int32, device="cpu").to(device, non_blocking=True) for cu in (cu_q, cu_k))
    return Call(rows, *offsets, *longest, causal and longest[0] > 1)  # a last row alone sees every key


_calls_once = lru_cache(maxsize=512)(VarlenCalls)  # every layer passes the same blocks
_in_graphs: set[VarlenCalls] = set()  # a CUDA graph replays their addresses: they must not be forgotten


def varlen_calls(blocks: tuple[Block, ...], keys: int, attend: Callable, device: torch.device) -> VarlenCalls:
    """The calls for these blocks, from the cache where it has them."""
    calls = _calls_once(blocks, keys, attend, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _in_graphs.add(calls)
    return calls
