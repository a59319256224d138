"""The compiled module: it may be absent, it may not decide anything by chance, and the package ships right.

What `route` computes is tested against the oracle in tests/ops/test_routing.py; here are the properties of the native
build: same bits for any number of threads and any instruction set, sums exact across chunk borders, memory safety.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
import torch

from tests.bits import ROOT, assert_same_for_threads, assert_same_on_instruction_sets, needs_native, run_python
from unif2ace import native
from unif2ace.errors import UserError
from unif2ace.ops import route

# Hides modules from one Python process, as if they were not installed.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def grouped_problem(tokens: int = 1000) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    return {
        "logits": torch.randn(tokens, 37, generator=generator),
        "top_k": 3,
        "token_group": torch.randint(0, 3, (tokens,), generator=generator),
        "group_bounds": (0, 5, 12, 37),
    }


def test_load_and_reason_agree():
    module, reason = native.load(), native.why_not()
    assert (module is None) == (reason is not None)
    assert (native.build_info() is None) == (module is None)


@needs_native
def test_build_info_names_the_build():
    info = native.build_info()
    assert info["torch_target"] == "0x020a000000000000"
    assert "-ffp-contract=off" in info["flags"]
    assert "-march=native" not in info["flags"]
    assert info["cpu"]["isa"] in ("baseline", "avx2", "avx512")
    assert info["cpu"]["threads"] == torch.get_num_threads()


def test_without_the_compiled_module():
    """No spurious failure: the op falls back to the reference, and asking for native by name says what to do."""
    done = run_python(
        BLOCK.format(names=["unif2ace._C"])
        + """
import torch
from unif2ace import native, ops
from unif2ace.errors import UserError
assert native.load() is None and native.build_info() is None
assert native.why_not()
print(ops.route(torch.randn(5, 4), 2).load.sum().item())
try:
    ops.route(torch.randn(5, 4), 2, backend="native")
except UserError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10\n")
    assert "native" in done.stdout
    assert done.stderr == ""


def test_import_without_triton_touches_nothing():
    done = run_python(
        BLOCK.format(names=["triton"])
        + """
import unif2ace, unif2ace.ops, torch
assert "triton" not in sys.modules
assert "unif2ace._C" not in sys.modules
assert not torch.cuda.is_initialized()
print(unif2ace.__version__)
"""
    )
    assert done.returncode == 0, done.stderr


def test_kernels_have_one_import_name():
    """`kernels/` is reached as unif2ace.kernels, and never as a top-level package of that name."""
    link = ROOT / "unif2ace" / "kernels"
    assert link.is_dir()
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    import unif2ace.kernels

    assert str(link) in list(unif2ace.kernels.__path__)


@needs_native
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_same_bits_for_any_number_of_threads(scoring):
    problem = grouped_problem()

    def run() -> list[torch.Tensor]:
        logits = problem["logits"].clone().requires_grad_(True)
        plan = route(**{**problem, "logits": logits}, scoring=scoring, backend="native")
        generator = torch.Generator().manual_seed(2)
        outputs = [plan.weights, plan.importance, plan.logsumexp]
        torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator) for y in outputs])
        return [*plan, logits.grad]

    assert_same_for_threads(run)


# Whole numbers and exact fractions: torch's own random normals differ between instruction sets.
ISA_PROGRAM = """
for scoring in ("softmax", "sigmoid"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        g = torch.Generator().manual_seed(3)
        x = (torch.randint(-4096, 4097, (321, 21), generator=g) / 512).to(dtype).requires_grad_(True)
        group = torch.randint(0, 2, (321,), generator=g)
        bias = torch.randint(-64, 65, (21,), generator=g) / 64
        for bias in (None, bias):
            plan = ops.route(x, 3, token_group=group, group_bounds=(0, 8, 21), scoring=scoring, selection_bias=bias,
                             renormalize=bias is None, backend="native")
            outputs = [plan.weights, plan.importance, plan.logsumexp]
            grads = [torch.randint(-64, 65, y.shape, generator=g) / 64 for y in outputs]
            (grad,) = torch.autograd.grad(outputs, [x], grads)
            for y in (*plan, grad.float()):
                digest.update(y.detach().numpy().tobytes())
"""


@needs_native
def test_same_bits_on_every_instruction_set():
    assert_same_on_instruction_sets(ISA_PROGRAM)


@needs_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_logits_are_named(bad):
    logits = torch.randn(300, 8, dtype=torch.bfloat16)
    logits[270, 5] = bad
    with pytest.raises(UserError, match=r"^route: logits must be finite, got -?(nan|inf) at token 270, expert 5$"):
        route(logits, 2, backend="native")


@needs_native
def test_unchecked_nan_stays_within_bounds():
    logits = torch.full((100, 8), torch.nan)
    plan = route(logits, 3, check_finite=False, backend="native")
    assert plan.experts.min() >= 0
    assert plan.experts.max() < 8
    assert plan.load.sum() == 300
    assert plan.weights.isnan().all()


@needs_native
@pytest.mark.parametrize("group", [-1, 3])
def test_group_out_of_range_is_refused_even_unchecked(group):
    """A token of no group would leave its outputs unwritten: there is no unchecked way around this one."""
    problem = grouped_problem(50)
    problem["token_group"][20] = group
    with pytest.raises(UserError, match=r"^route: token_group must be 0 ?\.\. ?2"):
        route(**problem, check_finite=False, backend="native")


@needs_native
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 255, 256, 257, 1024, 1031])
def test_plan_is_a_stable_sort_at_tile_and_chunk_borders(tokens):
    plan = route(**grouped_problem(tokens), backend="native")
    slots = plan.experts.reshape(-1)
    order = torch.sort(slots, stable=True).indices
    assert torch.equal(plan.order.long(), order)
    assert torch.equal(plan.position[order].long(), torch.arange(slots.numel()))
    assert torch.equal(plan.load.long(), torch.bincount(slots, minlength=37))
    assert torch.equal(plan.offsets[1:], plan.load.cumsum(0, dtype=torch.int32))


@needs_native
def test_rows_do_not_depend_on_the_batch_around_them():
    problem = grouped_problem()
    whole = route(**problem, backend="native")
    rows = torch.tensor([3, 500, 999, 17])
    some = route(
        **{**problem, "logits": problem["logits"][rows], "token_group": problem["token_group"][rows]}, backend="native"
    )
    for field in ("weights", "experts", "logsumexp"):
        assert torch.equal(getattr(whole, field)[rows], getattr(some, field))


@needs_native
def test_strided_logits_and_expanded_gradients():
    base = torch.randn(40, 64).t()[::2]  # [32, 40], no stride is 1
    assert not base.is_contiguous()
    want = route(base.contiguous(), 2, backend="native")
    got = route(base, 2, backend="native")
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    grads = []
    for backend in ("reference", "native"):
        logits = base.detach().clone().requires_grad_(True)
        route(logits, 2, backend=backend).logsumexp.sum().backward()  # its gradient is one expanded number
        grads.append(logits.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.slow
def test_wheel_contents(tmp_path):
    """A wheel carries the kernels under unif2ace/, the compiled module, no top-level `kernels`, no tests."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("unif2ace-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "unif2ace/ops/routing.py" in names
    assert any(name.startswith("unif2ace/_C.") for name in names) == (native.load() is not None)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"unif2ace"}
    assert {f"unif2ace/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= set(names)
