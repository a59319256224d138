"""Training of the two small frozen encoders, minutes each on two cores.

* **clip**: images against captions (arXiv 2103.00020). A batch of B faces and one caption of each gives a B x B table
  of similarities; every row and every column is a classification with the diagonal as answer. The text tower exists
  only during training.
* **face**: images of one identity against all others (supervised contrastive, arXiv 2004.11362). A face of the dataset
  is drawn a second time with the same skin, hair, headwear and beard and everything else redrawn; the encoder must put
  the two together and everybody else apart, so it learns what stays.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from unif2ace.codec.pixels import to_float
from unif2ace.data.attributes import NONE
from unif2ace.data.avatars import draw_face, sample_face
from unif2ace.data.loader import FaceTable
from unif2ace.data.text import TextTokenizer
from unif2ace.errors import UserError
from unif2ace.model.features import SmallClipEncoder, SmallFaceEncoder, TowerConfig
from unif2ace.training.loop import FitSettings, fit

# What stays with a person between two pictures; expression, eyewear, clothing and background do not.
IDENTITY = ("skin", "hair", "hair color", "headwear", "headwear color", "facial hair", "facial hair color")
WARMEST = 0.01  # smallest softmax temperature, CLIP's bound: beyond it a few hard pairs take all the gradient


@dataclasses.dataclass
class ClipTraining(FitSettings):
    """Settings of the image-caption training. text_width: channels of the text tower."""

    steps: int = 1200
    batch_size: int = 192
    learning_rate: float = 3e-3
    text_width: int = 128
    widths: tuple[int, ...] = (16, 32, 64, 96)
    width: int = 64


@dataclasses.dataclass
class FaceTraining(FitSettings):
    """Settings of the identity training. identities: how many faces of the table get a second picture."""

    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 3e-3
    identities: int = 8000
    val_identities: int = 500
    temperature: float = 0.1
    widths: tuple[int, ...] = (16, 32, 48, 64)
    width: int = 64


class TextTower(nn.Module):
    """Caption ids [B, L] (padded with -1) -> unit vectors [B, width].

    Two convolutions over three tokens each: enough to tell "red hat, blue shirt" from "blue hat, red shirt". The mean
    and the maximum over the tokens together say both how much and whether at all.
    """

    def __init__(self, vocabulary_size: int, hidden: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, hidden)
        self.layers = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=1) for _ in range(2))
        self.out = nn.Linear(2 * hidden, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        real = (ids >= 0).unsqueeze(1)  # [B, 1, L]
        x = self.embedding(ids.clamp(min=0)).transpose(1, 2) * real
        for layer in self.layers:
            x = (x + F.gelu(layer(x))) * real  # padding stays zero, as a convolution's own border is
        mean = x.sum(2) / real.sum(2).clamp(min=1)
        return F.normalize(self.out(torch.cat([mean, x.masked_fill(~real, -1e4).amax(2)], 1)), dim=-1)


class _Contrast(nn.Module):
    """Both towers and the logarithm of the inverse temperature, as one module to train."""

    def __init__(self, image: SmallClipEncoder, text: TextTower) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        scale = self.log_scale.clamp(max=-float(np.log(WARMEST))).exp()
        return scale * self.image.pooled(images) @ self.text(ids).T


def padded(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Ragged ids as one int64 tensor [B, longest], -1 beyond the end."""
    table = torch.full((len(sequences), max(1, *map(len, sequences))), -1)
    for row, ids in zip(table, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return table


def train_clip(
    settings: ClipTraining, train: FaceTable, val: FaceTable, tokenizer: TextTokenizer, folder: str | Path
) -> tuple[SmallClipEncoder, dict[str, float]]:
    """Train the image tower on pictures and captions; save it into `folder` and return it with its held-out scores.

    Scores: `image_to_text` and `text_to_image`, the share of held-out faces whose own caption (or picture) is the
    nearest among `candidates`. Restartable.
    """
    torch.manual_seed(settings.seed)
    encoder = SmallClipEncoder(TowerConfig(train.images.shape[1], settings.widths, settings.width))
    module = _Contrast(encoder, TextTower(tokenizer.size, settings.text_width, settings.width))
    captions = [[tokenizer.encode(caption.text) for caption in captions] for captions in train.captions]
    held_out = padded([tokenizer.encode(captions[0].text) for captions in val.captions[:512]])

    def losses(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        which = torch.rand(len(rows), generator=generator).tolist()
        texts = [captions[row][int(part * len(captions[row]))] for row, part in zip(rows.tolist(), which, strict=True)]
        logits = module(to_float(train.images[rows].to(settings.device)), padded(texts).to(settings.device))
        answers = torch.arange(len(rows), device=logits.device)
        loss = (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2
        return {"loss": loss, "accuracy": (logits.argmax(1) == answers).float().mean()}

    def evaluate() -> dict[str, float]:
        logits = module(to_float(val.images[: len(held_out)].to(settings.device)), held_out.to(settings.device))
        answers = torch.arange(len(held_out), device=logits.device)
        return {
            "image_to_text": float((logits.argmax(1) == answers).float().mean()),
            "text_to_image": float((logits.argmax(0) == answers).float().mean()),
            "candidates": float(len(held_out)),
        }

    scores = fit("clip", module, losses, settings, len(train), Path(folder), evaluate)
    encoder.eval().save_pretrained(folder)
    return encoder, scores


def second_picture(job: tuple[dict[str, str], int, int, int]) -> np.ndarray:
    """The person of (visible attributes, size, seed, index) with all but the identity redrawn: uint8 [S, S, 3]."""
    seen, size, seed, index = job
    face = sample_face(np.random.default_rng([seed, index]))
    face |= {name: seen[name] for name in IDENTITY if name in seen}
    if face["headwear"] == "hijab":
        face["facial hair"] = NONE  # hidden in the first picture as well
    return np.asarray(draw_face(face, size))


def second_pictures(table: FaceTable, count: int, seed: int) -> torch.Tensor:
    """A second picture of each of the first `count` faces of the table: uint8 [count, S, S, 3], drawn on all cores."""
    jobs = [(table.attributes[index], int(table.images.shape[1]), seed, index) for index in range(count)]
    workers = min(os.cpu_count() or 1, max(1, count // 500))  # a worker costs two seconds to start
    if workers == 1:
        return torch.from_numpy(np.stack([second_picture(job) for job in jobs]))
    # spawn: forking a process that already runs torch's threads can deadlock.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return torch.from_numpy(np.stack(pool.map(second_picture, jobs, chunksize=50)))


def identity_keys(table: FaceTable, count: int) -> torch.Tensor:
    """An integer per face [count], equal where two faces are the same person as far as can be seen."""
    known: dict[tuple, int] = {}
    keys = [tuple(seen.get(name) for name in IDENTITY) for seen in table.attributes[:count]]
    return torch.tensor([known.setdefault(key, len(known)) for key in keys])


def train_face(
    settings: FaceTraining, train: FaceTable, val: FaceTable, folder: str | Path
) -> tuple[SmallFaceEncoder, dict[str, float]]:
    """Train the identity encoder; save it into `folder` and return it with its held-out scores.

    Scores over held-out people with two pictures each: `rank1`, how often the nearest other picture is the same person,
    and `separation`, the chance that a same-person pair is more alike than a pair of strangers (area under the ROC
    curve). Restartable; the second pictures are drawn again at a restart.
    """
    count, held_out = min(settings.identities, len(train)), min(settings.val_identities, len(val))
    if held_out < 2:
        raise UserError(f"face training needs at least 2 held-out faces, got {held_out}")
    torch.manual_seed(settings.seed)
    encoder = SmallFaceEncoder(TowerConfig(train.images.shape[1], settings.widths, settings.width))
    again = second_pictures(train, count, settings.seed + 1)
    again_val = second_pictures(val, held_out, settings.seed + 2)
    keys, keys_val = identity_keys(train, count), identity_keys(val, held_out)

    def losses(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        images = torch.cat([train.images[rows], again[rows]]).to(settings.device)
        vectors = encoder.identity(_jittered(to_float(images), generator))
        return {"loss": supervised_contrastive(vectors, keys[rows].repeat(2).to(vectors.device), settings.temperature)}

    def evaluate() -> dict[str, float]:
        pictures = (val.images[:held_out], again_val)
        first, second = (encoder.identity(to_float(images.to(settings.device))).cpu() for images in pictures)
        similarity, same = first @ second.T, keys_val[:, None] == keys_val[None]
        return {
            "rank1": float(same.gather(1, similarity.argmax(1, keepdim=True)).float().mean()),
            "separation": ranked_above(similarity[same], similarity[~same]),
            "people": float(held_out),
        }

    scores = fit("face", encoder, losses, settings, count, Path(folder), evaluate)
    encoder.eval().save_pretrained(folder)
    return encoder, scores


def supervised_contrastive(vectors: torch.Tensor, keys: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over the rows of -log softmax at the other rows of the same key; unit vectors [B, D], keys [B]."""
    logits = (vectors @ vectors.T / temperature).fill_diagonal_(float("-inf"))
    same = (keys[:, None] == keys[None]).fill_diagonal_(False)
    log_share = F.log_softmax(logits, 1)
    return -(log_share.masked_fill(~same, 0).sum(1) / same.sum(1).clamp(min=1)).mean()


def ranked_above(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """The chance that a random entry of `positive` exceeds one of `negative` (area under the ROC curve)."""
    below = torch.searchsorted(negative.sort().values, positive)
    return float(below.double().mean() / len(negative))


def _jittered(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # Two pixels either way: identity must not hang on where an edge happens to fall.
    top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
    size = images.shape[-1]
    return F.pad(images, (2, 2, 2, 2), mode="replicate")[..., top : top + size, left : left + size]
