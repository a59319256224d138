"""Whole models of transformers with `experts_implementation="unif2ace"`: logits, gradients, generation, checkpoints.

Tolerances are those of test_transformers.py.
"""

from __future__ import annotations

import copy
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.bits import ON_CPU
from tests.oracle import assert_close, available_backends
from unif2ace.ops import use_backend

transformers = pytest.importorskip("transformers")
moe = importlib.import_module("transformers.integrations.moe")
bridge = importlib.import_module("unif2ace.integrations.transformers")
bridge.register()

BACKENDS = available_backends("experts", torch.float32)
# A second per call, as under Triton's interpreter, is slow.
GENERATING = [pytest.param(b, marks=[pytest.mark.slow] * (b == "triton" and ON_CPU)) for b in BACKENDS]

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 5},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 5, "head_dim": 8},
    "olmoe": {"intermediate_size": 24, "num_experts": 5},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 5, "head_dim": 8, "sliding_window": 8},
}


def make_model(name: str) -> nn.Module:
    config = transformers.AutoConfig.for_model(name, **COMMON, **MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=bridge.NAME)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    bridge.store_output_major(model)
    return model.eval()


def make_batch() -> dict[str, Tensor]:
    """Two sequences, one padded on the left."""
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    return {"input_ids": torch.randint(1, 61, (2, 9)) * mask, "attention_mask": mask}


def logits_and_gradients(model: nn.Module, implementation: str) -> dict[str, Tensor]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(1)
    batch = make_batch()
    output = model(**batch, labels=batch["input_ids"].where(batch["attention_mask"] > 0, -100))
    output.loss.backward()
    return {"logits": output.logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_has_the_logits_and_gradients_of_eager(name, backend):
    model = make_model(name)
    plain = logits_and_gradients(model, "eager")
    truth = logits_and_gradients(copy.deepcopy(model).double(), "eager")
    with use_backend(backend):
        result = logits_and_gradients(model, bridge.NAME)
    for what, value in result.items():
        assert_close(f"{name} {backend} {what}", value, truth[what], plain[what])


@pytest.mark.parametrize("backend", available_backends("experts", torch.bfloat16))
def test_a_model_in_bfloat16(backend):
    """One layer: behind a second router, a rounded bit may choose another expert."""
    model = make_model("mixtral")
    model.model.layers = model.model.layers[:1]
    low, high = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16().float()
    plain, truth = logits_and_gradients(low, "eager"), logits_and_gradients(high, "eager")
    with use_backend(backend):
        result = logits_and_gradients(low, bridge.NAME)
    for what, value in result.items():
        assert_close(f"{backend} {what}", value, truth[what], plain[what])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("backend", GENERATING)
def test_greedy_generation_gives_the_tokens_of_eager(name, backend):
    model, batch, tokens = make_model(name), make_batch(), {}
    for implementation in ("eager", bridge.NAME):
        model.set_experts_implementation(implementation)
        with use_backend(backend):
            tokens[implementation] = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert tokens["eager"].shape == (2, 15)
    assert torch.equal(tokens[bridge.NAME], tokens["eager"])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_model_compiles_without_a_graph_break(name):
    model, batch = make_model(name), make_batch()
    expected = logits_and_gradients(model, bridge.NAME)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    torch.manual_seed(1)
    batch = make_batch()
    output = compiled(**batch, labels=batch["input_ids"].where(batch["attention_mask"] > 0, -100))
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected["logits"])
    for what, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[what], msg=lambda text, what=what: what + text)


def test_a_checkpoint_opens_with_the_implementation(tmp_path):
    """The order of memory chosen by `store_output_major` stays out of checkpoints."""
    model, batch = make_model("gpt_oss"), make_batch()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=bridge.NAME)
    assert loaded.config._experts_implementation == bridge.NAME
    assert loaded.model.layers[0].mlp.experts.down_proj.is_contiguous()
    bridge.store_output_major(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# ---------------------------------------------------------------------------------------------------------- registering


def test_registering_twice_is_registering_once():
    bridge.register()
    before = dict(moe.ALL_EXPERTS_FUNCTIONS)
    bridge.register()
    assert dict(moe.ALL_EXPERTS_FUNCTIONS) == before
    assert moe.ALL_EXPERTS_FUNCTIONS["unif2ace"] is bridge.experts_forward
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_the_package_neither_imports_nor_needs_transformers():
    program = """
import sys
import unif2ace, unif2ace.ops, unif2ace.integrations
assert "transformers" not in sys.modules
sys.modules["transformers"] = None  # as if it were not installed
import unif2ace.integrations.transformers
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("unif2ace.errors.UserError: unif2ace.integrations.transformers needs transformers 5.17")


def test_the_example_of_the_readme_runs(capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"```python\n((?:(?!```).)*integrations\.transformers.*?)```", readme, flags=re.DOTALL)
    for large, small in (("512", "64"), ("1024", "64"), ("(4, 128)", "(2, 8)")):
        assert large in example
        example = example.replace(large, small)
    exec(example, {})
    assert re.findall(r"^(\w+) +[\d.]+ ms$", capsys.readouterr().out, re.MULTILINE) == [
        "eager",
        "grouped_mm",
        "unif2ace",
    ]
