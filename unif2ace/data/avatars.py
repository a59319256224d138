"""Labelled cartoon faces, drawn on the spot: the bundled model's dataset.

`python_avatars` composes an SVG from named parts, `resvg_py` rasterises it. A face is a pure function of (dataset
seed, index), so a dataset can be drawn by any number of workers, stopped and restarted, and always comes out the
same. Its split is a hash of its visible attributes: two faces that look alike are always in the same split.

Cost: about 120 faces per second and core at 64 pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from unif2ace.data import schema
from unif2ace.data.attributes import ATTRIBUTES, NONE, visible
from unif2ace.data.language import caption, questions
from unif2ace.errors import UserError
from unif2ace.files import write_text

SHARD_FACES = 1000
_CROP = "28 24 208 208"  # view box: the head and the collar, 1.27 times closer than the library's 264 x 280
_HEADWEAR_SHARE, _FACIAL_HAIR_SHARE, _EYEWEAR_SHARE = 0.25, 0.5, 0.55


def sample_face(rng: np.random.Generator) -> dict[str, str]:
    """Draw a value for every attribute: uniform, but for the share of faces that wear something at all."""
    face = {name: attribute.values[rng.integers(len(attribute.values))] for name, attribute in ATTRIBUTES.items()}
    for name, share in (
        ("headwear", _HEADWEAR_SHARE),
        ("facial hair", _FACIAL_HAIR_SHARE),
        ("eyewear", _EYEWEAR_SHARE),
    ):
        worn = [value for value in ATTRIBUTES[name].values if value != NONE]
        face[name] = worn[rng.integers(len(worn))] if rng.random() < share else NONE
    if face["headwear"] == "hijab":
        face["facial hair"] = NONE  # the cloth covers it
    return face


def draw_face(face: dict[str, str], size: int = 64) -> Image.Image:
    """Draw `face` (a value for each of `ATTRIBUTES`) as an RGB image of `size` x `size` pixels."""
    import python_avatars as pa
    import resvg_py

    def part(name: str) -> str:
        return ATTRIBUTES[name].parts[face[name]]

    seen = visible(face)
    headwear = part("headwear")
    avatar = pa.Avatar(
        style=pa.AvatarStyle.TRANSPARENT,
        top=pa.HatType[headwear] if headwear else pa.HairType[part("hair")],
        hat_color=part("headwear color"),
        eyebrows=pa.EyebrowType[part("eyebrows")],
        eyes=pa.EyeType[part("eyes")],
        nose=pa.NoseType.DEFAULT,
        mouth=pa.MouthType[part("mouth")],
        facial_hair=pa.FacialHairType[part("facial hair")],
        skin_color=part("skin"),
        hair_color=part("hair color"),
        facial_hair_color=part("facial hair color"),
        accessory=pa.AccessoryType[part("eyewear")],
        clothing=pa.ClothingType[part("clothing")],
        clothing_color=part("clothing color") if "clothing color" in seen else "#3C4F5C",
    )
    svg = avatar.render().replace(
        'width="264px" height="280px" viewBox="0 0 264 280"', f'width="{size}px" height="{size}px" viewBox="{_CROP}"', 1
    )
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, part("background"))
    canvas.alpha_composite(drawn)
    return canvas.convert("RGB")


def split_of(face: dict[str, str]) -> str:
    """`train` (90 %), `val` (5 %) or `test` (5 %) by a hash of what can be seen."""
    key = json.dumps(visible(face), sort_keys=True).encode()
    percent = int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % 100
    return "test" if percent < 5 else "val" if percent < 10 else "train"


def make_row(seed: int, index: int, size: int = 64) -> dict:
    """Face number `index` of dataset `seed` as one row of `data.schema`."""
    rng = np.random.default_rng([seed, index])
    face = sample_face(rng)
    encoded = io.BytesIO()
    draw_face(face, size).save(encoded, "PNG")
    return {
        "id": f"avatar-{seed}-{index:07d}",
        "split": split_of(face),
        "image": {"bytes": encoded.getvalue(), "path": None},
        "attributes": [{"name": name, "value": value} for name, value in visible(face).items()],
        "captions": [caption(face, rng)._asdict() for _ in range(3)],
        "questions": [question._asdict() for question in questions(face, rng)],
    }


def _write_shard(job: tuple[Path, int, int, int, int]) -> Path:
    path, seed, start, stop, size = job
    schema.write_table([make_row(seed, index, size) for index in range(start, stop)], path)
    return path


def _jobs(folder: Path, faces: int, seed: int, size: int) -> Iterator[tuple[Path, int, int, int, int]]:
    for number, start in enumerate(range(0, faces, SHARD_FACES)):
        yield folder / f"faces-{number:05d}.parquet", seed, start, min(start + SHARD_FACES, faces), size


def build_dataset(
    folder: Path, *, faces: int = 24_000, seed: int = 0, size: int = 64, workers: int | None = None
) -> int:
    """Draw a dataset into `folder`, one Parquet file per thousand faces; returns how many files were drawn now.

    Files that exist are kept, so an interrupted call is finished by the same call. `dataset.json` records the settings;
    a folder of other settings is refused rather than mixed.
    """
    if faces < 1 or size < 32:
        raise UserError(
            f"data avatars: expected at least 1 face of at least 32 pixels, got {faces} faces of {size} pixels"
        )
    folder = Path(folder)
    settings = {"generator": "avatars", "version": 1, "faces": faces, "seed": seed, "size": size}
    record = folder / "dataset.json"
    if record.exists():
        found = json.loads(record.read_text())
        if found != settings:
            raise UserError(f"{folder} holds a dataset of other settings: found {found}, asked for {settings}")
    else:
        write_text(record, json.dumps(settings, indent=2) + "\n")
    missing = [job for job in _jobs(folder, faces, seed, size) if not job[0].exists()]
    if missing:
        # spawn: forking a process that already runs torch's threads can deadlock.
        with multiprocessing.get_context("spawn").Pool(min(workers or os.cpu_count() or 1, len(missing))) as pool:
            shards = pool.imap_unordered(_write_shard, missing)
            for _ in tqdm(shards, total=len(missing), unit="k faces", desc="drawing faces", disable=None):
                pass
    return len(missing)
