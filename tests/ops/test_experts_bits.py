"""expert_mlp and grouped_gemm where many rows meet one expert: uneven loads, activations, and which bits are promised.

Back ends may treat few rows per expert and many rows differently (the native one does, at 8 or 16 rows per expert on
average), so the sizes here lie on both sides.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import ExpertShape
from tests.bits import assert_same_for_threads, assert_same_on_instruction_sets, needs_native
from tests.ops.test_experts import CASES, each_case_repeated, marked, plan_of, problem, run_mlp
from tests.oracle import assert_matches_reference
from unif2ace.errors import UserError
from unif2ace.ops import expert_mlp, grouped_gemm
from unif2ace.ops._registry import FAST_DTYPES
from unif2ace.ops.experts import ACTIVATIONS

FAST = [case for case in CASES if case[0] != "reference"]
# The interpreter multiplies tiles with numpy, where the bits of a row depend on its place in the tile.
ROWWISE = [case for case in FAST if case[0] != "triton" or torch.get_default_device().type == "cuda"]


def everything(backend: str, shape: ExpertShape, experts: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and all gradients of one problem, drawn from seed 0."""
    torch.manual_seed(0)
    tensors, _ = problem(shape)
    tensors = {name: x.to(torch.float32 if name == "weights" else dtype) for name, x in tensors.items()}
    tensors = {name: x.requires_grad_(True) for name, x in tensors.items()}
    y = run_mlp(tensors, experts, shape.activation, backend)
    return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), torch.randn_like(y))]


def check(shape: ExpertShape, experts: torch.Tensor, dtype: torch.dtype, backend: str) -> None:
    tensors, _ = problem(shape)

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (run_mlp(tensors, experts, shape.activation, backend),)

    assert_matches_reference(run, tensors, dtype, backend, keep=("weights",))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_case_repeated
def test_every_activation_on_many_rows(backend: str, activation: str, dtype: torch.dtype):
    shape = ExpertShape(70, 24, 37, 2, 2, activation)
    _, experts = problem(shape)
    check(shape, experts, dtype, backend)


# 4 experts; the weights of expert 2 see several tiles of rows, or all of them, beside empty experts and sentinels.
UNEVEN = {
    "all-to-one": lambda: torch.full((700, 1), 2),
    "one-row-beside-many": lambda: torch.tensor([[0]] + [[2]] * 340),
    "sentinels": lambda: torch.randint(2, 5, (400, 2)),
    "only-just-many": lambda: torch.randint(4, (65, 1)),
    "only-just-few": lambda: torch.randint(4, (64, 1)),
}


@pytest.mark.parametrize("load", UNEVEN)
@pytest.mark.parametrize(("backend", "dtype"), [marked(*case) for case in CASES if case[1] != torch.float16], ids=str)
def test_uneven_loads(backend: str, load: str, dtype: torch.dtype):
    experts = UNEVEN[load]()
    check(ExpertShape(*experts.shape[:1], 16, 24, 4, experts.shape[1]), experts, dtype, backend)


@pytest.mark.parametrize("shape", [ExpertShape(13, 64, 48, 4, 2), ExpertShape(700, 64, 48, 4, 2, "swiglu")], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), [marked(*case) for case in FAST], ids=str)
def test_same_bits_for_any_number_of_threads(backend: str, shape: ExpertShape, dtype: torch.dtype):
    experts = torch.randint(shape.experts + 1, (shape.tokens, shape.top_k))
    assert_same_for_threads(lambda: everything(backend, shape, experts, dtype))


@pytest.mark.parametrize("sizes", [(32, 1, 7), (700, 40, 213)], ids=["few", "many"])
@pytest.mark.parametrize(("backend", "dtype"), ROWWISE, ids=str)
def test_a_token_does_not_depend_on_the_batch_around_it(backend: str, sizes: tuple[int, ...], dtype: torch.dtype):
    shape = ExpertShape(sizes[0], 64, 48, 2 if sizes[0] > 32 else 8, 2)
    tensors, experts = problem(shape)
    tensors = {name: x.to(torch.float32 if name == "weights" else dtype) for name, x in tensors.items()}
    whole = run_mlp(tensors, experts, "gelu_tanh", backend)
    for size in sizes[1:]:
        rows = slice(3, 3 + size)
        part = {**tensors, "x": tensors["x"][rows], "weights": tensors["weights"][rows]}
        assert torch.equal(run_mlp(part, experts[rows], "gelu_tanh", backend), whole[rows])


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize(("backend", "dtype"), ROWWISE, ids=str)
def test_who_says_few_or_many_has_the_same_bits_in_any_number(backend: str, few: bool, dtype: torch.dtype):
    """300 tokens are many for 4 experts, 1 is few; told so, the number decides nothing."""
    check_in_any_number(backend, ExpertShape(300, 64, 48, 4, 2), few, dtype)


@needs_native
@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_blocks_and_panels_decide_nothing(dtype: torch.dtype):
    """Several blocks of token rows and panels of weights per expert, and neither fills its vectors."""
    check_in_any_number("native", ExpertShape(60, 700, 500, 2, 2, "swiglu"), True, dtype)


