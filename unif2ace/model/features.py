"""Feature encoders: what the CLIP and face experts of the sequence-level mixture look at.

An encoder is frozen and sees pixels, not codes: images [B, 3, S, S] in [-1, 1] -> rows [B, num_rows, width].

| encoder | name | rows x width | needs |
|---|---|---|---|
| `SmallClipEncoder` | clip | 16 x 64 | nothing: trained here on faces and their captions |
| `SmallFaceEncoder` | face | 1 x 64 | nothing: trained here on pairs of the same identity |
| `ClipEncoder` | clip | 576 x 1024 (ViT-L/14-336) | `transformers` and a model folder |
| `AntelopeEncoder` | face | 1 x 512 (AntelopeV2) | `onnxruntime` and the recognition model's `.onnx` file |

The two small ones share one tower of convolutions: space-to-depth halvings from 64 px to 4x4 cells with one residual
block at each stage, 0.02 GFLOP per image. On CPUs an image's rows have the same bits whatever it is read with
(`codec/invariant.py`; the identity row by the native back end).
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F

from unif2ace.codec.invariant import Conv2d, gelu, in_parts
from unif2ace.codec.pixels import check_images
from unif2ace.codec.small import ResidualBlock
from unif2ace.codec.storage import load_weights, read_config, save_network
from unif2ace.errors import UserError
from unif2ace.model.linear import Linear

# Channel statistics of CLIP's training images, in the 0..1 range (openai/CLIP, preprocessing).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@runtime_checkable
class FeatureEncoder(Protocol):
    """Images to feature rows. `name` is "clip" or "face"; `image_size` is the side that needs no resizing."""

    name: str
    num_rows: int
    width: int
    image_size: int

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] floating point in [-1, 1] -> [B, num_rows, width]."""
        ...


class ConvTower(nn.Module):
    """images [B, 3, S, S] -> [B, widths[3], S/16, S/16]; widths are the channels at 1/2, 1/4, 1/8 and 1/16."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = Conv2d(12, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Conv2d(4 * a, b, 1) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(ResidualBlock(width) for width in widths[1:])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = gelu(self.stem(F.pixel_unshuffle(images, 2)))
        for down, block in zip(self.down, self.blocks, strict=True):
            x = block(down(F.pixel_unshuffle(x, 2)))
        return x


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Shape of a network on a `ConvTower`: image side (a multiple of 16), channels per stage, width of the result."""

    image_size: int = 64
    widths: tuple[int, ...] = (16, 32, 64, 96)
    width: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON gives lists
        if self.image_size < 16 or self.image_size % 16:
            raise UserError(f"image_size must be a positive multiple of 16, got {self.image_size}")
        if len(self.widths) != 4 or any(width < 8 or width % 8 for width in self.widths):
            raise UserError(f"widths must be four positive multiples of 8, got {self.widths}")

    @property
    def cells(self) -> int:
        return (self.image_size // 16) ** 2


class _SmallEncoder(nn.Module):
    """What the two small encoders share: the tower, loading, saving, the check of images."""

    name: str
    default_config = TowerConfig()

    def __init__(self, config: TowerConfig | None = None) -> None:
        super().__init__()
        self.config = config or self.default_config
        self.tower = ConvTower(self.config.widths)
        self.image_size = self.config.image_size
        self.width = self.config.width

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] floating point in [-1, 1], S = image_size -> [B, num_rows, width].

        Raises `UserError` for another shape or dtype.
        """
        check_images(f"{self.name} encoder", images, self.image_size)
        if not len(images):  # pixel_unshuffle hands an empty batch back unchanged
            return images.new_zeros(0, self.num_rows, self.width)
        return in_parts(self.rows, images)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
        """Write `<name>.safetensors` and `<name>.json` with floating point stored as `dtype` (None: as it is)."""
        save_network(folder, self.name, self, self.config, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path):
        """Read what `save_pretrained` wrote, in evaluation mode; `UserError` when files are missing or bad."""
        encoder = cls(read_config(Path(folder) / f"{cls.name}.json", TowerConfig))
        load_weights(encoder, Path(folder) / f"{cls.name}.safetensors")
        return encoder.eval()


class SmallClipEncoder(_SmallEncoder):
    """A row per cell of 16x16 pixels, trained so that the pooled rows match the caption (`training/encoders.py`)."""

    name = "clip"

    def __init__(self, config: TowerConfig | None = None) -> None:
        super().__init__(config)
        self.num_rows = self.config.cells
        self.project = Conv2d(self.config.widths[-1], self.width, 1)
        self.norm = nn.LayerNorm(self.width)
        # Every cell has its own weights into the pooled vector: faces are aligned, so a cell stands for a facial part.
        self.pool = nn.Linear(self.num_rows * self.width, self.width)

    def rows(self, images: torch.Tensor) -> torch.Tensor:
        """[B, num_rows, width], cells row major, each normalised."""
        return self.norm(self.project(self.tower(images)).flatten(2).transpose(1, 2))

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """One unit vector per image [B, width], comparable with a caption's."""
        return F.normalize(self.pool(self.rows(images).flatten(1)), dim=-1)


