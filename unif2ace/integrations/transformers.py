"""Mixture-of-experts models of Hugging Face transformers on our expert kernels: `experts_implementation="unif2ace"`.

    from unif2ace.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="unif2ace")
    model.set_experts_implementation("unif2ace")        # or an existing model; "eager" goes back

transformers routes, we multiply: its router hands over [T, K] expert ids and weights, from which a stable grouping plan
is made (ten small operations, 15 us for eight tokens on a CPU, no host synchronisation). Ids >= `num_experts`, with
which expert parallelism marks the experts of other ranks, are skipped. Back ends are chosen as for every op
(`unif2ace.ops.use_backend`). Gradients reach the hidden states, the routing weights and all expert parameters.

Two ways through an experts module, chosen by what it says of itself:

* its gate is transformers' own (`act_fn(gate) * up`, silu or gelu), or it has none and `act_fn` is silu, gelu, its tanh
  form or relu2; nothing stands behind the down projection: one call of `expert_mlp`. The module `act_fn` is not called.
* anything else, such as the clamped and interleaved gate of GPT-OSS (`_apply_gate`), another `act_fn` or a
  `post_expert_norm`: `grouped_gemm`, the module's own functions, `grouped_gemm`, a weighted sum. It holds the
  intermediate results of all slots in memory, as transformers' "grouped_mm" does.

Flags of `use_experts_implementation`: `has_gate`, `has_bias`, `is_transposed` and `has_post_expert_norm` are honoured,
`is_concatenated` is the business of `_apply_gate`. A flag that this file does not know is refused when it differs from
its default; so are weights that are no floating point numbers of 16 to 64 bits (quantised ones).

Transposed weights (`is_transposed`: GPT-OSS, Aria) are [E, in, out] where our GEMMs read [E, out, in]. They run, at the
cost of a copy of both weights in each forward and each backward pass, and a RuntimeWarning says so. One call of
`store_output_major(model)` after loading ends that: the same parameters in another order of memory.

Not reached: models quantised to FP8, which ask another table of implementations, and whole blocks that transformers'
`use_kernels=True` replaces (GPT-OSS: MegaBlocksMoeMLP).

`torch.autocast` does not reach the native and Triton kernels: they multiply in the dtype of the weights, as does
"grouped_mm".
"""

from __future__ import annotations

import inspect
import warnings

import torch
from torch import Tensor, nn

from unif2ace.errors import UserError
from unif2ace.ops import RoutingPlan, expert_mlp, grouped_gemm
from unif2ace.ops._checks import describe, dtype_name, expect
from unif2ace.ops.experts import combine
from unif2ace.ops.routing import grouping_plan

try:
    from transformers.activations import ACT2CLS
    from transformers.integrations import moe
except ImportError as error:
    raise UserError(
        f"{__name__} needs transformers 5.17 or later ({error}): pip install 'transformers>=5.17'"
    ) from error

NAME = "unif2ace"

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# `hidden_act` of a configuration -> activation of `expert_mlp`, without and with a gate.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
GATED_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu"}

_activation_of = {ACT2CLS[name]: activation for name, activation in ACTIVATIONS.items()}
_KNOWN_FLAGS = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm", "experts_interface"}
_unknown_flags = {
    name: parameter.default
    for name, parameter in inspect.signature(moe.use_experts_implementation).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _KNOWN_FLAGS
}


def register() -> None:
    """Make `experts_implementation="unif2ace"` known to transformers; a second call changes nothing."""
    moe.ExpertsInterface.register(NAME, experts_forward)


