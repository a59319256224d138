"""Other people's code that computes what an op computes, and which of it is here: `python -m benchmarks.peers`.

A peer is timed in the same interleaved run as our back ends, after the same gate. `PEERS` is the one list of them: per
op, what it needs and how to make its function. A peer that cannot run is absent with a reason, never silently.

* transformers: its `experts_implementation`s "eager" (a loop over experts), "grouped_mm" and "batched_mm", run through
  the forward of the experts classes of its models (Nemotron-H without a gate, Mixtral with one), and in whole models.
* torch: `torch.nn.functional.grouped_mm` with a finished routing plan, three samplers, and
  `scaled_dot_product_attention` with one mask for all sequences: what one writes without this package.
* liger: the experts and the linear cross entropy of liger-kernel, on a GPU.
* `compiled`: the op's plain definition through `torch.compile`, on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Function
from benchmarks.shapes import ExpertShape
from unif2ace.ops import RoutingPlan
from unif2ace.ops.experts import GATED, activate


@dataclass(frozen=True)
class Peer:
    """One rival of `op`; `make(*what the op's benchmark knows)` gives its function over the problem's inputs, or None
    where it does not compute that.
    """

    op: str
    name: str
    make: Callable[..., Function | None]
    module: str | None = None  # to be installed
    devices: tuple[str, ...] = ("cpu", "cuda")

    def why_not(self, device: str) -> str | None:
        """Why it cannot run on tensors of this device type, or None when it can."""
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def present(op: str, device: str, *known: object) -> dict[str, Function]:
    """The functions of all peers of `op` that can run here; `known` goes to their makers."""
    made = {peer.name: peer.make(*known) for peer in PEERS if peer.op == op and peer.why_not(device) is None}
    return {name: function for name, function in made.items() if function is not None}


def compiled(reference: Function, device: str) -> dict[str, Function]:
    """The plain definition through `torch.compile`, on a GPU: what one has without writing a kernel."""
    return {"torch: compiled": torch.compile(reference, dynamic=False)} if device == "cuda" else {}


def absent(op: str, device: str) -> dict[str, str]:
    """Name -> reason of the peers of `op` that cannot run here."""
    return {peer.name: reason for peer in PEERS if peer.op == op and (reason := peer.why_not(device)) is not None}


# ------------------------------------------------------------------------------------------------------------- experts

ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "silu": "silu", "relu2": "relu2"}
ACTIVATION_NAMES |= {"swiglu": "silu", "geglu": "gelu"}  # gated: the activation of the gate


def transformers_experts(implementation: str) -> Callable[[ExpertShape, RoutingPlan], Function]:
    """Maker for one `experts_implementation` of transformers.

    The forward of its experts classes reads nothing but the attributes set here, so it runs on the tensors of the
    problem; as parameters of a module they would have to be copied there, and their gradients fetched.
    """

    def make(shape: ExpertShape, plan: RoutingPlan) -> Function:
        from transformers.activations import ACT2FN
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        gated = shape.activation in GATED
        experts_class, up_name = (MixtralExperts, "gate_up_proj") if gated else (NemotronHExperts, "up_proj")
        module = SimpleNamespace(
            config=SimpleNamespace(_experts_implementation=implementation),
            num_experts=shape.experts,
            has_gate=gated,
            has_bias=False,
            has_post_expert_norm=False,
            is_transposed=False,
            is_concatenated=True,
            act_fn=ACT2FN[ACTIVATION_NAMES[shape.activation]],
            _is_expert_parallel=False,
        )
        module._apply_gate = lambda gate_up: experts_class._apply_gate(module, gate_up)
        experts = plan.experts.long()

        def function(x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor]:
            setattr(module, up_name, w_up)
            module.down_proj = w_down
            return (experts_class.forward(module, x, experts, weights),)

        return function

    return make


def transformers_model(implementation: str) -> Callable[[Callable[[str, str], Function]], Function]:
    """A whole model of transformers; `through(implementation, back end)` of the benchmark makes its call."""
    return lambda through: through(implementation, "auto")


def torch_grouped_mm(shape: ExpertShape, plan: RoutingPlan) -> Function:
    """Gather, `torch.nn.functional.grouped_mm`, activation, `grouped_mm`, weighted sum; the plan is given, as to us."""
    rows, position, ends = plan.order.long() // shape.top_k, plan.position.long(), plan.offsets[1:]

    def function(x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor]:
        pre = F.grouped_mm(x[rows], w_up.mT, offs=ends)
        down = F.grouped_mm(activate(pre, shape.activation), w_down.mT, offs=ends)
        slots = down[position].view(shape.tokens, shape.top_k, shape.hidden)
        return ((slots * weights[..., None]).sum(1).to(x.dtype),)

    return function


def liger_experts(shape: ExpertShape, plan: RoutingPlan) -> Function | None:
    """liger-kernel's fused experts in Triton, which know SwiGLU alone and sort the slots themselves."""
    if shape.activation != "swiglu":
        return None
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda x, weights, w_up, w_down: (LigerFusedMoEFunction.apply(x, w_up, w_down, plan.experts, weights),)


