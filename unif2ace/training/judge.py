"""Training of the judge, from the section `[judge]` of a recipe.

It sees drawn faces alone, never a codec's or a model's output, so no model is judged by a network that has learned to
forgive its mistakes. The pictures are lightly degraded (blur, noise, blotches of colour, a pixel of shift): a generated
face is never as crisp as a drawn one, and the judge should read what is there instead of answering at random off its
training distribution. Attributes that cannot be seen (label -1) take no part in the loss.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch.nn import functional as F

from unif2ace.codec.pixels import to_float
from unif2ace.data.loader import FaceTable
from unif2ace.evaluation.judge import UNKNOWN, Judge, JudgeConfig, agreement
from unif2ace.training.loop import FitSettings, fit


@dataclasses.dataclass
class JudgeTraining(FitSettings):
    """Settings of the judge's training. degrade: 0 trains on clean pictures, 1 is the full strength of `degraded`."""

    steps: int = 2500
    batch_size: int = 64
    learning_rate: float = 3e-3
    degrade: float = 1.0
    dropout: float = 0.1


def train_judge(
    settings: JudgeTraining, train: FaceTable, val: FaceTable, folder: str | Path
) -> tuple[Judge, dict[str, float]]:
    """Train a judge on drawn faces; save it into `folder` and return it with its held-out accuracy.

    Scores: `macro` and one accuracy per attribute on clean held-out faces, `macro_degraded` on degraded ones.
    Restartable.
    """
    torch.manual_seed(settings.seed)
    judge = Judge(JudgeConfig(image_size=int(train.images.shape[1])))

    def losses(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        images = degraded(to_float(train.images[rows]), settings.degrade, generator).to(settings.device)
        labels = train.labels[rows].to(settings.device)
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # dropout repeats after a restart
        # sum / count per attribute, not "mean": an attribute nobody shows in this batch gives 0, not 0 / 0.
        terms = [
            F.cross_entropy(logits, labels[:, i], ignore_index=UNKNOWN, reduction="sum")
            / (labels[:, i] != UNKNOWN).sum().clamp(min=1)
            for i, logits in enumerate(judge(images, settings.dropout))
        ]
        return {"loss": torch.stack(terms).mean()}

    def evaluate() -> dict[str, float]:
        clean = to_float(val.images)
        worse = degraded(clean, settings.degrade, torch.Generator().manual_seed(settings.seed))
        scores, scores_worse = (
            agreement(judge.predict(images.to(settings.device)), val.labels, judge.names) for images in (clean, worse)
        )
        return {"macro": scores.pop("macro"), "macro_degraded": scores_worse["macro"], **scores}

    scores = fit("judge", judge, losses, settings, len(train), Path(folder), evaluate)
    judge.eval().save_pretrained(folder)
    return judge, scores


def degraded(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Images [B, 3, S, S] with a pixel of shift, blur, noise and blotches, each of random strength per image.

    Half of the images are left nearly untouched, so that the judge stays exact on clean ones.
    """
    count, size = len(images), images.shape[-1]

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    amount = strength * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
    shifted = F.pad(images, (1, 1, 1, 1), mode="replicate")[..., 1 + dy : size + 1 + dy, 1 + dx : size + 1 + dx]
    # One blurred copy for the batch, mixed in by a random share: the same family of blurs as one kernel per image.
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    blurred = F.conv2d(
        F.pad(shifted, (2, 2, 2, 2), mode="replicate"), torch.outer(kernel, kernel).expand(3, 1, 5, 5), groups=3
    )
    mixed = torch.lerp(shifted, blurred, amount * uniform(0, 1))
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.1)
    coarse = torch.randn(count, 3, size // 8, size // 8, generator=generator)
    blotches = F.interpolate(coarse, size=size, mode="bilinear")
    return (mixed + amount * (noise + blotches * uniform(0, 0.08))).clamp(-1, 1)
