"""Choosing back ends: names, defaults, reasons, strict mode, and where kernels come from."""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
import warnings
from collections.abc import Iterator

import pytest
import torch

from unif2ace import native
from unif2ace.errors import UserError
from unif2ace.ops import _registry, default_backend, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
_numbers = itertools.count()


@pytest.fixture
def toy() -> Iterator[str]:
    """An op of its own for each test, `double(x) = 2 x`, with a reference only; the op's name is that of its file."""
    name = f"toy{next(_numbers)}"
    _registry.define(name, name, "(Tensor x) -> Tensor", torch.empty_like, lambda x: 2 * x)
    yield name
    del _registry._ops[name]
    _registry._missing.cache_clear()


def test_same_op_in_every_namespace(toy: str):
    assert torch.equal(_registry.registered("reference", toy)(torch.ones(3)), torch.full((3,), 2.0))
    for backend in _registry.BACKENDS:
        overload = _registry.registered(backend, toy)
        assert str(overload._schema) == f"unif2ace_{backend}::{toy}(Tensor x) -> Tensor"
        assert overload(torch.empty(3, device="meta")).shape == (3,)


def test_auto_takes_the_reference_where_nothing_else_is(toy: str):
    assert _registry.choose(toy, None, CPU, torch.float32) == "reference"
    assert _registry.choose(toy, "auto", torch.device("meta"), torch.float32) == "reference"


def test_auto_takes_a_kernel_as_soon_as_there_is_one(toy: str):
    _registry.implement("native", toy, lambda x: x + x)
    assert _registry.choose(toy, None, CPU, torch.float32) == "native"
    assert _registry.choose(toy, None, CPU, torch.float64) == "reference"  # float64 is for the reference only
    assert _registry.choose(toy, "reference", CPU, torch.float32) == "reference"


def test_use_backend_as_setting_and_as_block(toy: str):
    assert default_backend() == "auto"
    with use_backend("reference"):
        assert default_backend() == "reference"
        with use_backend("native"), pytest.raises(UserError, match="native"):
            _registry.choose(toy, None, CPU, torch.float32)
        assert default_backend() == "reference"
    assert default_backend() == "auto"
    use_backend("reference")
    assert default_backend() == "reference"


def test_unknown_names_are_refused(toy: str):
    with pytest.raises(UserError, match="use_backend: unknown back end 'cuda'; expected one of auto, reference"):
        use_backend("cuda")
    with pytest.raises(UserError, match=f"{toy}: unknown back end 'fast'"):
        _registry.choose(toy, "fast", CPU)
    with pytest.raises(UserError, match=r"unknown op 'nothing'; known ops: .*routing"):
        _registry.why_not("nothing", "reference")


def test_named_back_end_that_cannot_run_says_why(toy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "it is not built; run make")
    with pytest.raises(UserError, match=f"{toy}: back end 'native' cannot run this call: it is not built; run make"):
        _registry.choose(toy, "native", CPU, torch.float32)


def test_native_module_without_the_op(toy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "load", lambda: types.ModuleType("loaded"))
    assert _registry.why_not(toy, "native") == f"the compiled module has no {toy} kernel for cpu tensors"


def test_float64_is_refused_by_fast_back_ends(toy: str):
    _registry.implement("native", toy, lambda x: x + x)
    assert "float64" in _registry.why_not(toy, "native", CPU, (torch.float64,))
    assert _registry.why_not(toy, "native", CPU, (torch.bfloat16, torch.int32)) is None


def test_fallback_on_a_gpu_warns_once(toy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("UNIF2ACE_STRICT", raising=False)
    with pytest.warns(RuntimeWarning, match=f"{toy}: running the slow reference on a GPU .triton: .*; native: "):
        assert _registry.choose(toy, None, CUDA, torch.float32) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _registry.choose(toy, None, CUDA, torch.float32) == "reference"


def test_strict_mode_refuses_the_fallback(toy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNIF2ACE_STRICT", "1")
    with pytest.raises(UserError, match="UNIF2ACE_STRICT=1 forbids"):
        _registry.choose(toy, None, CUDA, torch.float32)
    assert _registry.choose(toy, "reference", CUDA, torch.float32) == "reference"  # asked for by name
    assert _registry.choose(toy, None, CPU, torch.float32) == "reference"  # on a CPU the reference is no surprise


def test_triton_needs_its_interpreter_on_a_cpu(toy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in _registry.why_not(toy, "triton", CPU)


def test_triton_kernels_are_imported_when_asked_for(toy: str, monkeypatch: pytest.MonkeyPatch):
    kernels = types.ModuleType(f"unif2ace.kernels.{toy}")
    setattr(kernels, toy, lambda x: x * 2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(_registry, "_is_installed", lambda name: True)
    monkeypatch.setattr(_registry, "_kernel_module", lambda op: kernels.__name__)
    assert _registry.choose(toy, "triton", CPU, torch.float32) == "triton"
    assert torch.equal(_registry.registered("triton", toy)(torch.ones(2)), torch.full((2,), 2.0))
    assert "bfloat16" in _registry.why_not(toy, "triton", CPU, (torch.bfloat16,))


def test_triton_launches_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch):
    """Triton itself would take the current device, and read memory of another one."""
    current = [0]

    @contextlib.contextmanager
    def switched_to(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", switched_to)
    launch = _registry._on_its_device(lambda x, y: (current[0], y))
    for index in (1, 0, 3):
        assert launch(types.SimpleNamespace(device=torch.device("cuda", index)), 5) == (index, 5)
    assert current == [0]


def test_status_has_one_row_for_each_op_and_back_end(toy: str):
    rows = [row for row in _registry.status("cpu") if row.op == toy]
    assert [row.backend for row in rows] == list(_registry.BACKENDS)
    assert rows[0] == (toy, "reference", True, None)
    assert all(row.available == (row.reason is None) for row in rows)
    assert {row.op for row in _registry.status()} >= {"routing", "experts", "sequence_mix", toy}


def test_choice_is_a_constant_in_compiled_code_and_follows_the_default(toy: str):
    _registry.implement("native", toy, lambda x: x - 1)  # tells the back ends apart

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: torch.Tensor) -> torch.Tensor:
        return _registry.registered(_registry.choose(toy, None, x.device, x.dtype), toy)(x)

    assert run(torch.ones(1)).item() == 0
    with use_backend("reference"):
        assert run(torch.ones(1)).item() == 2


def test_vjp_gives_zeros_to_inputs_that_play_no_part():
    x, y = torch.tensor([3.0]), torch.tensor([5.0])
    grads = _registry.vjp(lambda a, b: (a * a, a.detach()), [x, y], [torch.ones(1), None])
    assert [g.item() for g in grads] == [6.0, 0.0]
    assert [g.item() for g in _registry.vjp(lambda a, b: a.detach(), [x, y], [torch.ones(1)])] == [0.0, 0.0]


def test_refusals_of_kernels_become_user_errors():
    refusal = _registry.as_user_error(RuntimeError("route: logits must be finite\nraised somewhere"), "route")
    assert isinstance(refusal, UserError)
    assert str(refusal) == "route: logits must be finite"
    crash = RuntimeError("out of memory")
    assert _registry.as_user_error(crash, "route") is crash
