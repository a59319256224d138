"""A small image codec: a convolutional auto-encoder with finite scalar quantisation (FSQ).

    images [B, 3, 64, 64] --encoder--> z [B, 5, 8, 8] --FSQ--> codes [B, 64] --decoder--> images

FSQ (arXiv 2309.15505) has no learned codebook. Each of the `len(levels)` channels of z is squashed by tanh and rounded
to one of `levels[i]` values; the tuple of rounded values, read as a mixed-radix number, *is* the code. Codebook size =
product of the levels: (4, 4, 4, 4, 4) -> 1024. Rounding passes the gradient straight through.

Three choices carry the quality at under a million parameters:

* Space-to-depth stem, pixel-shuffle upsampling. Most arithmetic happens at 16x16 and 8x8, where a channel is cheap.
* BatchNorm without affine in front of FSQ. It pins each channel of z to zero mean and unit variance over the data, so
  all levels stay in use: FSQ cannot collapse, whatever the learning rate does. In evaluation it is a constant scale.
* A learned position map beside the latent grid in both halves. Faces are aligned, so a position knows what it usually
  holds (an eye, a shoulder); a code then only has to say *which* eye.

The 3x3 kernels at 8x8 are few on purpose, fewest in the encoder: a code should describe mainly its own 8x8 pixels and
their neighbours, which is what lets a transformer predict it from context and an in-painter replace it alone.

On CPUs `encode` and `decode` give an image the same bits whatever it is read or drawn with (`codec/invariant.py`).

Cost per image at the default width: 0.08 GFLOP to encode, 0.10 to decode; 0.77 M parameters.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ

from unif2ace.codec.invariant import Conv2d, GroupNorm, gelu, in_parts
from unif2ace.codec.pixels import check_images
from unif2ace.codec.storage import load_weights, read_config, save_network
from unif2ace.errors import UserError

DOWNSAMPLING = 8  # three halvings: 64 px -> 8x8 tokens


@dataclasses.dataclass(frozen=True)
class SmallCodecConfig:
    """Shape of a `SmallCodec`.

    image_size: side in pixels, a multiple of 8.
    levels: FSQ levels per latent channel, each at least 3.
    widths: channels at 1/2, 1/4 and 1/8 of the resolution.
    encoder_blocks, decoder_blocks: residual blocks at 1/2, 1/4 and 1/8 of the resolution.
    """

    image_size: int = 64
    levels: tuple[int, ...] = (4, 4, 4, 4, 4)
    widths: tuple[int, int, int] = (32, 64, 128)
    encoder_blocks: tuple[int, int, int] = (0, 2, 1)
    decoder_blocks: tuple[int, int, int] = (0, 2, 2)

    def __post_init__(self) -> None:
        for name in ("levels", "widths", "encoder_blocks", "decoder_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON and TOML give lists
        if self.image_size < DOWNSAMPLING or self.image_size % DOWNSAMPLING:
            raise UserError(f"codec image_size must be a positive multiple of {DOWNSAMPLING}, got {self.image_size}")
        if not self.levels or min(self.levels) < 3:
            raise UserError(f"codec levels must be at least 3 each, got {self.levels}")
        if len(self.widths) != 3 or min(self.widths) < 8 or any(width % 8 for width in self.widths):
            raise UserError(f"codec widths must be three positive multiples of 8, got {self.widths}")
        for name in ("encoder_blocks", "decoder_blocks"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < 0:
                raise UserError(f"codec {name} must be three counts of 0 or more, got {getattr(self, name)}")


class ResidualBlock(nn.Module):
    """x + Conv1x1(GELU(Conv3x3(GroupNorm(x)))): one spatial kernel per block keeps the receptive field small."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(8, width)
        self.spatial = Conv2d(width, width, 3, padding=1)
        self.mix = Conv2d(width, width, 1)
        nn.init.zeros_(self.mix.weight)  # every block starts as the identity: a deep stack trains from the first step
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(gelu(self.spatial(self.norm(x))))


def _stage(width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))