def store_output_major(model: nn.Module) -> None:
    """Order the memory of transposed expert weights the way our GEMMs read it, so that no call has to copy them.

    Every `is_transposed` experts module in `model` keeps its parameters, their shapes [E, in, out] and their values;
    only the strides change, to those of a transposed [E, out, in] tensor. Every implementation still runs, checkpoints
    stay the same. Call it once, after loading and before sharding. Costs one pass over those weights, and memory for
    one of them at a time.
    """
    for module in model.modules():
        if getattr(module, "is_transposed", False):
            for name in (_up_name(module), "down_proj"):
                weight = getattr(module, name)
                weight.data = weight.data.mT.contiguous().mT


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an experts module of transformers.

    Args:
        self: a module of a class decorated with `use_experts_implementation`.
        hidden_states: [T, H] floating point; computed in the dtype of the expert weights.
        top_k_index: [T, K] integer expert ids; those >= `self.num_experts` contribute nothing.
        top_k_weights: [T, K] routing weights, any float dtype; they multiply and add up in float32.

    Returns:
        [T, H] in the dtype of `hidden_states`.

    Raises:
        UserError: a flag or a weight dtype that is not supported, wrong shapes, or a back end that cannot run the call.

    Cost: that of `expert_mlp`, and the plan's: 12 * T * K bytes and a sort of T * K ids.
    """
    _check(self, hidden_states, top_k_index, top_k_weights)
    w_up, w_down = _output_major(self, _up_name(self)), _output_major(self, "down_proj")
    b_up = getattr(self, f"{_up_name(self)}_bias") if self.has_bias else None
    b_down = self.down_proj_bias if self.has_bias else None
    x = hidden_states.to(w_up.dtype)
    plan = _plan(top_k_index, top_k_weights, self.num_experts, x.dtype)

    activation = _fused_activation(self)
    if activation is not None:
        y = expert_mlp(x, plan, w_up, w_down, b_up, b_down, activation=activation)
    else:
        pre = grouped_gemm(x, w_up, plan.offsets, bias=b_up, gather=plan.order // top_k_index.shape[1])
        inner = self._apply_gate(pre) if self.has_gate else self.act_fn(pre)
        down = grouped_gemm(inner.to(w_down.dtype), w_down, plan.offsets, bias=b_down)
        if _has_post_norm(self):
            down = self.post_expert_norm(down)
        y = combine(down, plan.weights, plan.order, plan.position)
    return y.to(hidden_states.dtype)


def _plan(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, dtype: torch.dtype) -> RoutingPlan:
    """The plan of a finished choice. Its balance statistics, which take the router's logits, are empty tensors."""
    weights = top_k_weights.to(torch.promote_types(dtype, torch.float32))
    experts = top_k_index.int()
    unknown = weights.new_empty(0)
    return RoutingPlan(weights, experts, *grouping_plan(experts, num_experts), unknown, unknown)


def _fused_activation(module: nn.Module) -> str | None:
    """The activation with which `expert_mlp` computes all that the module does, or None where it cannot."""
    if _has_post_norm(module):
        return None
    activation = _activation_of.get(type(getattr(module, "act_fn", None)))
    if not module.has_gate:
        return activation
    if getattr(module._apply_gate, "__func__", None) is not moe._default_apply_gate:
        return None
    return GATED_ACTIVATIONS.get(activation)


def _up_name(module: nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _has_post_norm(module: nn.Module) -> bool:
    return getattr(module, "has_post_expert_norm", False)  # a flag since transformers 5.20


def _output_major(module: nn.Module, name: str) -> Tensor:
    """The weight as [E, out, in]."""
    weight = getattr(module, name)
    if not module.is_transposed:
        return weight
    if not weight.mT.is_contiguous() and not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(module).__name__}: {name} is stored as [E, in, out] (is_transposed=True), so every pass copies its "
            f"{weight.nbytes / 2**20:.3g} MiB; unif2ace.integrations.transformers.store_output_major(model) ends that",
            RuntimeWarning,
            stacklevel=2,
        )
    return weight.mT


def _check(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    who = f"unif2ace experts of {type(module).__name__}"
    for flag, default in _unknown_flags.items():
        value = getattr(module, flag, default)
        if value != default:
            raise UserError(f"{who}: the flag {flag} must be {default!r}, got {value!r}, which is not supported")
    for name in (_up_name(module), "down_proj"):
        dtype = getattr(module, name).dtype
        if dtype not in WEIGHT_DTYPES:
            kinds = ", ".join(dtype_name(kind) for kind in WEIGHT_DTYPES)
            raise UserError(f"{who}: {name} must be one of {kinds}, got {dtype_name(dtype)}")
    if hidden_states.dim() != 2 or not hidden_states.is_floating_point():
        raise UserError(f"{who}: hidden_states must be [T, H] floating point, got {describe(hidden_states)}")
    if top_k_index.dim() != 2 or top_k_index.shape[0] != hidden_states.shape[0]:
        raise UserError(f"{who}: top_k_index must be [{hidden_states.shape[0]}, K], got {describe(top_k_index)}")
    expect(who, "top_k_index", top_k_index, tuple(top_k_index.shape), None)
    expect(who, "top_k_weights", top_k_weights, tuple(top_k_index.shape), top_k_weights.dtype)
