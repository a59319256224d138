"""Token-level mixture of experts, grouped by task, and its balance losses.

Two groups (understanding, generation), each with its own router columns, routed experts and one shared expert. All
routed experts live in one axis `[understanding | generation]`, so one `route` and one `expert_mlp` serve a batch that
mixes tasks; a token may choose only inside its group. For a token t of group g, with h its input:

    p = softmax(W_g h)                      fp32, over the group's experts
    y = shared_g(h) + sum_{e in top-k(p)} p_e / (sum of the chosen p) * expert_e(h)
    expert(h) = W_down gelu_tanh(W_up h + b_up) + b_down

Cost per token: 4 H (k I + S) multiply-adds forward at width I, k choices, shared width S; weights of all experts are
read once per batch, so small batches are bound by memory, large ones by arithmetic.

Balance, per group g with n_g experts: `n_g * sum_i f_i P_i` (Switch Transformer, arXiv 2101.03961), f_i the share of
the group's (token, choice) pairs at expert i and P_i its mean probability: 1 when balanced, n_g / k when collapsed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unif2ace.config import TASKS, TokenMoEConfig
from unif2ace.errors import UserError
from unif2ace.layout import Layout
from unif2ace.model.linear import Linear
from unif2ace.ops import RoutingPlan, expert_mlp, linear, route


class FeedForward(nn.Module):
    """Dense `down(gelu_tanh(up(h)))` with biases, used where the configuration has no token-level MoE."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up = Linear(hidden, width)
        self.down = Linear(width, hidden)

    def forward(self, h: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down(self.up.gelu(h))


def router_logits(h: Tensor, weight: Tensor) -> Tensor:
    """h [T, H], weight [E, H] -> [T, E], in at least fp32: top-k must not hang on the model's rounding."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    with torch.autocast(h.device.type, enabled=False):  # mixed precision would round the logits again
        return linear(h.to(dtype), weight.to(dtype))


class TokenMoE(nn.Module):
    """Shared plus routed experts, one group per task. Weights keep the (out, in) orientation of `nn.Linear`."""

    def __init__(self, config: TokenMoEConfig, hidden: int) -> None:
        super().__init__()
        total, width = len(TASKS) * config.num_experts, config.expert_width
        self.top_k = config.top_k
        self.group_bounds = (0, config.num_experts, total)
        self.router = nn.Linear(hidden, total, bias=False)
        self.up_proj = nn.Parameter(torch.empty(total, width, hidden))
        self.up_bias = nn.Parameter(torch.empty(total, width))
        self.down_proj = nn.Parameter(torch.empty(total, hidden, width))
        self.down_bias = nn.Parameter(torch.empty(total, hidden))
        self.shared = nn.ModuleList(FeedForward(hidden, config.shared_width) for _ in TASKS)

    def forward(self, h: Tensor, layout: Layout) -> tuple[Tensor, RoutingPlan]:
        """h [T, H] -> ([T, H], the plan of the routed experts)."""
        plan = route(
            router_logits(h, self.router.weight),
            self.top_k,
            token_group=layout.token_group,
            group_bounds=self.group_bounds,
        )
        matrices = self.up_proj, self.down_proj, self.up_bias, self.down_bias
        # Text being decoded has few rows, images many: by kind, not by number, so that a row's bits do not follow it.
        routed = expert_mlp(h, plan, *matrices, activation="gelu_tanh", few=layout.continues_text)
        # Rows of one task are consecutive, so the shared experts are plain dense FFNs over slices: no gather.
        shared = [self.shared[group](h[start:end]) for start, end, group in layout.segments]
        return routed + (shared[0] if len(shared) == 1 else torch.cat(shared)), plan


def balance_loss(
    plans: Sequence[RoutingPlan], group_bounds: Sequence[int], group_weights: Sequence[float] | None = None
) -> Tensor:
    """Scalar `mean over layers of sum_g lambda_g n_g sum_i f_i P_i`, differentiable through the probabilities P.

    Args: the plans of `ModelOutput.plans` (or `.sequence_plans`), their `group_bounds` (`TokenMoE.group_bounds`), and
    one weight lambda per group (default 1). A group without tokens contributes zero. Raises `UserError` for no plans or
    for a wrong number of weights. Cost: a few operations on [layers, E].
    """
    groups = len(group_bounds) - 1
    weights = [1.0] * groups if group_weights is None else list(group_weights)
    if not plans:
        raise UserError("balance_loss: expected the routing plans of at least one layer, got none")
    if len(weights) != groups:
        raise UserError(f"balance_loss: expected {groups} group weights, got {len(weights)}")
    load = torch.stack([plan.load for plan in plans]).to(plans[0].importance.dtype)
    product = load * torch.stack([plan.importance for plan in plans])
    total = product.new_zeros(())
    for weight, start, end in zip(weights, group_bounds[:-1], group_bounds[1:], strict=True):
        share = product[:, start:end].sum(1) / load[:, start:end].sum(1).clamp(min=1)  # empty group: 0 / 1
        total = total + weight * (end - start) * share.mean()
    return total


def z_loss(plans: Sequence[RoutingPlan]) -> Tensor:
    """Scalar mean of logsumexp(router logits)^2 over layers and tokens (ST-MoE, arXiv 2202.08906)."""
    if not plans:
        raise UserError("z_loss: expected the routing plans of at least one layer, got none")
    return torch.stack([plan.logsumexp for plan in plans]).square().mean()
