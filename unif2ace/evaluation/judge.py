"""The judge: a classifier that reads the attributes off a face, to hold generated faces against their captions.

One convolution tower, one softmax per attribute, trained by `training/judge.py` on drawn faces alone. Attributes that
cannot be seen (label -1) take no part in the score.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from unif2ace.codec.pixels import check_images
from unif2ace.codec.storage import load_weights, read_config, save_network
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.errors import UserError
from unif2ace.model.features import ConvTower

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
        judge = cls(read_config(Path(folder) / "judge.json", JudgeConfig))
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
