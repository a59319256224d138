"""Variable-length attention calls: what a library is asked for, that the answers add up, and which library is chosen.

No library runs without a GPU, so a stand-in computes what their contract says, in plain PyTorch; the calls made around
it are the real ones. On a GPU the real libraries take its place.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.attention import (
    any_partition,
    each_layout,
    generation,
    num_rows,
    problem,
    understanding,
    with_one_mask,
)
from unif2ace.ops import _registry, _varlen, omni_attention
from unif2ace.ops.omni_attention import AttentionBlocks, _native_forward, _with_past, reference_omni_attention


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> Tensor:
    """The contract of flash-attn's function of this kind, from the reference; sequences without queries see nothing."""
    for cu, longest, rows in ((cu_seqlens_q, max_seqlen_q, len(q)), (cu_seqlens_k, max_seqlen_k, len(k))):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        lengths = cu.diff()
        assert (int(cu[0]), int(cu[-1])) == (0, rows), "rows in no sequence would stay unwritten"
        assert int(lengths.min()) >= 0
        assert int(lengths.max()) == longest
    assert deterministic
    ranges = [pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k)]
    blocks = tuple((*q_range, *k_range, causal) for q_range, k_range in zip(*ranges, strict=True))
    assert all(k_end > k_start for q_start, q_end, k_start, k_end, _ in blocks if q_end > q_start)
    return reference_omni_attention(q, k, v, blocks, softmax_scale)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """Let the stand-in be the library for all tensors; the list receives the arguments of its calls."""
    calls: list[dict] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        calls.append({"q": q, "k": k, "v": v, **options})
        return varlen(q, k, v, **options)

    library = types.ModuleType("flash_attn")
    library.flash_attn_varlen_func = recording
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    attend = _varlen._flash_attn_2()
    monkeypatch.setattr(_varlen, "choose", lambda q: attend)
    yield calls
    _varlen._calls_once.cache_clear()