class SmallFaceEncoder(_SmallEncoder):
    """One row per image: who it is, whatever the expression, clothing and background."""

    name = "face"
    default_config = TowerConfig(widths=(16, 32, 48, 64))

    def __init__(self, config: TowerConfig | None = None) -> None:
        super().__init__(config)
        self.num_rows = 1
        self.project = Linear(self.config.widths[-1] * self.config.cells, self.width)

    def identity(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, width]; the dot product of two is their similarity."""
        return F.normalize(self.project(self.tower(images).flatten(1)), dim=-1)

    def rows(self, images: torch.Tensor) -> torch.Tensor:
        # Unit length spreads over `width` entries; this scale gives each entry unit variance, as LayerNorm would.
        return self.identity(images).unsqueeze(1) * self.width**0.5


class ClipEncoder(nn.Module):
    """Patch features of a CLIP vision tower through `transformers`: the published model's "clip" features.

    path: a model folder (or hub id), e.g. of openai/clip-vit-large-patch14-336. The features are the hidden states
    before the last layer, without the class token: the last layer is trained through the class token alone. Images of
    another size are resized (bicubic). Raises `UserError` when `transformers` is not installed or the folder holds no
    CLIP model.
    """

    name = "clip"

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        try:
            from transformers import CLIPVisionModel
        except ImportError as error:
            raise UserError("ClipEncoder needs the package transformers: pip install 'unif2ace[clip]'") from error
        try:
            self.model = CLIPVisionModel.from_pretrained(str(path)).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"ClipEncoder: expected a CLIP model at {path}, got none ({reason})") from error
        config = self.model.config
        self.image_size, self.width = config.image_size, config.hidden_size
        self.num_rows = (config.image_size // config.patch_size) ** 2
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] floating point in [-1, 1] -> [B, num_rows, width]."""
        check_images("ClipEncoder", images)
        if not len(images):  # which the library does not take
            return images.new_zeros(0, self.num_rows, self.width)
        pixels = ((resized(images, self.image_size, "bicubic") + 1) / 2 - self.mean) / self.std
        # One at a time on CPUs: what it is made of promises no image equal bits in other company.
        return in_parts(lambda part: self.model(part, output_hidden_states=True).hidden_states[-2][:, 1:], pixels, 1)


class AntelopeEncoder:
    """AntelopeV2 identity embeddings through `onnxruntime`: the published model's "face" features.

    path: the recognition model (`glintr100.onnx`): RGB [B, 3, 112, 112] in [-1, 1] -> [B, 512]. Images of another size
    are resized (bilinear); faces are expected aligned. The embedding is scaled to unit length. Raises `UserError` when
    `onnxruntime` is not installed, the file is missing, or it is no such model.
    """

    name = "face"
    num_rows = 1

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise UserError(f"AntelopeEncoder: expected the recognition model's .onnx file at {path}, found none")
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("AntelopeEncoder needs the package onnxruntime: pip install 'unif2ace[face]'") from error
        providers = onnxruntime.get_available_providers()
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=providers)
        except (RuntimeError, ValueError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf) as error:
            raise UserError(f"AntelopeEncoder: expected an ONNX model at {path}, got another file ({error})") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = list(inputs[0].shape)
        if len(shape) != 4 or shape[1] != 3 or len(outputs[0].shape) != 2 or not isinstance(outputs[0].shape[1], int):
            raise UserError(
                f"AntelopeEncoder: expected a model from [B, 3, S, S] to [B, width], got {shape} to {outputs[0].shape}"
            )
        self.input_name, self.width = inputs[0].name, int(outputs[0].shape[1])
        self.image_size = shape[2] if isinstance(shape[2], int) else 112
        self.fixed_batch = shape[0] if isinstance(shape[0], int) else None

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, S, S] floating point in [-1, 1] -> [B, 1, width], device and dtype as the images have."""
        check_images("AntelopeEncoder", images)
        pixels = resized(images.detach().float().cpu(), self.image_size, "bilinear")
        if not len(pixels):
            return images.new_zeros(0, 1, self.width)
        # Exported with a fixed batch size (the published file: 1), the model takes one chunk at a time; else, for equal
        # bits in any company, CPUs take one image.
        chunk = self.fixed_batch or (1 if images.device.type == "cpu" else len(pixels))
        padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, -len(pixels) % chunk))
        parts = [torch.from_numpy(self.session.run(None, {self.input_name: x.numpy()})[0]) for x in padded.split(chunk)]
        return F.normalize(torch.cat(parts)[: len(pixels)], dim=-1).unsqueeze(1).to(images)


def resized(images: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Images [B, 3, S, S] at side `size`, low-pass filtered when they shrink."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode=mode, antialias=True, align_corners=False).clamp(-1, 1)
