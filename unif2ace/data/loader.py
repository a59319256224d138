"""A split of a face dataset in memory, ready for training.

Pictures are decoded once to uint8 (12 kB a face at 64 pixels: 24,000 faces take 300 MB).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from unif2ace.data import schema
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.language import Caption, Question
from unif2ace.errors import UserError


@dataclass
class FaceTable:
    """`images` uint8 [n, S, S, 3]; `labels` int64 [n, len(ATTRIBUTES)] with -1 for unknown; texts as lists per face."""

    images: torch.Tensor
    labels: torch.Tensor
    attributes: list[dict[str, str]]
    captions: list[list[Caption]]
    questions: list[list[Question]]

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def open(cls, folder: str | Path, split: str, limit: int | None = None) -> FaceTable:
        """Read one split (`train`, `val`, `test`) of the Parquet files in `folder`; at most `limit` faces.

        Raises `UserError` for an unknown split, a folder without faces, a corrupt file, or pictures of unequal size.
        """
        if split not in schema.SPLITS:
            raise UserError(f"split: expected one of {', '.join(schema.SPLITS)}, got {split!r}")
        paths = sorted(Path(folder).glob("*.parquet"))
        if not paths:
            raise UserError(
                f"{folder}: expected a folder with Parquet files of faces (make one with `unif2ace data avatars`), "
                "found none"
            )
        rows = schema.read_table(paths, split)
        rows = rows.slice(0, limit) if limit is not None else rows
        if len(rows) == 0:
            raise UserError(f"{folder}: the split {split!r} has no faces")
        images = [
            _decode(row["bytes"], identifier)
            for row, identifier in zip(rows["image"].to_pylist(), rows["id"].to_pylist(), strict=True)
        ]
        sizes = {image.shape for image in images}
        if len(sizes) != 1:
            raise UserError(f"{folder}: expected pictures of one size, got {sorted(sizes)}")
        attributes = [{pair["name"]: pair["value"] for pair in row} for row in rows["attributes"].to_pylist()]
        return cls(
            images=torch.from_numpy(np.stack(images)),
            labels=torch.tensor([_labels(known) for known in attributes]),
            attributes=attributes,
            captions=[[Caption(**item) for item in row] for row in rows["captions"].to_pylist()],
            questions=[[Question(**item) for item in row] for row in rows["questions"].to_pylist()],
        )


def _decode(encoded: bytes, identifier: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(
            f"face {identifier}: expected an encoded picture, got {len(encoded)} bytes that are none"
        ) from error


def _labels(known: dict[str, str]) -> list[int]:
    return [
        attribute.index(known[name]) if known.get(name) in attribute.parts else -1
        for name, attribute in ATTRIBUTES.items()
    ]
