"""Sequence-level mixture of experts, grouped by task: whole images choose experts, on image rows only.

Per image b, with x its image rows after LayerNorm:

    p = softmax(W_g mean_rows(x))   fp32, over the experts of its task;   g = top-2 of p, renormalised
    y = sum_e g_e E_e(x),   copy(x) = x,   zero(x) = 0,   noise | clip | face (x) = w x + (1 - w) S(F)

`w` is the first entry of a softmax over two trained scalars, F an external feature and S a resampler to one row per
image row, so the whole level is `y = a_b x + sum_j c_bj S_j`: per-image scalars, one pass over memory
(`mix_sequences`).

    S(F) = W_o LN(Q + Attention(Q, W_k F', W_v F')) + b_o,   F' = LN(F)

with learned queries Q (one per image row) at a low width r. The residual Q lets rows differ even where F is a single
row (noise, face); there the softmax runs over one key and is exactly 1, so W_k does not exist.

F: noise = sinusoidal embedding of the mask ratio through an MLP (shared by all layers); clip, face = what the encoders
give. No S depends on x: images of one mask ratio share S(noise).
Cost per image: rows * r * (H + rows of F) multiply-adds per feature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from unif2ace.config import FEATURE_EXPERTS, TASKS, UniF2aceConfig
from unif2ace.layout import Layout
from unif2ace.model.linear import ImageLinear
from unif2ace.model.token_moe import router_logits
from unif2ace.ops import RoutingPlan, mix_sequences, route


class MaskRatioEmbedding(nn.Module):
    """Mask ratio in (0, 1] -> one row of width r: sinusoids of 1000 m, then Linear, GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = ImageLinear(width, width)
        self.down = ImageLinear(width, width)

    def forward(self, mask_ratio: Tensor) -> Tensor:
        """[B] float -> [B, 1, r]."""
        half = self.up.in_features // 2
        frequency = 10000.0 ** (-torch.arange(half, device=mask_ratio.device, dtype=torch.float32) / half)
        angle = 1000.0 * mask_ratio.float()[:, None] * frequency
        wave = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.up.weight.dtype)
        return self.down(self.up.gelu(wave))[:, None]


class Resampler(nn.Module):
    """S(F): [B, rows of F, width of F] -> [B, image rows, hidden], by learned queries at a low width."""

    def __init__(self, queries: int, rows: int, width: int, low: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = max(1, low // 64)
        if low % self.heads:
            self.heads = 1
        self.queries = nn.Parameter(torch.empty(queries, low))
        self.memory_norm = nn.LayerNorm(width, eps=eps)
        self.key = ImageLinear(width, low) if rows > 1 else None
        self.value = ImageLinear(width, low)
        self.norm = nn.LayerNorm(low, eps=eps)
        self.out = ImageLinear(low, hidden)

    def forward(self, memory: Tensor) -> Tensor:
        """memory [B, rows, width] -> [B, image rows, hidden]."""
        memory = self.memory_norm(memory)
        attended = self.value(memory)
        if self.key is not None:
            batch, (count, low) = len(memory), self.queries.shape
            split = (batch, -1, self.heads, low // self.heads)
            query = self.queries.expand(batch, count, low).view(split).transpose(1, 2)
            key, value = self.key(memory).view(split).transpose(1, 2), attended.view(split).transpose(1, 2)
            attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.out(self.norm(self.queries + attended))


class SequenceMoE(nn.Module):
    """One layer's sequence-level MoE, residual and layer scale included."""

    def __init__(self, config: UniF2aceConfig) -> None:
        super().__init__()
        moe, hidden, eps = config.sequence_moe, config.hidden_size, config.layer_norm_eps
        experts = [(task, name) for task in TASKS for name in moe.experts(task)]
        self.top_k = moe.top_k
        self.group_bounds = (0, len(moe.understanding_experts), len(experts))
        self.features = {task: moe.feature_names(task) for task in TASKS}
        names = [name for task in TASKS for name in self.features[task]]
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.router = nn.Linear(hidden, len(experts), bias=False)
        self.resamplers = nn.ModuleDict(
            {
                name: Resampler(config.image_rows, *moe.feature_shape(name), moe.resampler_width, hidden, eps)
                for name in names
            }
        )
        self.mix = nn.Parameter(torch.empty(len(names), 2))  # the two scalars of each feature expert
        self.scale = nn.Parameter(torch.empty(()))
        self.copies = [i for i, (_, name) in enumerate(experts) if name == "copy"]
        self.feature_columns = [i for i, (_, name) in enumerate(experts) if name in FEATURE_EXPERTS]

    def resample(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """S(F) for every given feature: name -> [B, image rows, hidden]."""
        return {name: self.resamplers[name](feature) for name, feature in memory.items()}

    def _coefficients(self, plan: RoutingPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale a [images] of x and coefficients c [images, features] of the S_j, from gates and mix scalars."""
        gates = plan.weights.new_zeros(len(plan.weights), self.group_bounds[-1])
        gates = gates.scatter(1, plan.experts.long(), plan.weights)
        keep = self.mix.to(gates.dtype).softmax(1)[:, 0]
        # Column by column: a list as an index would be sent to the device, which waits for it.
        gate = gates.unbind(1)
        featured = [gate[i] for i in self.feature_columns]
        featured = torch.stack(featured, dim=1) if featured else gates[:, :0]
        scale = (featured * keep).sum(1)
        for column in self.copies:
            scale = scale + gate[column]
        return scale.to(dtype), (featured * (1 - keep)).to(dtype)

    def forward(
        self, x: Tensor, layout: Layout, resampled: dict[str, Tensor], noise_starts: Tensor | None = None
    ) -> tuple[Tensor, RoutingPlan]:
        """x [T, H] -> (x with `scale * mixture` added on its image rows, the plan over the batch's images).

        `resampled` holds S(F) of every feature that the tasks present need: [images of its task, image rows, H]. With
        `noise_starts` [images of generation] int32 these share [D, image rows, H] of S(noise): where each begins.
        """
        rows = x if layout.image_rows_are_all else x.index_select(0, layout.image_rows)
        h = self.norm(rows)
        pooled_dtype = torch.promote_types(h.dtype, torch.float32)
        pooled = h.view(-1, layout.image_length, h.shape[1]).mean(1, dtype=pooled_dtype)
        logits = router_logits(pooled, self.router.weight)
        plan = route(logits, self.top_k, token_group=layout.image_group, group_bounds=self.group_bounds)
        scale, coefficients = self._coefficients(plan, h.dtype)

        mixed, image, column = [], 0, 0
        for task, count in zip(TASKS, layout.num_images, strict=True):  # `image_rows` puts images of one task together
            names = self.features[task]
            if count:
                first, last = image * layout.image_length, (image + count) * layout.image_length
                mixed.append(
                    mix_sequences(
                        h[first:last],
                        scale[image : image + count],
                        [resampled[name].flatten(0, 1) for name in names],
                        coefficients[image : image + count, column : column + len(names)],
                        layout.image_offsets[: count + 1],
                        residual=rows[first:last],
                        layer_scale=self.scale,
                        feature_starts=noise_starts if task == "generation" else None,
                    )
                )
            image, column = image + count, column + len(names)
        new = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return (new if layout.image_rows_are_all else x.index_copy(0, layout.image_rows, new)), plan
