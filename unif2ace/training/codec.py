"""Training of the small codec on faces, from the section `[codec]` of a recipe.

Loss per pixel: `w (l1 |e| + mse e^2)`, e the error in [-1, 1] units. L1 keeps edges sharp and lets a flat area be
exactly flat; the squared term is what PSNR measures and stops large errors from being bought with many small gains. The
weight w rises from 1 at the border to `1 + face_weight` in the middle of the face: brows, eyes and mouth cover few
pixels but carry most of what a caption says.

No term pulls the codes apart: FSQ behind a batch normalisation uses its codebook without help (see `codec/small.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from unif2ace.codec.pixels import psnr, to_float
from unif2ace.codec.small import SmallCodec, SmallCodecConfig
from unif2ace.training.loop import FitSettings, fit


@dataclasses.dataclass
class CodecTraining(FitSettings):
    """Settings of one codec training; the defaults give the bundled codec."""

    image_size: int = 64
    levels: tuple[int, ...] = (4, 4, 4, 4, 4)
    widths: tuple[int, int, int] = (32, 64, 128)
    encoder_blocks: tuple[int, int, int] = (0, 2, 1)
    decoder_blocks: tuple[int, int, int] = (0, 2, 2)
    l1_weight: float = 1.0
    mse_weight: float = 3.0
    face_weight: float = 2.0
    steps: int = 5000
    batch_size: int = 32
    learning_rate: float = 4e-3

    def codec_config(self) -> SmallCodecConfig:
        names = [field.name for field in dataclasses.fields(SmallCodecConfig)]
        return SmallCodecConfig(**{name: getattr(self, name) for name in names})


def face_window(size: int, weight: float) -> torch.Tensor:
    """Pixel weights [size, size]: 1 + weight * Gaussian around the middle of an aligned face, scaled to mean 1."""
    x = torch.linspace(0, 1, size)
    bump = torch.exp(-(((x[None] - 0.5) / 0.22) ** 2) - ((x[:, None] - 0.52) / 0.25) ** 2)
    window = 1 + weight * bump
    return window / window.mean()


def train_codec(
    settings: CodecTraining, train_images: torch.Tensor, val_images: torch.Tensor, folder: str | Path
) -> tuple[SmallCodec, dict[str, float]]:
    """Train a codec on uint8 images [n, S, S, 3] and save it into `folder`; return it with its held-out scores.

    Scores: `psnr` in dB over all held-out pixels, `psnr_face` over the middle window, `codebook_use` the share of codes
    that occur in the held-out set. Restartable: run again with the same folder.
    """
    folder = Path(folder)
    torch.manual_seed(settings.seed)
    # Channels last is how the pictures arrive and what oneDNN's convolutions read without a reordering copy.
    codec = SmallCodec(settings.codec_config()).to(memory_format=torch.channels_last)
    window = face_window(settings.image_size, settings.face_weight).to(settings.device)

    def losses(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        images = to_float(train_images[rows].to(settings.device))
        error = codec(images)[0] - images
        l1, mse = (window * error.abs()).mean(), (window * error.square()).mean()
        return {"loss": settings.l1_weight * l1 + settings.mse_weight * mse, "l1": l1, "mse": mse}

    def evaluate() -> dict[str, float]:
        return codec_scores(codec, val_images)

    scores = fit("codec", codec, losses, settings, len(train_images), folder, evaluate)
    codec.eval().save_pretrained(folder)
    return codec, scores


@torch.no_grad()
def codec_scores(codec: SmallCodec, images: torch.Tensor, batch_size: int = 64) -> dict[str, float]:
    """Held-out quality of a codec on uint8 images [n, S, S, 3]."""
    device = next(codec.parameters()).device
    used = torch.zeros(codec.codebook_size, dtype=torch.long)
    rebuilt, originals = [], []
    for part in images.split(batch_size):
        originals.append(to_float(part))
        codes = codec.encode(originals[-1].to(device))
        used += torch.bincount(codes.flatten().cpu(), minlength=codec.codebook_size)
        rebuilt.append(codec.decode(codes).cpu())
    rebuilt, originals = torch.cat(rebuilt), torch.cat(originals)
    size = codec.image_size
    face = (..., slice(size // 4, size * 3 // 4), slice(size // 4, size * 3 // 4))
    share = used[used > 0] / used.sum()
    return {
        "psnr": psnr(rebuilt, originals),
        "psnr_face": psnr(rebuilt[face], originals[face]),
        "codebook_use": float((used > 0).float().mean()),
        "perplexity": float(torch.exp(-(share * share.log()).sum())),
    }
