"""`experts_implementation="unif2ace"`: modules of transformers compute what their "eager" computes.

Tolerances are those of `tests/oracle.py`, with transformers' eager implementation in the place of the reference: in
float64 it is the truth, in the dtype under test the plain rival. Whole models are in test_transformers_models.py.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracle import DRAWS, assert_close, available_backends, backend_cases
from unif2ace.errors import UserError
from unif2ace.ops import use_backend

transformers = pytest.importorskip("transformers")
moe = importlib.import_module("transformers.integrations.moe")
bridge = importlib.import_module("unif2ace.integrations.transformers")
bridge.register()

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 13, 24, 20, 6, 2


def parameters(*values: object) -> object:
    """Parameters of a test, the back end last. A second per call, as under Triton's interpreter, is slow."""
    interpreted = values[-1] == "triton" and torch.get_default_device().type == "cpu"
    return pytest.param(*values, marks=pytest.mark.slow if interpreted else ())


BACKENDS = [parameters(backend) for backend in available_backends("experts", torch.float32)]
RUNS = [parameters(dtype, backend) for backend, dtype in backend_cases("experts")]

# ------------------------------------------------------------------------------------------------- the experts modules


@moe.use_experts_implementation(has_bias=True)
class BiasedExperts(nn.Module):
    """Gate, biases, output-major weights: the one layout that no published model has."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * config.intermediate_size, config.hidden_size)
        )
        self.gate_up_proj_bias = nn.Parameter(torch.empty(self.num_experts, 2 * config.intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, config.intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, k = torch.where(top_k_index == e)
            pre = F.linear(hidden_states[token], self.gate_up_proj[e], self.gate_up_proj_bias[e])
            down = F.linear(self._apply_gate(pre), self.down_proj[e], self.down_proj_bias[e])
            y = y.index_add(0, token, (down * top_k_weights[token, k, None]).to(y.dtype))
        return y


# name -> folder of transformers.models (None: this file), class, hidden_act, does one `expert_mlp` compute it?
MODULES = {
    "swiglu": ("mixtral", "MixtralExperts", "silu", True),
    "geglu": ("mixtral", "MixtralExperts", "gelu", True),
    "swiglu, biases": (None, "BiasedExperts", "silu", True),
    "relu2, no gate": ("nemotron_h", "NemotronHExperts", "relu2", True),
    "gelu_tanh, no gate": ("nemotron_h", "NemotronHExperts", "gelu_pytorch_tanh", True),
    "transposed": ("aria", "AriaExperts", "silu", True),
    "other act_fn": ("mixtral", "MixtralExperts", "mish", False),
    "other act_fn, no gate": ("nemotron_h", "NemotronHExperts", "tanh", False),
    "other gate, transposed, interleaved, biases": ("gpt_oss", "GptOssExperts", "silu", False),
    "post norm": ("muse_spark", "MuseSparkExperts", "silu", False),
}


def make_experts(name: str, experts: int = EXPERTS) -> nn.Module:
    folder, class_name, activation, _ = MODULES[name]
    if folder is None:
        experts_class = globals()[class_name]
    else:
        module = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
        experts_class = getattr(module, class_name)
    config = SimpleNamespace(
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INNER),
        **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), experts),
        **dict.fromkeys(("hidden_act", "mlp_hidden_act"), activation),
        moe_latent_size=None,
        swiglu_alpha=1.702,
        swiglu_limit=0.5,  # so that the clamp acts
        post_norm_eps=1e-6,
        _experts_implementation="eager",
    )
    module = experts_class(config)
    if not hasattr(module, "is_transposed"):
        pytest.skip(f"in transformers {transformers.__version__} {class_name} has one implementation only")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def make_inputs(experts: int = EXPERTS, empty: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, top_k_index, top_k_weights; the last `empty` experts get no token."""
    scores, index = torch.randn(TOKENS, experts - empty).softmax(-1).topk(TOP_K)
    return torch.randn(TOKENS, HIDDEN), index, scores / scores.sum(-1, keepdim=True)


