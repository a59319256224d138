"""The defaults record: every value is checked, and overriding skips None."""

import math

import numpy as np
import pytest

from unif2ace.errors import UserError
from unif2ace.generation.settings import GenerationConfig


def test_override_keeps_what_is_none():
    config = GenerationConfig().override(steps=4, guidance_scale=None, temperature=0)
    assert (config.steps, config.guidance_scale, config.temperature) == (4, 3.0, 0)


def test_numpy_numbers_are_numbers():
    assert GenerationConfig(guidance_scale=np.float32(1.5)).guidance_scale == 1.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("guidance_scale", -0.1),
        ("guidance_scale", math.nan),
        ("guidance_scale", "3"),
        ("guidance_scale", True),
        ("temperature", math.inf),
        ("temperature", -1),
        ("remask_tau", -1),
        ("max_prompt_tokens", 0),
        ("max_new_tokens", 2.5),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}: expected"):
        GenerationConfig(**{name: value})
