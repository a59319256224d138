"""Static shapes: no step waits for a number, no shape depends on one; on a GPU the whole loop is one graph."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.tiny import build_parts
from unif2ace.generation.denoise import run_step
from unif2ace.generation.plan import plan_step
from unif2ace.generation.prefix import Prefix, run_prefixes
from unif2ace.generation.schedule import Step, schedule_steps
from unif2ace.generation.slots import Drawing, Slots
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import _registry, use_backend

PROMPTS = [(5, 6, 7), (), (8,)]
STEPS = 5


def start(model, seeds=(3, 4)):
    """Slots with two images, one with guidance and one without, and the plans of all their steps."""
    size = model.config.num_image_tokens
    codes = torch.full((size,), model.vocabulary.mask_code)
    cond, uncond, other = run_prefixes(model, PROMPTS, [codes] * 3)
    slots = Slots(model, 2, 8)
    steps = tuple(schedule_steps(size, STEPS))
    drawings = [Drawing(1, steps, cond, uncond, guidance=2.0), Drawing(0, steps, other, temperature=0.5)]
    for drawing, seed in zip(drawings, seeds, strict=True):
        slots.start(drawing, seed, codes)
    return slots, [plan_step(slots, [replace(d, done=k) for d in drawings]) for k in range(STEPS)]


def run_steps(model, slots, plans):
    """The whole loop, all plans of which were made before."""
    for plan in plans:
        run_step(model, slots, plan)


@pytest.fixture
def traced(monkeypatch):
    """(model, slots, plans) on the meta device: shapes and no numbers. Ops are opaque, as compiled kernels are."""
    monkeypatch.setattr(_registry, "_resolve", lambda *a: "native")
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # knows no meta device
    use_backend("native")
    config = build_parts().model.config
    with torch.device("meta"):
        model = UniF2ace(config).eval()
    slots, plans = start(model)
    return model, slots, plans


def test_no_step_reads_a_number_back(traced):
    model, slots, plans = traced
    run_steps(model, slots, plans)
    assert slots.tokens.device.type == "meta"
    assert slots.tokens.shape == (2, model.config.image_rows)


@pytest.mark.parametrize(
    "reads", [lambda x: x > x.max().item(), lambda x: x > len(x[x > 0]), lambda x: x > x.tolist()[0]]
)
def test_the_trace_notices_who_does(traced, monkeypatch, reads):
    model, slots, plans = traced
    monkeypatch.setattr("unif2ace.generation.denoise.remask", lambda confidence, *a: reads(confidence))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        run_step(model, slots, plans[0])


def test_a_step_sends_nothing_to_the_device(traced, monkeypatch):
    """What plans and their layouts need is there after the first time. A graph would read freed host memory again."""
    model, slots, plans = traced
    run_steps(model, slots, plans)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("numbers of the host became a tensor"))
    run_steps(model, slots, plans)


def test_the_example_of_the_docstring():
    """Of plan.py: one image of four tokens in slot 1 of 2, with guidance, three of them unknown."""
    config = replace(build_parts().model.config, num_image_tokens=4, image_size=16)
    model = UniF2ace(config)
    text = torch.zeros(config.num_layers, 3, config.num_heads, config.head_dim)
    prefix = Prefix((text, text), torch.zeros(4, config.hidden_size), torch.zeros(6, 4, config.hidden_size))
    drawing = Drawing(1, (Step(4, 3, 1.0), Step(3, 1, 0.5)), prefix, prefix, guidance=2.0, done=1)
    plan = plan_step(Slots(model, 2, 8), [drawing])
    assert [(s.rows, s.cached, s.cache_row) for s in plan.layout.sequences] == [(6, 3, 1), (6, 3, 3)]
    assert plan.mask_ratio.tolist() == [3 / 4]
    expected = {
        "ratio_of_image": [0, 0],
        "changed": [9, 9],
        "wanted": [6, 7, 8, 6, 7, 8],
        "wanted_row": [0, 0, 0, 6, 6, 6],
        "cond": [0, 1, 2],
        "uncond": [3, 4, 5],
        "unknown": [6, 7, 8],
        "stays_at": [6, 6, 6],
        "drawn_at": [7, 8, 9],
    }
    assert {name: getattr(plan, name).tolist() for name in expected} == expected


def test_plans_depend_on_the_schedule_alone():
    model = build_parts().model
    slots, plans = start(model)
    run_steps(model, slots, plans)
    first = slots.tokens.clone()
    assert bool((first[:2, 1:-1] != model.vocabulary.mask).all())
    again, _ = start(model, seeds=(5, 6))
    run_steps(model, again, plans)  # the plans of other seeds
    assert bool((again.tokens[:2, 1:-1] != model.vocabulary.mask).all())
    assert not torch.equal(again.tokens, first)


@pytest.mark.gpu
def test_the_whole_loop_is_one_graph():
    model = build_parts().model.to("cuda")
    slots, plans = start(model)
    state = (slots.tokens, slots.order, slots.first_layer.kept)
    before = [tensor.clone() for tensor in state]

    def reset():
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels, builds what layouts derive
        run_steps(model, slots, plans)
        expected = slots.tokens.clone()
        reset()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_steps(model, slots, plans)
    reset()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(slots.tokens, expected)
