"""Presets, parameter counts, JSON."""

from __future__ import annotations

import json

import pytest
import torch

from unif2ace.config import PRESETS, SequenceMoEConfig, TokenMoEConfig, UniF2aceConfig, preset
from unif2ace.errors import UserError
from unif2ace.model.transformer import UniF2ace


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_that_of_the_module(name):
    config = preset(name)
    with torch.device("meta"):
        model = UniF2ace(config)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert config.num_parameters() == sum(sizes.values())

    moe, inactive = config.token_moe, 0
    for key, size in sizes.items():
        if moe and key.split(".")[-1] in ("up_proj", "up_bias", "down_proj", "down_bias"):
            inactive += size * (2 * moe.num_experts - moe.top_k) // (2 * moe.num_experts)
        elif ".shared.1." in key or (config.sequence_moe and ".resamplers.noise." in key):
            inactive += size
    if config.sequence_moe:
        inactive += 2 * config.num_layers  # mix scalars of the noise expert
    assert config.num_parameters(active=True) == sum(sizes.values()) - inactive


def test_size_of_the_main_preset():
    assert preset("unif2ace-1.8b").num_parameters() == pytest.approx(1.8e9, rel=0.05)
    assert preset("unif2ace-1.8b-512").num_parameters() == pytest.approx(1.8e9, rel=0.05)
    assert preset("show-o-1.3b").num_parameters() == preset("show-o-1.3b").num_parameters(active=True)
    assert preset("avatars-tiny").num_parameters() < 8e6


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = preset(name)
    assert UniF2aceConfig.from_json(config.to_json()) == config


def test_overrides():
    moe = TokenMoEConfig(num_experts=2, top_k=1, expert_width=8, shared_width=8)
    config = preset("avatars-tiny", num_layers=3, token_moe=moe, sequence_moe=None, rotary_theta=100)
    assert (config.num_layers, config.token_moe, config.sequence_moe) == (3, moe, None)
    assert config.rotary_theta == 100.0
    assert isinstance(config.rotary_theta, float)
    assert preset("avatars-tiny", token_moe={"top_k": 3}).token_moe.top_k == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "unknown field 'hiden_size', expected one of num_layers, hidden_size"),
        ({"hidden_size": "large"}, "hidden_size: expected int, got 'large'"),
        ({"hidden_size": 64.0}, "hidden_size: expected int, got 64.0"),
        ({"num_layers": True}, "num_layers: expected int, got True"),
        ({"parallel_block": 1}, "parallel_block: expected bool, got 1"),
        ({"rotary_theta": "1e4"}, "rotary_theta: expected float"),
        ({"token_moe": {"experts": 3}}, "token_moe: unknown field 'experts'"),
        ({"token_moe": 3}, "token_moe: expected an object of fields, got int"),
        ({"token_moe": {"top_k": 9}}, "top_k must be at most num_experts = 8, got 9"),
        ({"sequence_moe": {"generation_experts": "copy"}}, "expected a list of strings"),
        ({"sequence_moe": {"generation_experts": ["copy", "clip"]}}, "may hold copy, zero, noise, got 'clip'"),
        ({"sequence_moe": {"understanding_experts": ["clip", "clip"]}}, "may hold 'clip' once"),
        ({"sequence_moe": {"understanding_experts": ["copy"]}}, "at least top_k = 2 names"),
        ({"sequence_moe": {"resampler_width": 5}}, "must be even"),
        ({"num_heads": 7}, "multiple of num_heads = 7"),
        ({"num_heads": 0}, "num_heads must be positive, got 0"),
        ({"rotary_dim": 66}, "rotary_dim must be even and at most head_dim = 64"),
        ({"end_of_text": 60000}, "end_of_text must be a text id"),
        ({"num_image_tokens": 250}, "square number"),
    ],
)
def test_wrong_fields_are_refused(change, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        UniF2aceConfig.from_json(json.dumps(change))


def test_unreadable_json_and_unknown_presets_are_refused():
    with pytest.raises(UserError, match="expected JSON text"):
        UniF2aceConfig.from_json("{")
    with pytest.raises(UserError, match="expected an object of fields, got list"):
        UniF2aceConfig.from_json("[]")
    with pytest.raises(UserError, match=r"unknown preset 'huge', expected one of unif2ace-1\.8b, unif2ace-1\.8b-512"):
        preset("huge")
    with pytest.raises(UserError, match="unknown field 'layers'"):
        preset("avatars-tiny", layers=3)


def test_feature_shapes():
    moe = SequenceMoEConfig()
    assert [moe.feature_shape(name) for name in ("noise", "clip", "face")] == [(1, 256), (576, 1024), (1, 512)]
    assert moe.feature_names("understanding") == ("clip", "face")
    assert moe.feature_names("generation") == ("noise",)
