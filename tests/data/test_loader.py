"""A split in memory: pictures, labels and texts of the same faces, and refusals by name."""

import io

import pytest
import torch
from PIL import Image

from unif2ace.data import schema
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.avatars import make_row
from unif2ace.data.loader import FaceTable
from unif2ace.errors import UserError


@pytest.fixture(scope="module")
def rows():
    return [make_row(0, index, 32) | {"split": ("train", "test")[index % 2]} for index in range(8)]


@pytest.fixture
def folder(tmp_path, rows):
    schema.write_table(rows[:5], tmp_path / "faces-0.parquet")
    schema.write_table(rows[5:], tmp_path / "faces-1.parquet")
    return tmp_path


def test_a_split_lines_up(folder, rows):
    table = FaceTable.open(folder, "test")
    mine = [row for row in rows if row["split"] == "test"]
    assert len(table) == len(mine) == 4
    assert table.images.shape == (4, 32, 32, 3)
    assert table.images.dtype == torch.uint8
    for index, row in enumerate(mine):
        assert table.attributes[index] == {pair["name"]: pair["value"] for pair in row["attributes"]}
        assert [caption._asdict() for caption in table.captions[index]] == row["captions"]
        assert [question._asdict() for question in table.questions[index]] == row["questions"]
        for name, label in zip(ATTRIBUTES, table.labels[index].tolist(), strict=True):
            value = table.attributes[index].get(name)
            assert label == (-1 if value is None else ATTRIBUTES[name].index(value))


def test_limit_takes_the_first_faces(folder):
    assert torch.equal(FaceTable.open(folder, "test", 2).images, FaceTable.open(folder, "test").images[:2])


def test_unknown_values_have_no_label(tmp_path, rows):
    schema.write_table([rows[0] | {"attributes": [{"name": "skin", "value": "green"}]}], tmp_path / "a.parquet")
    assert FaceTable.open(tmp_path, "train").labels.unique().tolist() == [-1]


def encoded(size):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_refusals(tmp_path, folder, rows):
    with pytest.raises(UserError, match="split: expected one of train, val, test, got 'dev'"):
        FaceTable.open(folder, "dev")
    with pytest.raises(UserError, match="the split 'val' has no faces"):
        FaceTable.open(folder, "val")
    with pytest.raises(UserError, match="expected a folder with Parquet files"):
        FaceTable.open(folder / "nowhere", "train")
    bad = tmp_path / "bad"
    bad.mkdir()
    schema.write_table([rows[0] | {"image": {"bytes": b"no picture", "path": None}}], bad / "a.parquet")
    with pytest.raises(UserError, match="expected an encoded picture, got 10 bytes"):
        FaceTable.open(bad, "train")
    schema.write_table([rows[0], rows[0] | {"image": encoded(40)}], bad / "a.parquet")
    with pytest.raises(UserError, match="expected pictures of one size"):
        FaceTable.open(bad, "train")
