"""grouped_gemm and expert_mlp: against their definition row by row, and every back end against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shapes import EXPERTS_SMALL, ExpertShape
from tests.oracle import assert_matches_reference, available_backends, backend_cases, noncontiguous, registered
from unif2ace.errors import UserError
from unif2ace.ops import RoutingPlan, _registry, expert_mlp, grouped_gemm, route
from unif2ace.ops.experts import ACTIVATIONS, activate
from unif2ace.ops.routing import grouping_plan

BACKENDS = available_backends("experts")
Tensors = dict[str, torch.Tensor]

# Under Triton's interpreter a forward and backward of these sizes takes half a second, and the oracle wants 16 of them.
SLOW_TRITON = [pytest.mark.slow] if torch.get_default_device().type == "cpu" else []


def marked(name: str, *rest: object) -> object:
    """The parameters of a test that the oracle repeats."""
    return pytest.param(name, *rest, marks=SLOW_TRITON if name == "triton" else [])


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_backend_repeated = pytest.mark.parametrize("backend", [marked(name) for name in BACKENDS])
each_shape = pytest.mark.parametrize("shape", EXPERTS_SMALL.values(), ids=EXPERTS_SMALL.keys())
CASES = backend_cases("experts")
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
each_case_repeated = pytest.mark.parametrize(("backend", "dtype"), [marked(*case) for case in CASES], ids=str)


def plan_of(experts: torch.Tensor, weights: torch.Tensor, num_experts: int) -> RoutingPlan:
    """A plan for given choices; expert ids >= num_experts are sentinels."""
    offsets, order, position, load = grouping_plan(experts, num_experts)
    unused = weights.new_empty(0)
    return RoutingPlan(weights, experts.int(), offsets, order, position, load, unused, unused)


def problem(shape: ExpertShape, biases: bool = True) -> tuple[Tensors, torch.Tensor]:
    """Differentiable tensors by name, and the experts of each token."""
    plan = route(torch.randn(shape.tokens, shape.experts), shape.top_k, backend="reference")
    tensors = {
        "x": torch.randn(shape.tokens, shape.hidden),
        "weights": plan.weights,
        "w_up": torch.randn(shape.experts, shape.up_rows, shape.hidden) * shape.hidden**-0.5,
        "w_down": torch.randn(shape.experts, shape.hidden, shape.inner) * shape.inner**-0.5,
    }
    if biases:
        tensors["b_up"] = torch.randn(shape.experts, shape.up_rows)
        tensors["b_down"] = torch.randn(shape.experts, shape.hidden)
    return tensors, plan.experts


def run_mlp(
    tensors: Tensors, experts: torch.Tensor, activation: str, backend: str, few: bool | None = None
) -> torch.Tensor:
    tensors = dict(tensors)
    plan = plan_of(experts, tensors.pop("weights"), tensors["w_up"].shape[0])
    return expert_mlp(tensors.pop("x"), plan, **tensors, activation=activation, few=few, backend=backend)


def mlp_row_by_row(tensors: Tensors, experts: torch.Tensor, activation: str) -> torch.Tensor:
    """The formula of the docstring, one token and one choice at a time."""
    x, weights, w_up, w_down = (tensors[name] for name in ("x", "weights", "w_up", "w_down"))
    b_up, b_down = (tensors.get(name) for name in ("b_up", "b_down"))
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for k, e in enumerate(experts[t].tolist()):
            if e >= len(w_up):
                continue
            pre = w_up[e] @ x[t] + (0 if b_up is None else b_up[e])
            down = w_down[e] @ activate(pre, activation) + (0 if b_down is None else b_down[e])
            row = row + weights[t, k] * down
        rows.append(row)
    return torch.stack(rows) if rows else x


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@each_shape
def test_mlp_against_the_definition(shape: ExpertShape, biases: bool):
    tensors, experts = problem(shape, biases)
    tensors = {name: x.double().requires_grad_(True) for name, x in tensors.items()}
    found = run_mlp(tensors, experts, shape.activation, "reference")
    expected = mlp_row_by_row(tensors, experts, shape.activation)
    torch.testing.assert_close(found, expected)
    if shape.tokens:
        direction = torch.randn_like(found)
        grads = torch.autograd.grad(found, list(tensors.values()), direction)
        wanted = torch.autograd.grad(expected, list(tensors.values()), direction)
        for name, grad, want in zip(tensors, grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, msg=f"gradient of {name}")


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@each_shape
@each_case_repeated
def test_mlp_and_gradients(backend: str, shape: ExpertShape, biases: bool, dtype: torch.dtype):
    tensors, experts = problem(shape, biases)

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (run_mlp(tensors, experts, shape.activation, backend),)

    assert_matches_reference(run, tensors, dtype, backend, keep=("weights",))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_backend_repeated
def test_every_activation(backend: str, activation: str):
    tensors, experts = problem(ExpertShape(11, 16, 24, 3, 2, activation))

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (run_mlp(tensors, experts, activation, backend),)

    assert_matches_reference(run, tensors, torch.float32, backend, keep=("weights",))


def test_activations_are_the_published_formulas():
    x = torch.linspace(-3, 3, 12, dtype=torch.float64)
    gate, up = x[:6], x[6:]
    sigmoid, normal = gate.sigmoid(), torch.special.ndtr(gate)
    torch.testing.assert_close(activate(x, "swiglu"), gate * sigmoid * up)
    torch.testing.assert_close(activate(x, "geglu"), gate * normal * up)
    torch.testing.assert_close(activate(x, "gelu"), x * torch.special.ndtr(x))
    torch.testing.assert_close(activate(x, "silu"), x * x.sigmoid())
    torch.testing.assert_close(activate(x, "relu2"), x.clamp(min=0) ** 2)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    torch.testing.assert_close(activate(x, "gelu_tanh"), 0.5 * x * (1 + tanh))


@each_backend
def test_sentinels_contribute_nothing(backend: str):
    shape = ExpertShape(6, 8, 12, 3, 2)
    tensors, _ = problem(shape)
    experts = torch.tensor([[0, 3], [9, 1], [4, 4], [1, 0], [2, 9], [0, 1]])

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (run_mlp(tensors, experts, "gelu_tanh", backend),)

    assert_matches_reference(run, tensors, torch.float32, backend, keep=("weights",))
    y = run_mlp(tensors, experts, "gelu_tanh", backend)
    assert y[2].tolist() == [0.0] * 8
    torch.testing.assert_close(y, mlp_row_by_row(tensors, experts, "gelu_tanh"))


@each_backend
def test_nothing_but_sentinels_gives_exact_zero_gradients(backend: str):
    tensors, _ = problem(ExpertShape(3, 8, 4, 2, 1))
    tensors = {name: x.requires_grad_(True) for name, x in tensors.items()}
    with registered():
        run_mlp(tensors, torch.full((3, 1), 2), "gelu", backend).sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in tensors.values())


@each_backend
def test_experts_without_tokens_get_exact_zero_gradients(backend: str):
    tensors, _ = problem(ExpertShape(7, 8, 4, 5, 2))
    tensors = {name: x.requires_grad_(True) for name, x in tensors.items()}
    with registered():
        run_mlp(tensors, torch.tensor([[1, 3]] * 7), "gelu", backend).square().sum().backward()
    for name in ("w_up", "w_down", "b_up", "b_down"):
        assert not tensors[name].grad[[0, 2, 4]].any()
        assert tensors[name].grad[[1, 3]].any()


@each_backend_repeated
def test_plan_of_route_carries_gradients_to_the_router(backend: str):
    tensors, _ = problem(ExpertShape(9, 8, 12, 4, 2))
    tensors.pop("weights")

    def run(backend: str, x: torch.Tensor, logits: torch.Tensor, **weights: torch.Tensor) -> tuple[torch.Tensor]:
        return (expert_mlp(x, route(logits, 2, backend="reference"), **weights, backend=backend),)

    assert_matches_reference(run, {**tensors, "logits": torch.randn(9, 4)}, torch.float32, backend, keep=("logits",))


@each_backend
def test_noncontiguous_inputs(backend: str):
    shape = EXPERTS_SMALL["gated"]
    tensors, experts = problem(shape)
    strided = {name: noncontiguous(x) for name, x in tensors.items()}
    found, expected = (run_mlp(t, experts, shape.activation, backend) for t in (strided, tensors))
    torch.testing.assert_close(found, expected)


@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 6),
    hidden=st.integers(1, 17),
    inner=st.integers(1, 17),
    data=st.data(),
)
def test_mlp_of_any_size(tokens: int, experts: int, hidden: int, inner: int, data: st.DataObject):
    top_k = data.draw(st.integers(1, experts), label="top_k")
    tensors, chosen = problem(ExpertShape(tokens, hidden, inner, experts, top_k))
    expected = mlp_row_by_row(tensors, chosen, "gelu_tanh")
    for backend in BACKENDS:
        torch.testing.assert_close(run_mlp(tensors, chosen, "gelu_tanh", backend), expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- grouped_gemm

SIZES = {"some-empty": [3, 0, 5, 1], "one-full": [0, 11, 0], "nothing": [0, 0], "prime": [13, 2, 7]}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def gemm_problem(sizes: list[int], rest: int = 0) -> tuple[Tensors, torch.Tensor]:
    tensors = {
        "a": torch.randn(sum(sizes) + rest, 7),
        "b": torch.randn(len(sizes), 5, 7),
        "bias": torch.randn(len(sizes), 5),
    }
    return tensors, torch.tensor([0, *sizes]).cumsum(0).int()


@pytest.mark.parametrize("rest", [0, 4])
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gather"])
@each_size
@each_case_repeated
def test_grouped_gemm_and_gradients(backend: str, sizes: list[int], gathered: bool, rest: int, dtype: torch.dtype):
    tensors, offsets = gemm_problem(sizes, rest)
    rows = len(tensors["a"])
    gather = torch.randint(max(rows // 2, 1), (rows,)) if gathered else None

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (grouped_gemm(**tensors, offsets=offsets, gather=gather, backend=backend),)

    assert_matches_reference(run, tensors, dtype, backend)
    a = tensors["a"] if gather is None else tensors["a"][gather]
    found = grouped_gemm(**tensors, offsets=offsets, gather=gather, backend=backend)
    for e, (low, high) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        torch.testing.assert_close(found[low:high], a[low:high] @ tensors["b"][e].T + tensors["bias"][e])
    assert not found[int(offsets[-1]) :].any()


@each_backend
def test_grouped_gemm_writes_into_out(backend: str):
    tensors, offsets = gemm_problem([2, 3])
    out = torch.full((5, 5), torch.nan)
    assert grouped_gemm(**tensors, offsets=offsets, out=out, backend=backend) is out
    torch.testing.assert_close(out, grouped_gemm(**tensors, offsets=offsets, backend=backend))
    with pytest.raises(UserError, match="grouped_gemm: out= works only without gradients"):
        grouped_gemm(tensors["a"].requires_grad_(True), tensors["b"], offsets, out=out)


# ------------------------------------------------------------------------------------------ autograd, dispatcher, graph


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("registry", [False, True], ids=["plain", "registered"])
def test_gradcheck(activation: str, registry: bool):
    tensors, experts = problem(ExpertShape(4, 3, 2, 3, 2, activation))
    tensors = {name: x.double().requires_grad_(True) for name, x in tensors.items()}

    def run(*values: torch.Tensor) -> torch.Tensor:
        return run_mlp(dict(zip(tensors, values, strict=True)), experts, activation, "reference")

    if registry:
        with registered():
            assert torch.autograd.gradcheck(run, tuple(tensors.values()))
    else:
        assert torch.autograd.gradcheck(run, tuple(tensors.values()))
        assert torch.autograd.gradgradcheck(run, tuple(tensors.values()))


def test_gradcheck_grouped_gemm():
    tensors, offsets = gemm_problem([2, 0, 1], rest=1)
    tensors = {name: x.double().requires_grad_(True) for name, x in tensors.items()}
    gather = torch.tensor([1, 0, 1, 2])
    run = lambda a, b, bias: grouped_gemm(a, b, offsets, bias=bias, gather=gather)  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@each_backend
def test_opcheck_mlp(backend: str, biases: bool):
    tensors, experts = problem(ExpertShape(5, 8, 12, 3, 2), biases)
    x, weights, w_up, w_down = (tensors[name] for name in ("x", "weights", "w_up", "w_down"))
    offsets, order, position, _ = grouping_plan(experts, 3)
    rest = (weights, offsets, order, position, w_up, w_down, tensors.get("b_up"), tensors.get("b_down"), "silu")
    op = _registry.registered(backend, "expert_mlp")
    for save, few in ((False, None), (True, True), (False, False)):
        torch.library.opcheck(op, (x, *rest, save, few))
    y, pre = op(x, *rest, True, None)
    torch.library.opcheck(_registry.registered(backend, "expert_mlp_backward"), (torch.randn_like(y), x, pre, *rest))


@each_backend
def test_opcheck_grouped_gemm(backend: str):
    tensors, offsets = gemm_problem([2, 0, 1], rest=1)
    for bias, gather in ((tensors["bias"], None), (None, torch.tensor([1, 0, 1, 2, 0], dtype=torch.int32))):
        arguments = (tensors["a"], tensors["b"], offsets, bias, gather)
        op = _registry.registered(backend, "grouped_gemm")
        torch.library.opcheck(op, arguments)
        grad = torch.randn_like(op(*arguments))
        torch.library.opcheck(_registry.registered(backend, "grouped_gemm_backward"), (grad, *arguments))


@each_backend
def test_compiles_into_one_graph(backend: str):
    tensors, _ = problem(ExpertShape(6, 8, 12, 3, 2))
    tensors["logits"] = torch.randn(6, 3)
    tensors.pop("weights")
    tensors = {name: x.requires_grad_(True) for name, x in tensors.items()}

    def loss(x: torch.Tensor, logits: torch.Tensor, **weights: torch.Tensor) -> torch.Tensor:
        return expert_mlp(x, route(logits, 2), **weights, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**tensors), list(tensors.values()))
    expected = torch.autograd.grad(loss(**tensors), list(tensors.values()))
    for name, grad, want in zip(tensors, found, expected, strict=True):
        torch.testing.assert_close(grad, want, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**tensors), loss(**tensors))


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(5)}, r"x must be \[T, H\] floating point, got \[5\] float32"),
        ({"x": torch.zeros(4, 8)}, r"the plan must be for 4 tokens, got weights \[5, 2\] float32"),
        ({"w_up": torch.zeros(3, 12, 9)}, r"w_up must be \[3, 12, 8\] float32, got \[3, 12, 9\] float32"),
        ({"w_up": torch.zeros(3, 12, 8).half()}, r"w_up must be \[3, 12, 8\] float32, got \[3, 12, 8\] float16"),
        ({"w_down": torch.zeros(8, 12)}, r"w_down must be \[E, H, I\] with E >= 1, got \[8, 12\]"),
        ({"b_up": torch.zeros(3, 8)}, r"b_up must be \[3, 12\] float32"),
        ({"b_down": torch.zeros(3, 12)}, r"b_down must be \[3, 8\] float32"),
        ({"activation": "tanh"}, "activation must be one of gelu_tanh, gelu, .*, got 'tanh'"),
        ({"activation": "swiglu"}, r"w_up must be \[3, 24, 8\] float32"),
        ({"w_up": torch.zeros(4, 12, 8), "w_down": torch.zeros(4, 8, 12)}, r"b_up must be \[4, 12\]"),
    ],
)
def test_bad_mlp_arguments_are_refused(changes: dict[str, object], message: str):
    tensors, experts = problem(ExpertShape(5, 8, 12, 3, 2))
    plan = plan_of(experts, tensors.pop("weights"), 3)
    with pytest.raises(UserError, match=f"expert_mlp: {message}"):
        expert_mlp(**{**tensors, "plan": plan, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(5)}, r"a must be \[M, K\] floating point"),
        ({"b": torch.zeros(2, 5, 6)}, r"b must be \[E, N, 7\] with E >= 1, got \[2, 5, 6\] float32"),
        ({"b": torch.zeros(2, 5, 7).double()}, r"b must be \[2, 5, 7\] float32, got \[2, 5, 7\] float64"),
        ({"offsets": torch.zeros(2, dtype=torch.int32)}, r"offsets must be \[3\] integer, got \[2\] int32"),
        ({"bias": torch.zeros(5)}, r"bias must be \[2, 5\] float32"),
        ({"gather": torch.zeros(5)}, r"gather must be \[5\] integer, got \[5\] float32"),
        ({"out": torch.zeros(5, 7)}, r"out must be \[5, 5\] float32"),
    ],
)
def test_bad_gemm_arguments_are_refused(changes: dict[str, object], message: str):
    tensors, offsets = gemm_problem([2, 3])
    with pytest.raises(UserError, match=f"grouped_gemm: {message}"):
        grouped_gemm(**{**tensors, "offsets": offsets, **changes})
