"""Problems and peers of the benchmarks: what is right passes the gate, what is wrong does not, nothing is left out."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.bench_experts import make_plan, make_problem
from benchmarks.bench_sampling import GUIDANCE, make_logits, tokens_gate
from benchmarks.problems import DIRECTIONS, DTYPES, Problem
from benchmarks.shapes import ExpertShape, SamplingShape

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def doubled(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = 2 * x * w
    return y, y.argmax()


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


FUNCTIONS = {
    "reference": doubled,
    "right": lambda x, w: (x * w + w * x, (x * w).argmax()),
    "wrong value": lambda x, w: (1.01 * doubled(x, w)[0], doubled(x, w)[1]),
    "wrong index": lambda x, w: (doubled(x, w)[0], doubled(x, w)[1] + 1),
    "wrong gradient": lambda x, w: (WrongGradient.apply(doubled(x, w)[0]), doubled(x, w)[1]),
    "not a number": lambda x, w: (doubled(x, w)[0] * torch.nan, doubled(x, w)[1]),
}


def problem() -> Problem:
    return Problem({"x": torch.randn(99), "w": torch.randn(99)}, FUNCTIONS, {"ceiling: nothing": lambda: None})


@each_direction
def test_the_gate_passes_what_is_right(direction: str):
    check = problem().gate(direction)
    for name in ("reference", "right", "ceiling: nothing"):
        check(name)


@pytest.mark.parametrize("name", ["wrong value", "wrong index", "wrong gradient", "not a number"])
def test_the_gate_stops_what_is_wrong(name: str):
    with pytest.raises(AssertionError, match=name):
        problem().gate("forward+backward")(name)


def test_variants_run_and_ceilings_have_no_backward():
    assert set(problem().variants("forward")) == {*FUNCTIONS, "ceiling: nothing"}
    backward = problem().variants("forward+backward")
    assert set(backward) == set(FUNCTIONS)
    assert [g.shape for g in backward["right"]()] == [(99,), (99,)]


@each_dtype
@each_direction
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu2", "swiglu", "geglu"])
def test_peers_of_the_experts_compute_the_same(activation: str, direction: str, dtype: torch.dtype):
    shape = ExpertShape(64, 32, 48, 8, 3, activation)
    found = make_problem(shape, make_plan(shape, True, "cpu"), dtype, "cpu", ["reference"])
    assert set(found.functions) - {"reference"} == {
        peer.name for peer in peers.PEERS if peer.op == "experts" and not peer.why_not("cpu")
    }
    check = found.gate(direction)
    for name in found.functions:
        check(name)


def test_samplers_are_checked_by_their_distribution():
    shape = SamplingShape(8, 32, 64)
    inputs = make_logits(shape, "peaked", torch.float32, "cpu")
    samplers = peers.present("sampling", "cpu", GUIDANCE, 16)
    colder = {"too cold": lambda **logits: peers.inverse_cdf(0.0, 16)(2.0 * logits["logits"])}
    check = tokens_gate(Problem(inputs, {"reference": peers.inverse_cdf(GUIDANCE, 16), **samplers, **colder}), GUIDANCE)
    for name in samplers:
        check(name)
    with pytest.raises(AssertionError):
        check("too cold")


def test_every_peer_is_either_present_or_absent_with_a_reason(capsys: pytest.CaptureFixture):
    for peer in peers.PEERS:
        assert (peer.name in peers.absent(peer.op, "cpu")) == (peer.why_not("cpu") is not None)
    assert peers.Peer("experts", "nobody", dict, "no_such_module").why_not("cpu") == "no_such_module is not installed"
    assert peers.Peer("experts", "elsewhere", dict, devices=("cuda",)).why_not("cpu") == "runs on cuda only"
    peers.main()
    printed = capsys.readouterr().out
    assert all(peer.name in printed for peer in peers.PEERS)