def run(
    module: nn.Module, implementation: str, x: Tensor, index: Tensor, weights: Tensor, cotangent: Tensor
) -> dict[str, Tensor]:
    """Output and all gradients by name."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, index, weights)
    assert y.dtype == x.dtype
    y.backward(cotangent.to(y.dtype))
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {"output": y.detach(), "gradient of x": x.grad, "gradient of weights": weights.grad, **gradients}


@pytest.mark.filterwarnings("ignore:.*store_output_major")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("dtype", "backend"), RUNS)
def test_a_module_computes_what_eager_computes(name, dtype, backend):
    low = make_experts(name).to(dtype)
    high = copy.deepcopy(low).double()
    assert (bridge._fused_activation(low) is not None) == MODULES[name][-1]
    draws = []
    for _ in range(DRAWS):
        x, index, weights = make_inputs()
        x, cotangent = x.to(dtype), torch.randn(TOKENS, HIDDEN).to(dtype)
        truth = run(high, "eager", x.double(), index, weights.double(), cotangent)
        plain = run(low, "eager", x, index, weights, cotangent)
        with use_backend(backend):
            result = run(low, bridge.NAME, x, index, weights, cotangent)
            again = run(low, bridge.NAME, x, index, weights, cotangent)
        for what, value in result.items():
            assert torch.equal(value, again[what]), f"{what}: two equal calls differ"
        draws.append((result, truth, plain))
    for what in draws[0][0]:
        pooled = (torch.cat([draw[i][what].flatten() for draw in draws]) for i in range(3))
        assert_close(f"{name} {backend} {dtype} {what}", *pooled)


@pytest.mark.filterwarnings("ignore:.*store_output_major")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_of_other_ranks_are_skipped(name, backend):
    """Ids >= num_experts count nothing: not in the output, nor in a gradient, whatever their weight."""
    module = make_experts(name)
    x, index, weights = make_inputs()
    index[3], index[5, 0], index[8, 1] = EXPERTS, EXPERTS, EXPERTS + 2
    elsewhere = index >= EXPERTS
    cotangent = torch.randn(TOKENS, HIDDEN)
    expected = run(module, "eager", x, index.where(~elsewhere, 0), weights.where(~elsewhere, 0.0), cotangent)
    expected["gradient of weights"][elsewhere] = 0.0
    expected = {what: value.clone() for what, value in expected.items()}
    with use_backend(backend):
        result = run(module, bridge.NAME, x, index, weights, cotangent)
    for what, value in expected.items():
        torch.testing.assert_close(result[what], value, atol=1e-5, rtol=1e-5, msg=lambda text, what=what: what + text)


@pytest.mark.filterwarnings("ignore:.*store_output_major")
@pytest.mark.parametrize("name", ["swiglu", "other gate, transposed, interleaved, biases"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_at_all(name, backend):
    module = make_experts(name)
    nothing = torch.zeros(0, TOP_K)
    with use_backend(backend):
        result = run(module, bridge.NAME, torch.zeros(0, HIDDEN), nothing.long(), nothing, torch.zeros(0, HIDDEN))
    assert result["output"].shape == (0, HIDDEN)
    assert all(not value.any() for value in result.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision(backend):
    """Under autocast hidden states and routing weights may be shorter than the expert weights."""
    module = make_experts("swiglu")
    x, index, weights = make_inputs()
    module.config._experts_implementation = bridge.NAME
    expected = module(x.bfloat16().float(), index, weights.bfloat16().float())
    with use_backend(backend), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        result = module(x.bfloat16(), index, weights.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=0.03, rtol=0.03)


# ------------------------------------------------------------------------------------------------- transposed weights


def test_copies_of_transposed_weights_are_announced_and_can_be_ended():
    module, (x, index, weights) = make_experts("transposed"), make_inputs()
    cotangent = torch.randn(TOKENS, HIDDEN)
    with pytest.warns(RuntimeWarning, match=r"AriaExperts: \w+ .*is_transposed=True.*store_output_major"):
        before = run(module, bridge.NAME, x, index, weights, cotangent)
    values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    bridge.store_output_major(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = run(module, bridge.NAME, x, index, weights, cotangent)
    for what, value in before.items():
        assert torch.equal(after[what], value), what
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, values[name])
        assert parameter.grad.stride() == parameter.stride(), "the gradient was copied into another order"


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_not_supported_is_refused_by_name(monkeypatch):
    module, (x, index, weights) = make_experts("swiglu"), make_inputs()
    module.config._experts_implementation = bridge.NAME
    with pytest.raises(UserError, match=r"experts of MixtralExperts: hidden_states must be \[T, H\].*\[1, 13, 24\]"):
        module(x[None], index, weights)
    with pytest.raises(UserError, match=r"top_k_index must be \[13, K\], got \[12, 2\]"):
        module(x, index[1:], weights)
    with pytest.raises(UserError, match=r"top_k_index must be \[13, 2\] integer, got \[13, 2\] float32"):
        module(x, weights, weights)
    with pytest.raises(UserError, match=r"top_k_weights must be \[13, 2\]"):
        module(x, index, weights[:, :1])
    monkeypatch.setitem(bridge._unknown_flags, "has_scale", False)
    module(x, index, weights)
    module.has_scale = True
    with pytest.raises(UserError, match="MixtralExperts: the flag has_scale must be False, got True"):
        module(x, index, weights)
    del module.has_scale
    module.down_proj.requires_grad_(False)
    module.down_proj.data = module.down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match=r"down_proj must be one of float32, .*got float8_e4m3fn"):
        module(x, index, weights)


def test_every_flag_of_transformers_is_known():
    """A new one needs a decision: honour it, or leave it refused."""
    assert bridge._unknown_flags == {}