def check_in_any_number(backend: str, shape: ExpertShape, few: bool, dtype: torch.dtype) -> None:
    """Parts of a batch have the bits they have in the whole."""
    tensors, experts = problem(shape)
    tensors = {name: x.to(torch.float32 if name == "weights" else dtype) for name, x in tensors.items()}
    whole, last = run_mlp(tensors, experts, shape.activation, backend, few), shape.tokens
    for rows in map(slice, (0, 7, 3, last // 3, last - 1, 40), (1, 8, 12, last // 2, last, last)):
        part = {**tensors, "x": tensors["x"][rows], "weights": tensors["weights"][rows]}
        assert torch.equal(run_mlp(part, experts[rows], shape.activation, backend, few), whole[rows])


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("tokens", [0, 3, 300])
@each_case_repeated
def test_few_or_many_by_order(backend: str, tokens: int, few: bool, dtype: torch.dtype):
    tensors, experts = problem(ExpertShape(tokens, 24, 20, 4, 2))

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (run_mlp(tensors, experts, "gelu_tanh", backend, few),)

    assert_matches_reference(run, tensors, dtype, backend, keep=("weights",))


@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gather"])
@each_case_repeated
def test_grouped_gemm_on_many_rows(backend: str, gathered: bool, dtype: torch.dtype):
    offsets = torch.tensor([0, 301, 301, 302, 390], dtype=torch.int32)
    gather = torch.randint(150, (400,)) if gathered else None
    tensors = {"a": torch.randn(400, 24), "b": torch.randn(4, 19, 24), "bias": torch.randn(4, 19)}

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (grouped_gemm(**tensors, offsets=offsets, gather=gather, backend=backend),)

    assert_matches_reference(run, tensors, dtype, backend)


FEW_ROWS_PROGRAM = """
from tests.ops.test_experts import plan_of
from unif2ace.ops import expert_mlp
torch.manual_seed(0)
draw = lambda *shape: torch.randint(-64, 65, shape) / 64  # torch draws normal numbers differently per instruction set
few = ("gelu", 24, 13), ("gelu_tanh", 40, 13), ("relu2", 33, 13), ("geglu", 21, 13), ("swiglu", 16, 13)
for activation, inner, tokens in (*few, ("silu", 37, 150)):
    rows = 2 * inner if "glu" in activation else inner
    tensors = [draw(tokens, 40), draw(8, rows, 40) / 4, draw(8, 40, inner) / 4, draw(8, rows), draw(8, 40)]
    plan = plan_of(torch.randint(8, (tokens, 2)), draw(tokens, 2), 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, *weights = (t.to(dtype) for t in tensors)
        y = expert_mlp(x, plan, *weights, activation=activation, few=True, backend="native")
        digest.update(y.float().numpy().tobytes())
"""


@needs_native
def test_few_rows_give_the_same_bits_on_any_instruction_set():
    assert_same_on_instruction_sets(FEW_ROWS_PROGRAM)


# --------------------------------------------------------------------------------------------------------- bad input


@needs_native
@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("offsets", [1, 2, 4], "offsets must start at 0, got 1"),
        ("offsets", [0, 3, 2], "offsets must not decrease, got 2 after 3"),
        ("offsets", [0, 3, 5], "offsets must end at no more than the 4 rows there are, got 5"),
        ("order", [0, 1, 2, 4], r"order and plan.position must be permutations of 0..3, .*, got order\[3\] = 4"),
        ("order", [0, 1, -1, 3], r"order and plan.position must be permutations of 0..3, .*, got order\[2\] = -1"),
        ("position", [0, 1, 2, 9], "order and plan.position must be permutations of 0..3"),
        ("position", [0, 1, 2, 2], "order and plan.position must be permutations of 0..3"),
    ],
)
def test_a_plan_that_points_outside_is_refused(field: str, values: list[int], message: str):
    tensors, _ = problem(ExpertShape(4, 8, 12, 2, 1))
    plan = plan_of(torch.tensor([[0], [0], [1], [1]]), tensors.pop("weights"), 2)
    plan = plan._replace(**{field: torch.tensor(values, dtype=torch.int32)})
    with pytest.raises(UserError, match=rf"^expert_mlp: plan\.{message}"):
        expert_mlp(plan=plan, **tensors, backend="native")


@needs_native
def test_grouped_gemm_refuses_rows_outside():
    a, b = torch.randn(5, 7), torch.randn(2, 3, 7)
    offsets = torch.tensor([0, 2, 3])
    with pytest.raises(UserError, match=r"^grouped_gemm: gather must be 0\.\.4, got 5 at row 1"):
        grouped_gemm(a, b, offsets, gather=torch.tensor([0, 5, 1]), backend="native")
    with pytest.raises(UserError, match=r"^grouped_gemm: offsets must end at no more than the 2 rows there are, got 3"):
        grouped_gemm(a, b, offsets, gather=torch.tensor([0, 1]), backend="native")