def torch_grouped_gemm(offsets: Tensor) -> Function:
    """`torch.nn.functional.grouped_mm` over all experts."""
    return lambda a, b: (F.grouped_mm(a, b.mT, offs=offsets[1:]),)


# ------------------------------------------------------------------------------------------------------------ sampling


# Samplers in plain PyTorch, each in place and on blocks of `rows_at_once` rows that stay in the cache. They draw other
# noise than ours, so other tokens of the same distribution: see the gate of `bench_sampling`.


def exponential_race(guidance: float, rows_at_once: int) -> Function:
    """argmax of p_v / E_v with exponential E_v: the Gumbel maximum without its logarithms, as inference engines do."""

    def choose(p: Tensor) -> Tensor:
        race = torch.empty_like(p).exponential_()
        return torch.div(p, race, out=race).argmax(1)

    return _in_blocks(choose, guidance, rows_at_once)


def race_of_uniforms(guidance: float, rows_at_once: int) -> Function:
    """The same race with E_v = -log of a uniform draw: on a CPU three times as fast as `exponential_`, one code at a
    time.
    """

    def choose(p: Tensor) -> Tensor:
        race = torch.empty_like(p).uniform_().log_()
        return torch.div(p, race, out=race).argmin(1)

    return _in_blocks(choose, guidance, rows_at_once)


def inverse_cdf(guidance: float, rows_at_once: int) -> Function:
    """One uniform draw per row, looked up in the cumulative sums. The least work of all; but sums in float32 cannot
    reach codes of probability below 6e-8, and a row's token hangs on how its sums are rounded.
    """

    def choose(p: Tensor) -> Tensor:
        sums = p.cumsum(1)
        drawn = torch.rand(len(p), 1, device=p.device) * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True)[:, 0]

    return _in_blocks(choose, guidance, rows_at_once)


def _in_blocks(choose: Callable[[Tensor], Tensor], guidance: float, rows_at_once: int) -> Function:
    """Guidance, softmax, `choose` codes from probabilities, and the logarithm of those chosen."""

    def function(logits: Tensor, uncond_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        codes = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        confidence = torch.empty(len(logits), device=logits.device)
        for start in range(0, len(logits), rows_at_once):
            part = slice(start, start + rows_at_once)
            p = guided(logits[part], None if uncond_logits is None else uncond_logits[part], guidance).softmax(1)
            codes[part] = code = choose(p)
            confidence[part] = p.gather(1, code[:, None])[:, 0].log_()
        return codes, confidence

    return function


def guided(logits: Tensor, uncond_logits: Tensor | None = None, guidance: float = 0.0) -> Tensor:
    """(1 + w) z_cond - w z_uncond in float32, in one pass: a linear interpolation beyond its end."""
    if uncond_logits is None:
        return logits.float()
    return torch.lerp(uncond_logits.float(), logits.float(), 1.0 + guidance)


# ------------------------------------------------------------------------------------------------------ diffusion_loss


def liger_linear_loss(targets: Tensor) -> Function:
    """liger-kernel's fused linear cross entropy, mean over the rows."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, bias: (liger_fused_linear_cross_entropy(hidden, weight, targets.long(), bias),)


# ------------------------------------------------------------------------------------------------------ omni_attention


def sdpa_with_mask(sequences: int, mask: Tensor) -> Function:
    """`scaled_dot_product_attention` over [sequences, heads, rows, dim] with one boolean mask [rows, rows]."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        batches = [x.view(sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        return (F.scaled_dot_product_attention(*batches, attn_mask=mask).transpose(1, 2).reshape(q.shape),)

    return function


PEERS = (
    Peer("experts", "transformers: eager", transformers_experts("eager"), "transformers"),
    Peer("experts", "transformers: grouped_mm", transformers_experts("grouped_mm"), "transformers"),
    Peer("experts", "transformers: batched_mm", transformers_experts("batched_mm"), "transformers"),
    Peer("experts", "torch: grouped_mm", torch_grouped_mm),
    Peer("experts", "liger: fused experts", liger_experts, "liger_kernel", devices=("cuda",)),
    Peer("hub_model", "transformers: eager", transformers_model("eager"), "transformers"),
    Peer("hub_model", "transformers: grouped_mm", transformers_model("grouped_mm"), "transformers"),
    Peer("hub_model", "transformers: batched_mm", transformers_model("batched_mm"), "transformers"),
    Peer("grouped_gemm", "torch: grouped_mm", torch_grouped_gemm),
    Peer("sampling", "torch: exponential race", exponential_race),
    Peer("sampling", "torch: race of uniforms", race_of_uniforms),
    Peer("sampling", "torch: inverse CDF", inverse_cdf),
    Peer("diffusion_loss", "liger: fused linear cross entropy", liger_linear_loss, "liger_kernel", devices=("cuda",)),
    Peer("omni_attention", "torch: sdpa, one mask", sdpa_with_mask),
)


def main() -> None:
    """Print every peer and whether it runs here."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for peer in PEERS:
            print(f"{device:<6}{peer.op:<16}{peer.name:<26}{peer.why_not(device) or 'present'}")


if __name__ == "__main__":
    main()
