"""What a step minimises: next-token prediction + D3Diff + balance terms, each reported apart.

    loss = w_ntp * NTP + w_gen * (mask_nll + alpha * score) + balance + z

`mask_nll` is the mean over masked tokens of -log p(x0 | xt), `score` the score-entropy term (see
`ops/diffusion_loss.py`), NTP the mean over answer tokens of the cross-entropy over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unif2ace.model.token_moe import balance_loss, z_loss
from unif2ace.model.transformer import UniF2ace
from unif2ace.ops import d3diff_loss, linear_loss
from unif2ace.training.batches import MixedBatch
from unif2ace.vocabulary import Vocabulary


@dataclass
class ObjectiveSettings:
    """Weights of the terms; `alpha`, `score_weight` and `score_columns` are D3Diff's (alpha = 0: plain masked
    generation).
    """

    alpha: float = 0.01
    score_weight: str = "sigma"
    score_columns: str = "code"
    ntp_weight: float = 1.0
    generation_weight: float = 1.0
    balance_weight: float = 0.01
    z_weight: float = 0.0


def training_losses(model: UniF2ace, batch: MixedBatch, settings: ObjectiveSettings) -> dict[str, Tensor]:
    """Named scalars for one mixed batch; "loss" is differentiable, the others are detached reports."""
    output = model(batch.packed, mask_ratio=batch.mask_ratio, features=batch.features)
    weight, bias = model.head.weight, model.head.bias
    vocabulary = Vocabulary.of(model.config)
    diffusion = d3diff_loss(
        output.hidden[batch.code_rows],
        weight,
        bias,
        batch.code_targets,
        batch.code_mask_ratio,
        alpha=settings.alpha,
        num_image_tokens=model.config.num_image_tokens,
        score_weight=settings.score_weight,
        score_columns=settings.score_columns,
        code_columns=(vocabulary.code_columns.start, vocabulary.code_columns.stop),
    )
    answers = len(batch.answer_rows)
    uniform = torch.full((answers,), 1.0 / max(answers, 1), device=output.hidden.device)
    ntp, _ = linear_loss(output.hidden[batch.answer_rows], weight, bias, batch.answer_targets, uniform)
    loss = settings.ntp_weight * ntp + settings.generation_weight * diffusion.total
    reports = {"mask_nll": diffusion.mask_nll, "score": diffusion.score, "ntp": ntp.detach()}
    if output.plans:
        balance = balance_loss(output.plans, model.layers[0].ffn.group_bounds)
        loss = loss + settings.balance_weight * balance
        reports["balance"] = balance.detach()
        if settings.z_weight:
            loss = loss + settings.z_weight * z_loss(output.plans)
    return {"loss": loss, **reports}
