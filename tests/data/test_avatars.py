"""Drawn faces: a function of (seed, index); datasets that can be interrupted and are never mixed."""

import io
import json
from multiprocessing import dummy
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unif2ace.data import avatars
from unif2ace.data.attributes import ATTRIBUTES, NONE
from unif2ace.data.loader import FaceTable
from unif2ace.errors import UserError


def test_a_row_is_a_function_of_seed_and_index():
    assert avatars.make_row(3, 17, 32) == avatars.make_row(3, 17, 32)
    assert avatars.make_row(3, 17, 32)["image"] != avatars.make_row(4, 17, 32)["image"]


def test_pictures_have_the_size_and_the_background():
    face = avatars.sample_face(np.random.default_rng(0)) | {
        "background": "yellow",
        "headwear": NONE,
        "hair": "buzz cut",
    }
    picture = avatars.draw_face(face, 48)
    assert (picture.mode, picture.size) == ("RGB", (48, 48))
    assert "#{:02X}{:02X}{:02X}".format(*picture.getpixel((0, 0))) == ATTRIBUTES["background"].parts["yellow"]


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if "color" not in name])
def test_every_value_of_an_attribute_looks_different(name):
    face = avatars.sample_face(np.random.default_rng(1)) | {
        "headwear": NONE,
        "eyewear": NONE,
        "facial hair": NONE,
        "hair": "short hair",
    }
    drawn = {avatars.draw_face(face | {name: value}, 32).tobytes() for value in ATTRIBUTES[name].values}
    assert len(drawn) == len(ATTRIBUTES[name].values)


def test_splits_follow_what_can_be_seen():
    rng = np.random.default_rng(0)
    splits = [avatars.split_of(avatars.sample_face(rng)) for _ in range(4000)]
    assert 0.87 < splits.count("train") / 4000 < 0.93
    face = avatars.sample_face(rng) | {"headwear": "beanie"}
    assert avatars.split_of(face) == avatars.split_of(face | {"hair": "afro"})  # under the hat


def test_a_dataset_is_finished_by_the_same_call_and_never_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(avatars, "SHARD_FACES", 40)
    threads = SimpleNamespace(get_context=lambda kind: dummy)  # processes take seconds to start, threads none
    monkeypatch.setattr(avatars, "multiprocessing", threads)
    settings = {"faces": 80, "seed": 2, "size": 32, "workers": 1}
    assert avatars.build_dataset(tmp_path, **settings) == 2
    before = (tmp_path / "faces-00000.parquet").stat().st_mtime_ns
    (tmp_path / "faces-00001.parquet").unlink()
    assert avatars.build_dataset(tmp_path, **settings) == 1
    assert avatars.build_dataset(tmp_path, **settings) == 0
    assert (tmp_path / "faces-00000.parquet").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "dataset.json").read_text())["faces"] == 80
    with pytest.raises(UserError, match="holds a dataset of other settings"):
        avatars.build_dataset(tmp_path, **{**settings, "seed": 3})
    table = FaceTable.open(tmp_path, "train")
    row = next(row for row in (avatars.make_row(2, i, 32) for i in range(80)) if row["split"] == "train")
    picture = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    assert np.array_equal(table.images[0].numpy(), picture)


@pytest.mark.parametrize("settings", [{"faces": 0}, {"faces": 5, "size": 16}])
def test_impossible_datasets_are_refused(tmp_path, settings):
    with pytest.raises(UserError, match="expected at least 1 face of at least 32 pixels"):
        avatars.build_dataset(tmp_path, **settings)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*dataset\.json"):
        avatars.build_dataset(tmp_path / "file" / "data", faces=1)
