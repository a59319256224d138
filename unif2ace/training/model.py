"""Training of the transformer, from the section `[train]` of a recipe: mixed batches, the objective, held-out losses,
sample grids.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from unif2ace.codec import SmallCodec
from unif2ace.data.text import TextTokenizer
from unif2ace.errors import UserError
from unif2ace.files import write_image
from unif2ace.generation.plain import generate_codes
from unif2ace.imaging import face_grid
from unif2ace.model.transformer import UniF2ace
from unif2ace.training.batches import MixedBatches, TokenizedFaces
from unif2ace.training.loop import FitSettings, fit
from unif2ace.training.objective import ObjectiveSettings, training_losses

HELD_OUT_BATCHES = 4
SAMPLES = 8


@dataclasses.dataclass
class ModelTraining(ObjectiveSettings, FitSettings):
    """Settings of one training; `generation` + `understanding` sequences make a step's batch.

    turns: questions asked in a row about one face; caption_share: share of understanding sequences that ask for a
    description instead. The weights of the loss come from `ObjectiveSettings`, the rest from `FitSettings`.
    """

    generation: int = 24
    understanding: int = 8
    turns: int = 4
    caption_share: float = 0.4
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("generation", "understanding", "turns"):
            if getattr(self, name) < 1:
                raise UserError(f"training setting {name} must be at least 1, got {getattr(self, name)}")
        self.batch_size = self.generation + self.understanding
        super().__post_init__()


def train_model(
    settings: ModelTraining,
    model: UniF2ace,
    tokenizer: TextTokenizer,
    codec: SmallCodec,
    train: TokenizedFaces,
    val: TokenizedFaces,
    folder: Path,
) -> dict[str, float]:
    """Train `model` in place; returns the last held-out losses.

    Writes `train.jsonl`, `checkpoint.pt` (resumable to the same losses) and `samples-<number>.png` (faces drawn from
    held-out captions) into `folder`.
    """

    def batches(faces: TokenizedFaces) -> MixedBatches:
        return MixedBatches(
            faces,
            tokenizer,
            model.vocabulary,
            generation=settings.generation,
            turns=settings.turns,
            caption_share=settings.caption_share,
            condition_dropout=settings.condition_dropout,
        )

    train_batches, val_batches = batches(train), batches(val)

    def losses(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = train_batches(rows, np.random.default_rng(generator.initial_seed()))
        reports = training_losses(model, batch, settings)
        return {**reports, "tokens": torch.tensor(float(batch.packed.layout.num_rows))}

    def evaluate() -> dict[str, float]:
        totals: dict[str, float] = {}
        for index in range(HELD_OUT_BATCHES):
            start = index * settings.batch_size % max(1, len(val.table) - settings.batch_size)
            rows = torch.arange(start, start + settings.batch_size)
            reports = training_losses(model, val_batches(rows, np.random.default_rng([settings.seed, index])), settings)
            for name, value in reports.items():
                totals[f"val_{name}"] = totals.get(f"val_{name}", 0.0) + float(value) / HELD_OUT_BATCHES
        number = len(list(folder.glob("samples-*.png"))) + 1  # counts on after a restart
        prompts = [val.table.captions[row][0].text for row in range(SAMPLES)]
        codes = generate_codes(model, [tokenizer.encode(text) for text in prompts], list(range(SAMPLES)))
        write_image(folder / f"samples-{number:03d}.png", face_grid(codec.decode(codes), prompts, columns=4))
        return totals

    return fit("model", model, losses, settings, len(train.table), folder, evaluate)
