"""Pictures for people: faces side by side with the sentences they were asked for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from unif2ace.codec.pixels import to_uint8

_TEXT_SIZE = 12
_GAP = 8


def to_images(images: torch.Tensor) -> list[Image.Image]:
    """[B, 3, S, S] in [-1, 1] -> PIL images."""
    return [Image.fromarray(image.numpy()) for image in to_uint8(images.detach().cpu())]


def face_grid(
    images: torch.Tensor | Sequence[Image.Image],
    texts: Sequence[str] | None = None,
    *,
    columns: int = 4,
    scale: int = 3,
) -> Image.Image:
    """One picture of all `images`, enlarged `scale` times, each with its text wrapped below it."""
    faces = to_images(images) if isinstance(images, torch.Tensor) else list(images)
    size = faces[0].width * scale
    font = ImageFont.load_default(_TEXT_SIZE)
    width = max(12, int(size / (_TEXT_SIZE * 0.52)))  # characters that fit below a face
    lines = [textwrap.wrap(text, width) for text in texts] if texts is not None else [[] for _ in faces]
    text_height = max(map(len, lines)) * (_TEXT_SIZE + 3) + (_GAP if texts is not None else 0)
    columns = min(columns, len(faces))
    rows = -(-len(faces) // columns)
    canvas = Image.new("RGB", (columns * (size + _GAP) + _GAP, rows * (size + text_height + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (face, wrapped) in enumerate(zip(faces, lines, strict=True)):
        left = _GAP + index % columns * (size + _GAP)
        top = _GAP + index // columns * (size + text_height + _GAP)
        canvas.paste(face.resize((size, size), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(wrapped):
            draw.text((left, top + size + 4 + number * (_TEXT_SIZE + 3)), line, fill="black", font=font)
    return canvas