@each_layout
def test_values_and_gradients(asked: list[dict], blocks: AttentionBlocks):
    rows = num_rows(blocks)
    inputs = {name: x.requires_grad_(True) for name, x in problem(rows, rows + 5).items()}
    cotangent = torch.randn(rows, 3, 8)
    found = omni_attention(**inputs, blocks=blocks, backend="native")
    wanted = with_one_mask(**inputs, blocks=blocks, scale=8**-0.5)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(y, list(inputs.values()), cotangent, retain_graph=True) for y in (found, wanted)]
    torch.testing.assert_close(*grads)
    again = torch.autograd.grad(found, list(inputs.values()), cotangent)
    torch.testing.assert_close(again, grads[0], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(_native_forward(*inputs.values(), blocks, 8**-0.5), wanted)
    assert asked


def test_text_to_face_is_one_causal_and_one_full_call(asked: list[dict]):
    inputs = problem(26, 26)
    _native_forward(*inputs.values(), generation([3, 5], 9), 1.0)
    causal, full = asked
    assert (causal["causal"], full["causal"]) == (True, False)
    assert causal["cu_seqlens_q"].tolist() == [0, 3, 3, 8, 8]  # the images have no queries in this call
    assert causal["cu_seqlens_k"].tolist() == [0, 3, 12, 17, 26]
    assert full["cu_seqlens_q"].tolist() == [0, 9, 18]
    assert full["cu_seqlens_k"].tolist() == [0, 12, 26]
    assert len(causal["q"]) + len(full["q"]) == 26, "no pads"
    for call in asked:
        assert call["k"].data_ptr() == inputs["k"].data_ptr(), "keys are not copied"
        assert call["v"].data_ptr() == inputs["v"].data_ptr()
        assert not any("mask" in name or "bias" in name for name in call)


def test_understanding_is_two_calls(asked: list[dict]):
    _native_forward(*problem(32, 32).values(), understanding(6, [4, 1, 9]), 1.0)
    causal, full = asked
    assert (causal["causal"], full["causal"]) == (True, False)
    assert causal["cu_seqlens_q"].tolist() == [0, 4, 5, 14]
    assert causal["cu_seqlens_k"].tolist() == [0, 10, 17, 32]
    assert full["cu_seqlens_q"].tolist() == [0, 6, 6, 12, 12, 18, 18]  # the texts have no queries in this call
    assert full["cu_seqlens_k"].tolist() == [0, 6, 10, 16, 17, 23, 32]


def test_a_decoding_step_is_one_full_call(asked: list[dict]):
    blocks = ((0, 1, 0, 8, True), (1, 2, 10, 15, True))
    inputs = problem(2, 20)
    found = _native_forward(*inputs.values(), blocks, 1.0)
    assert [(call["causal"], call["max_seqlen_q"]) for call in asked] == [(False, 1)]
    torch.testing.assert_close(found, with_one_mask(**inputs, blocks=blocks, scale=1.0))


def test_a_denoising_step_is_one_full_call(asked: list[dict]):
    """Image rows of three faces behind cached texts of 4, 2 and 5 rows, 20 rows of cache for each."""
    q, k, v = problem(27, 27).values()
    past = torch.randn(2, 60, 3, 8)
    blocks = tuple((9 * b, 9 * b + 9, 9 * b, 9 * b + 9, False, 20 * b, 20 * b + n) for b, n in enumerate((4, 2, 5)))
    flat = [int(number) for block in blocks for number in block]
    found = _with_past(_native_forward)(q, k, v, *past, flat, 1.0)
    (call,) = asked
    assert call["q"].data_ptr() == q.data_ptr()
    assert call["cu_seqlens_q"].tolist() == [0, 9, 18, 27]
    assert call["cu_seqlens_k"].tolist() == [0, 13, 24, 38]
    wanted = omni_attention(q, k, v, blocks, past=tuple(past), scale=1.0, backend="reference")
    torch.testing.assert_close(found, wanted)


def test_no_compiled_module_is_needed():
    """The calls of libraries cover every registered op: else a GPU, for which nothing is compiled, would be refused."""
    assert _registry.why_not("omni_attention", "native", "cuda") is None


def test_shared_keys_take_a_call_each(asked: list[dict]):
    _native_forward(*problem(8, 9).values(), ((0, 4, 2, 9, False), (4, 8, 2, 9, False)), 1.0)
    assert len(asked) == 2


def test_layers_share_what_is_derived_from_the_blocks(asked: list[dict]):
    for _ in range(2):
        _native_forward(*problem(26, 26).values(), generation([3, 5], 9), 1.0)
    assert asked[0]["cu_seqlens_q"] is asked[2]["cu_seqlens_q"]


def test_rows_off_the_alignment_are_copied(asked: list[dict]):
    blocks = generation([3], 4)
    tensors = [torch.randn(7, 3 * 8 + 1)[:, 1:].view(7, 3, 8) for _ in range(3)]
    torch.testing.assert_close(
        _native_forward(*tensors, blocks, 1.0), with_one_mask(*tensors, blocks=blocks, scale=1.0)
    )
    assert all(call[name].stride() == (24, 8, 1) for call in asked for name in "qkv")


@given(st.data())
def test_any_partition_of_the_rows(data: st.DataObject):
    blocks = any_partition(data, keys=15)
    attend = lambda q, k, v, call, scale: _varlen._flash_attn(varlen, q, k, v, call, scale)  # noqa: E731
    calls = _varlen.VarlenCalls(data.draw(st.permutations(blocks)), 15, attend, torch.get_default_device())
    q, k, v = problem(num_rows(blocks), 15, heads=2, dim=8).values()
    inputs = zip(calls.queries(q), calls.keys(k), calls.keys(v), strict=True)
    found = calls.join_queries(q, [calls.attend(i, *triple, 0.5) for i, triple in enumerate(inputs)])
    torch.testing.assert_close(found, with_one_mask(q, k, v, tuple(blocks), 0.5))


# ------------------------------------------------------------------------------------------------ choosing a library


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """No flash-attn, and nothing remembered. The result installs a module with the function of one."""
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    _varlen._loaded.cache_clear()

    def install(name: str) -> None:
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = lambda *_, **__: name
        monkeypatch.setitem(sys.modules, name, module)
        if name == "flash_attn.cute":
            monkeypatch.setitem(sys.modules, "flash_attn", sys.modules["flash_attn"] or types.ModuleType("flash_attn"))
        _varlen._loaded.cache_clear()

    yield install
    _varlen._loaded.cache_clear()


def chosen(capability: int, dim: int = 64) -> str | None:
    """Name of the library whose function `best` gives."""
    attend = _varlen.best(capability, dim)
    return next((x.name for x in _varlen.LIBRARIES if attend is not None and _varlen._loaded(x)[0] is attend), None)


def test_the_flash_kernel_in_pytorch_serves_without_flash_attn(nothing_loaded: Callable[[str], None]):
    assert chosen(90) == "PyTorch"
    assert chosen(80) == "PyTorch"
    assert chosen(75) is None
    assert chosen(90, dim=20) is None


def test_flash_attn_2_is_taken_where_it_is_installed(nothing_loaded: Callable[[str], None]):
    nothing_loaded("flash_attn")
    assert chosen(90) == chosen(80) == "flash-attn 2"
    assert chosen(75) is None


def test_flash_attn_4_is_taken_on_hopper(nothing_loaded: Callable[[str], None]):
    nothing_loaded("flash_attn.cute")
    assert chosen(90) == "flash-attn 4"
    assert chosen(90, dim=256) == "PyTorch"
    assert chosen(80) == "PyTorch", "no backward there; and the wheel alone is no flash-attn 2"
    nothing_loaded("flash_attn")
    assert chosen(90) == "flash-attn 4"
    assert chosen(80) == "flash-attn 2"


def test_reasons(nothing_loaded: Callable[[str], None]):
    four, two, pytorch = _varlen.LIBRARIES
    assert _varlen.why_not(four, 90).startswith("not installed: pip install flash-attn-4 (")
    assert _varlen.why_not(two, 80).startswith("not installed: pip install flash-attn (")
    assert _varlen.why_not(two, 75) == "needs compute capability 8.0, this is 7.5"
    assert _varlen.why_not(pytorch, 90, 300) == "takes head sizes in multiples of 8 up to 256, not 300"


def test_only_16_bit_gpu_tensors_take_a_library():
    assert _varlen.choose(torch.zeros(4, 2, 8, dtype=torch.bfloat16, device="cpu")) is None
    assert _varlen.choose(torch.zeros(4, 2, 8)) is None
    assert _varlen.choose(torch.zeros(4, 2, 8, device="meta")) is None


def test_pytorch_is_asked_by_window_and_in_one_part(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), num_splits=None):
        asked.append((max_q, max_k, scale, window_size, num_splits))
        return q

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    calls = _varlen.VarlenCalls(generation([3], 4), 7, _varlen._pytorch(), torch.get_default_device())
    q = torch.zeros(7, 1, 8)
    for i in range(2):
        calls.attend(i, q, q, q, 0.5)
    assert asked == [(3, 4, 0.5, (-1, 0), 1), (4, 7, 0.5, (-1, -1), 1)]

    def without_scale(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        return q

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", without_scale)
    with pytest.raises(ImportError, match=r"torch 2\.11"):
        _varlen._pytorch()


def test_backward_is_told_to_be_deterministic(asked: list[dict]):
    """The stand-in's backward sees the setting; afterwards it is what it was, and memory is not filled meanwhile."""
    seen = []

    def watch(grad: Tensor) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        seen.append(not torch.utils.deterministic.fill_uninitialized_memory)

    x = torch.zeros(3, requires_grad=True)
    y = 2 * x
    y.register_hook(watch)
    attend = _varlen.choose(x)
    calls = _varlen.VarlenCalls((), 0, attend, x.device)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    calls.gradients([y], [x], [torch.ones(3)])
    assert seen == [True, True]
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("library", _varlen.LIBRARIES, ids=lambda library: library.name)
@each_layout
def test_libraries_on_a_gpu(library: _varlen.Library, blocks: AttentionBlocks, monkeypatch: pytest.MonkeyPatch):
    major, minor = torch.cuda.get_device_capability()
    reason = _varlen.why_not(library, 10 * major + minor)
    if reason is not None:
        pytest.skip(reason)
    attend = library.load()
    monkeypatch.setattr(_varlen, "choose", lambda q: attend)
    rows = num_rows(blocks)
    inputs = [x.to("cuda", torch.bfloat16) for x in problem(rows, rows + 5, 3, 64).values()]
    inputs = [x.requires_grad_(True) for x in inputs]
    cotangent = torch.randn(rows, 3, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for backend in ("native", "native", "reference"):
        y = omni_attention(*inputs, blocks, backend=backend)
        results.append((y, *torch.autograd.grad(y, inputs, cotangent)))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True)), "two equal calls differ"
    for found, wanted in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03)
