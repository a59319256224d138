"""How many tokens stay unknown after each step, and how loud the re-masking noise is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unif2ace.errors import UserError
from unif2ace.generation.schedule import MAX_STEPS, Step, check_steps, schedule_steps


def test_cosine_numbers():
    assert schedule_steps(64, 4) == [Step(64, 59, 0.75), Step(59, 45, 0.5), Step(45, 24, 0.25), Step(24, 0, 0.0)]


def test_one_step_draws_everything_without_noise():
    assert schedule_steps(64, 1, tau=3.0) == [Step(64, 0, 0.0)]


def test_in_painting_scales_by_what_is_unknown():
    assert [step.keep for step in schedule_steps(10, 4)] == [9, 7, 3, 0]


def test_show_o_scales_by_all_tokens_and_compounds_tau():
    steps = schedule_steps(10, 4, num_tokens=64, schedule="show-o")
    assert [step.keep for step in steps] == [9, 8, 7, 0]
    assert [step.tau for step in steps] == [0.75, 0.375, 0.09375, 0.0]


@given(st.integers(0, 300), st.integers(1, 64), st.sampled_from(["cosine", "show-o"]))
def test_every_token_is_decided_exactly_once(unknown, steps, schedule):
    plan = schedule_steps(unknown, steps, num_tokens=300, schedule=schedule)
    assert len(plan) <= steps
    assert sum(step.unknown - step.keep for step in plan) == unknown
    current = unknown
    for step in plan:
        assert step.unknown == current
        assert 0 <= step.keep < step.unknown  # at least one token per step
        current = step.keep
    assert current == 0


@pytest.mark.parametrize("steps", [0, -1, MAX_STEPS + 1, 2.0, True, "18", None])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(UserError, match="steps: expected an integer from 1 to 1024, got"):
        check_steps(steps)


def test_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="expected one of cosine, show-o, got 'linear'"):
        schedule_steps(4, 2, schedule="linear")
