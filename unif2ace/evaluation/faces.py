"""Faces no model was trained on, drawn when they are needed.

The split of a drawn face is a hash of what can be seen (`data.avatars.split_of`), whatever dataset it comes from. So a
face of the test split is held out from every model trained by this repository's recipes, and drawing some anew gives
the same test as reading them from a dataset.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from unif2ace.data import schema
from unif2ace.data.avatars import make_row, sample_face, split_of
from unif2ace.data.loader import FaceTable
from unif2ace.errors import UserError

HELD_OUT_SEED = 20_250  # any but the seeds of the recipes: other faces than their datasets' own test split


def held_out_faces(count: int, *, size: int = 64, seed: int = HELD_OUT_SEED, split: str = "test") -> FaceTable:
    """The first `count` faces of `split` in the endless dataset `seed`, as a table; a function of its arguments alone.

    Attributes are sampled for every index (50 us) but only faces of the split (one in twenty) are drawn (8 ms).
    """
    if count < 1:
        raise UserError(f"faces: expected at least 1, got {count}")
    rows, index = [], 0
    while len(rows) < count:
        if split_of(sample_face(np.random.default_rng([seed, index]))) == split:
            rows.append(make_row(seed, index, size))
        index += 1
    with tempfile.TemporaryDirectory() as folder:
        schema.write_table(rows, Path(folder) / "faces.parquet")
        return FaceTable.open(folder, split)
