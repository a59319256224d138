"""Decoders of Hugging Face transformers with their experts on our kernels, against its own implementations.

A random Qwen3-MoE (gated experts, one fused `expert_mlp` per layer) and a random GPT-OSS (its own gate between two
grouped GEMMs; weights stored by `store_output_major`). Everything but the experts (attention, norms, router, head) is
the same code in every variant, so these figures are what a user sees, not the speed of an op. "batched_mm" copies the
weights of an expert for every slot: it takes part in generation only.

The gate of a pass: logits and the gradients of all parameters. That of generation, in float32: the tokens of "eager".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.problems import Function, Problem, each_direction, each_dtype
from unif2ace.ops import use_backend

transformers = pytest.importorskip("transformers")

VOCABULARY = 1000
HEAD_DIM = 64

passes = pytest.mark.parametrize("shape", [name for name, s in shapes.HUB_MODELS.items() if not s.new_tokens])
generations = pytest.mark.parametrize("shape", [name for name, s in shapes.HUB_MODELS.items() if s.new_tokens])


@cache
def make_model(size: shapes.HubModelShape, dtype: torch.dtype, device: str) -> torch.nn.Module:
    from unif2ace.integrations.transformers import NAME, register, store_output_major

    register()
    config = transformers.AutoConfig.for_model(
        size.model_type,
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // HEAD_DIM,
        num_key_value_heads=size.hidden // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        num_experts_per_tok=size.top_k,
        eos_token_id=None,
        pad_token_id=0,
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), size.inner),  # each model reads its own name
        **dict.fromkeys(("num_experts", "num_local_experts"), size.experts),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=NAME).to(device, dtype).eval()
    store_output_major(model)
    return model


def make_ids(size: shapes.HubModelShape, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (size.sequences, size.length), generator=generator).to(device)


def variants(
    through: Callable[[str, str], Function], dtype: torch.dtype, device: str, backends: Callable
) -> dict[str, Function]:
    """`through(implementation of the experts, back end)` for each back end of ours, and theirs."""
    ours = {name: through("unif2ace", name) for name in backends("experts", dtype)}
    return ours | peers.present("hub_model", device, through)


@passes
@each_direction
@each_dtype
def bench_pass(
    shape: str, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.HUB_MODELS[shape]
    model, ids = make_model(size, dtype, device), make_ids(size, device)

    def through(implementation: str, backend: str) -> Function:
        def function(**parameters: Tensor) -> tuple[Tensor]:
            model.set_experts_implementation(implementation)
            with use_backend(backend):
                return (torch.func.functional_call(model, parameters, (ids,), {"use_cache": False}).logits,)

        return function

    functions = variants(through, dtype, device, backends)
    del functions["transformers: batched_mm"]
    problem = Problem({name: parameter.detach() for name, parameter in model.named_parameters()}, functions)
    compare(
        problem.variants(direction),
        baseline="reference",
        op="hub_model",
        shape=shape,
        case=direction,
        dtype=dtype,
        gate=problem.gate(direction),
        items=(ids.numel(), "tokens"),
    )


@generations
@each_dtype
def bench_generation(shape: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable) -> None:
    size = shapes.HUB_MODELS[shape]
    model, ids = make_model(size, dtype, device), make_ids(size, device)

    def through(implementation: str, backend: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            model.set_experts_implementation(implementation)
            with use_backend(backend):
                return model.generate(ids, max_new_tokens=size.new_tokens, do_sample=False)

        return call

    calls = variants(through, dtype, device, backends)

    def same_tokens(name: str) -> None:
        expected = calls["transformers: eager"]()
        assert torch.equal(calls[name](), expected), "tokens differ from those of eager"

    compare(
        calls,
        baseline="reference",
        op="hub_model",
        shape=shape,
        case="forward",
        dtype=dtype,
        gate=same_tokens if dtype == torch.float32 else None,  # in short floats a rounded logit changes the rest
        items=(size.sequences * size.new_tokens, "tokens"),
    )
