"""The packed model against the model written again, slowly and plainly: padded rows, a full mask, loops over experts.

That pads influence nothing, that the attention blocks are the attention rules, and that each MoE level is what its
docstring says, all follow from the two agreeing.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from unif2ace.model.transformer import UniF2ace


def padded_forward(
    model: UniF2ace, task: str, texts: list[list[int]], codes: Tensor, memory: list[dict[str, Tensor]], length: int
) -> list[Tensor]:
    """Hidden rows of every sequence, padded *on the left* to `length`; `memory[b]`: name -> [rows, width].

    Positions count pads as well, as in the published code: rotary embedding sees differences only.
    """
    vocabulary, config = model.vocabulary, model.config
    soi, eoi = vocabulary.control("soi"), vocabulary.control("eoi")
    result = []
    for text, code, features in zip(texts, codes, memory, strict=True):
        image = [soi, *(code + vocabulary.code_start).tolist(), eoi]
        if task == "generation":
            row = [vocabulary.control("t2i"), vocabulary.sot, *text, vocabulary.eot]
            first, image_start = len(row), len(row)
            row = row + image
        else:
            row = [vocabulary.control("mmu"), *image]
            first, image_start = len(row), 1
            row = [*row, vocabulary.sot, *text]
        pads, rows = length - len(row), len(row)
        mask = torch.zeros(length, length, dtype=torch.bool)
        mask.fill_diagonal_(True)  # pads see themselves: no empty softmax
        for i in range(rows):
            for j in range(rows):
                if task == "generation":
                    sees = j <= i if i < first else True
                else:
                    sees = j < first if i < first else j <= i
                mask[pads + i, pads + j] = sees
        ids = torch.tensor([vocabulary.control("pad")] * pads + row)
        x = model.embedding.weight[ids]
        picture = slice(pads + image_start, pads + image_start + len(image))
        if model.image_positions is not None:
            x = torch.cat([x[: picture.start], x[picture] + model.image_positions, x[picture.stop :]])
        for layer in model.layers:
            x = _block(layer, x, mask, picture, task, features, config)
        result.append(model.final_norm(x)[pads:])
    return result


def _rotate(x: Tensor, config) -> Tensor:
    half = config.rotary_dim // 2
    out = x.clone()
    for position in range(x.shape[0]):
        for i in range(half):
            angle = torch.tensor(position) * torch.tensor(config.rotary_theta) ** (-2 * i / config.rotary_dim)
            a, b = x[position, :, i], x[position, :, half + i]
            out[position, :, i] = a * angle.cos() - b * angle.sin()
            out[position, :, half + i] = b * angle.cos() + a * angle.sin()
    return out


def _attention(module, h: Tensor, mask: Tensor, config) -> Tensor:
    heads, dim = config.num_heads, config.head_dim
    q, k, v = (part.view(-1, heads, dim) for part in module.qkv(h).chunk(3, dim=1))
    q, k = _rotate(module.q_norm(q), config), _rotate(module.k_norm(k), config)
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return module.out(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


def _token_level(module, h: Tensor, task: str) -> Tensor:
    if not hasattr(module, "router"):
        return module(h)
    group = 0 if task == "understanding" else 1
    start, end = module.group_bounds[group : group + 2]
    rows = []
    for row in h:
        probabilities = (module.router.weight[start:end] @ row).softmax(0)
        best, chosen = probabilities.topk(module.top_k)
        out = module.shared[group](row)
        for gate, expert in zip(best / best.sum(), (chosen + start).tolist(), strict=True):
            up = functional.gelu(module.up_proj[expert] @ row + module.up_bias[expert], approximate="tanh")
            out = out + gate * (module.down_proj[expert] @ up + module.down_bias[expert])
        rows.append(out)
    return torch.stack(rows)


def _sequence_level(module, x: Tensor, task: str, features: dict[str, Tensor], moe) -> Tensor:
    group = 0 if task == "understanding" else 1
    start, end = module.group_bounds[group : group + 2]
    probabilities = (module.router.weight[start:end] @ x.mean(0)).softmax(0)
    best, chosen = probabilities.topk(module.top_k)
    out = torch.zeros_like(x)
    for gate, index in zip(best / best.sum(), chosen.tolist(), strict=True):
        name = moe.experts(task)[index]
        if name == "copy":
            out = out + gate * x
        elif name != "zero":
            keep = module.mix[["clip", "face", "noise"].index(name)].softmax(0)[0]
            sampler = module.resamplers[name]
            memory = sampler.memory_norm(features[name])
            value, attended = sampler.value(memory), 0
            if sampler.key is None:
                attended = value
            else:
                scores = sampler.queries @ sampler.key(memory).T / sampler.queries.shape[1] ** 0.5
                attended = scores.softmax(1) @ value
            resampled = sampler.out(sampler.norm(sampler.queries + attended))
            out = out + gate * (keep * x + (1 - keep) * resampled)
    return out


def _block(layer, x: Tensor, mask: Tensor, picture: slice, task: str, features: dict[str, Tensor], config) -> Tensor:
    h = layer.norm(x)
    attended = _attention(layer.attention, h, mask, config)
    if config.parallel_block:
        x = x + attended + _token_level(layer.ffn, h, task)
    else:
        x = x + attended
        x = x + _token_level(layer.ffn, layer.ffn_norm(x), task)
    if layer.sequence_moe is None:
        return x
    mixed = _sequence_level(
        layer.sequence_moe, layer.sequence_moe.norm(x)[picture], task, features, config.sequence_moe
    )
    return torch.cat([x[: picture.start], x[picture] + layer.sequence_moe.scale * mixed, x[picture.stop :]])


@pytest.mark.parametrize("length", [24, 31])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"parallel_block": False, "image_positions": False},
        {"token_moe": None},
        {"sequence_moe": None},
        {"token_moe": None, "sequence_moe": None, "parallel_block": False},
    ],
    ids=["parallel", "sequential", "dense-ffn", "no-sequence-moe", "sequential-dense"],
)
@pytest.mark.parametrize("task", ["generation", "understanding"])
def test_packed_rows_equal_the_padded_form(make, build_model, task: str, overrides: dict, length: int) -> None:
    model = build_model(**overrides)
    made: SimpleNamespace = make(task, [4, 0, 7, 2])
    with torch.no_grad():
        if task == "generation" and model.mask_ratio_embedding is not None:
            rows = model.mask_ratio_embedding(made.arguments["mask_ratio"])
            memory = [{"noise": row} for row in rows]
        else:
            features = made.arguments.get("features", {})
            memory = [{name: feature[b] for name, feature in features.items()} for b in range(4)]
        expected = padded_forward(model, task, made.texts, made.codes, memory, length)
        got = model(made.batch, **made.arguments).hidden
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-5)