class Encoder(nn.Module):
    """images [B, 3, S, S] -> latent [B, len(levels), S/8, S/8], before quantisation."""

    def __init__(self, config: SmallCodecConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.widths
        grid = config.image_size // DOWNSAMPLING
        self.stem = Conv2d(12, fine, 3, padding=1)
        self.fine = _stage(fine, config.encoder_blocks[0])
        self.to_middle = Conv2d(4 * fine, middle, 1)
        self.middle = _stage(middle, config.encoder_blocks[1])
        self.to_coarse = Conv2d(4 * middle, coarse, 1)
        self.position = nn.Parameter(0.02 * torch.randn(1, coarse, grid, grid))
        self.coarse = _stage(coarse, config.encoder_blocks[2])
        self.out = Conv2d(coarse, len(config.levels), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.fine(gelu(self.stem(F.pixel_unshuffle(images, 2))))
        x = self.middle(self.to_middle(F.pixel_unshuffle(x, 2)))
        x = self.coarse(self.to_coarse(F.pixel_unshuffle(x, 2)) + self.position)
        return self.out(x)


class Decoder(nn.Module):
    """quantised latent [B, len(levels), S/8, S/8] -> images [B, 3, S, S], not clamped."""

    def __init__(self, config: SmallCodecConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.widths
        grid = config.image_size // DOWNSAMPLING
        self.stem = Conv2d(len(config.levels), coarse, 3, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(1, coarse, grid, grid))
        self.coarse = _stage(coarse, config.decoder_blocks[2])
        self.to_middle = Conv2d(coarse, 4 * middle, 1)
        self.middle = _stage(middle, config.decoder_blocks[1])
        self.to_fine = Conv2d(middle, 4 * fine, 1)
        self.fine = _stage(fine, config.decoder_blocks[0])
        self.out = Conv2d(fine, 12, 3, padding=1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = self.coarse(self.stem(latent) + self.position)
        x = self.middle(F.pixel_shuffle(self.to_middle(x), 2))
        x = self.fine(gelu(F.pixel_shuffle(self.to_fine(x), 2)))
        return F.pixel_shuffle(self.out(x), 2)


class SmallCodec(nn.Module):
    """Images to a square grid of codes (row major) and back. See the module's docstring for the design."""

    def __init__(self, config: SmallCodecConfig | None = None) -> None:
        super().__init__()
        self.config = config or SmallCodecConfig()
        channels = len(self.config.levels)
        self.encoder = Encoder(self.config)
        self.normalise = nn.BatchNorm2d(channels, affine=False)
        # On a unit Gaussian FSQ's 4 levels take 13, 24, 31 and 32 %: all in use, so no gain needs to be learned.
        self.quantise = FSQ(list(self.config.levels))
        self.decoder = Decoder(self.config)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.config.image_size // DOWNSAMPLING

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def codebook_size(self) -> int:
        return math.prod(self.config.levels)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, 3, S, S] -> (reconstruction [B, 3, S, S], codes [B, N] int64), differentiable in the first."""
        quantised, codes = self.quantise(self.normalise(self.encoder(images)))
        return self.decoder(quantised), codes.flatten(1).long()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] floating point in [-1, 1] -> codes [B, N] int64 in [0, codebook_size).

        Raises `UserError` when the images have another shape or an integer dtype. Call in evaluation mode: in training
        mode the normalisation uses the batch's own statistics.
        """
        check_images("codec", images, self.image_size)
        if not len(images):  # pixel_unshuffle hands an empty batch back unchanged
            return torch.empty(0, self.num_tokens, dtype=torch.long, device=images.device)
        _, codes = self.quantise(self.normalise(in_parts(self.encoder, images)))
        return codes.flatten(1).long()

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes [B, N] integers in [0, codebook_size) -> images [B, 3, S, S] in [-1, 1].

        Raises `UserError` for another shape or dtype and, on the CPU, for codes out of range (on a GPU that check
        would wait for the device).
        """
        if codes.ndim != 2 or codes.shape[1] != self.num_tokens or codes.is_floating_point():
            raise UserError(
                f"codec: codes must be integers [B, {self.num_tokens}], got {codes.dtype} {list(codes.shape)}"
            )
        if not len(codes):
            return torch.empty(0, 3, self.image_size, self.image_size, device=codes.device)
        if codes.device.type == "cpu":
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= self.codebook_size:
                raise UserError(f"codec: codes must lie in 0..{self.codebook_size - 1}, got {low}..{high}")
        latent = self.quantise.indices_to_codes(codes.unflatten(1, (self.grid, self.grid)))
        return in_parts(self.decoder, latent.to(self.decoder.out.weight.dtype)).clamp(-1, 1)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
        """Write `codec.safetensors` and `codec.json` with floating point stored as `dtype` (None: as it is)."""
        save_network(folder, "codec", self, self.config, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SmallCodec:
        """Read a codec written by `save_pretrained`, in evaluation mode; `UserError` when files are missing or bad."""
        codec = cls(read_config(Path(folder) / "codec.json", SmallCodecConfig))
        load_weights(codec, Path(folder) / "codec.safetensors")
        return codec.eval()
