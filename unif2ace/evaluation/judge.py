"""The judge: a classifier that reads the attributes off a face, to hold generated faces against their captions.

One convolution tower, one softmax per attribute. It is trained on drawn faces alone, never on a codec's or a model's
output, so no model is judged by a network that has learned to forgive its mistakes. Training pictures are lightly
degraded (blur, noise, blotches of colour, a pixel of shift): a generated face is never as crisp as a drawn one, and the
judge should read what is there instead of answering at random off its training distribution.

Attributes that cannot be seen (label -1) take no part in the loss or the score.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from unif2ace.codec.pixels import to_float
from unif2ace.codec.storage import load_weights, read_config, save_network
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.loader import FaceTable
from unif2ace.errors import UserError
from unif2ace.model.features import ConvTower, check_images
from unif2ace.training.fit import FitSettings, fit

UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Image side, channels at 1/2, 1/4, 1/8 and 1/16, channels per cell that the heads read, classes per attribute."""

    image_size: int = 64
    widths: tuple[int, ...] = (24, 48, 80, 112)
    cell_width: int = 32
    classes: dict[str, int] = dataclasses.field(
        default_factory=lambda: {name: len(attribute.values) for name, attribute in ATTRIBUTES.items()}
    )


@dataclasses.dataclass
class JudgeTraining(FitSettings):
    """Settings of the judge's training. degrade: 0 trains on clean pictures, 1 is the full strength of `degraded`."""

    steps: int = 2500
    batch_size: int = 64
    learning_rate: float = 3e-3
    degrade: float = 1.0
    dropout: float = 0.1


class Judge(nn.Module):
    """Images to one class per attribute."""

    def __init__(self, config: JudgeConfig | None = None) -> None:
        super().__init__()
        self.config = config or JudgeConfig()
        cells = (self.config.image_size // 16) ** 2
        self.tower = ConvTower(tuple(self.config.widths))
        self.cell = nn.Conv2d(self.config.widths[-1], self.config.cell_width, 1)
        self.heads = nn.Linear(cells * self.config.cell_width, sum(self.config.classes.values()))

    @property
    def names(self) -> list[str]:
        """Attribute names in the order of the columns of `predict`."""
        return list(self.config.classes)

    def forward(self, images: torch.Tensor, dropout: float = 0.0) -> list[torch.Tensor]:
        """images [B, 3, S, S] in [-1, 1] -> logits [B, classes] of each attribute, in the order of `names`."""
        features = F.gelu(self.cell(self.tower(images))).flatten(1)
        logits = self.heads(F.dropout(features, dropout, self.training))
        return list(logits.split(list(self.config.classes.values()), dim=1))

    @torch.no_grad()
    def predict(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """images [B, 3, S, S] floating point in [-1, 1] -> class indices [B, num_attributes] int64, columns as `names`.

        Every attribute gets an answer, also one that cannot be seen: compare only where a label is known (`agreement`).
        Raises `UserError` for another shape or dtype.
        """
        check_images("judge", images, self.config.image_size)
        if not len(images):
            return torch.empty(0, len(self.names), dtype=torch.long)
        answers = [torch.stack([x.argmax(1) for x in self(part)], 1) for part in images.split(batch_size)]
        return torch.cat(answers).cpu()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
        """Write `judge.safetensors` and `judge.json` with floating point stored as `dtype` (None: as it is)."""
        save_network(folder, "judge", self, self.config, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Judge:
        """Read what `save_pretrained` wrote, in evaluation mode; `UserError` when files are missing or bad."""
        judge = cls(JudgeConfig(**read_config(Path(folder) / "judge.json", JudgeConfig)))
        load_weights(judge, Path(folder) / "judge.safetensors")
        return judge.eval()


def agreement(predicted: torch.Tensor, labels: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Share of known labels that are met, per attribute name, plus `macro`, their mean.

    predicted, labels: int64 [B, num_attributes], label -1 = unknown. An attribute without a known label is left out.
    """
    if predicted.shape != labels.shape or labels.ndim != 2 or labels.shape[1] != len(names):
        raise UserError(
            f"agreement: expected two tables [B, {len(names)}], got {list(predicted.shape)} and {list(labels.shape)}"
        )
    known, right = labels != UNKNOWN, predicted == labels
    scores = {name: float(right[known[:, i], i].float().mean()) for i, name in enumerate(names) if known[:, i].any()}
    return {**scores, "macro": sum(scores.values()) / max(1, len(scores))}


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
