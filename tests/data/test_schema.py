"""The one table layout: whole files or none, other files refused by name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unif2ace.data import schema
from unif2ace.errors import UserError

ROW = {
    "id": "face-1",
    "split": "val",
    "image": {"bytes": b"png", "path": None},
    "attributes": [{"name": "skin", "value": "fair"}],
    "captions": [{"text": "a face", "attributes": ["skin"]}],
    "questions": [{"question": "Which?", "answer": "fair", "attribute": None}],
}


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "faces.parquet"
    schema.write_table([ROW, {**ROW, "id": "face-2", "split": "train"}], path)
    assert schema.read_table([path], "val").to_pylist() == [ROW]
    assert len(schema.read_table([path, path])) == 4
    assert list(tmp_path.iterdir()) == [path]  # no partial file stays


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "faces.parquet"
    schema.write_table([ROW], path)
    with pytest.raises(pa.ArrowTypeError):
        schema.write_table([{**ROW, "id": [1, 2]}], path)
    assert schema.read_table([path]).to_pylist() == [ROW]
    assert list(tmp_path.iterdir()) == [path]


def test_truncated_missing_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "faces.parquet"
    schema.write_table([ROW], path)
    (tmp_path / "short.parquet").write_bytes(path.read_bytes()[:-20])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    for name, reason in (("short", "readable"), ("missing", "readable"), ("other", "expected the columns")):
        with pytest.raises(UserError, match=f"{name}.parquet: expected.*{reason}|{reason}"):
            schema.read_table([tmp_path / f"{name}.parquet"])
    with pytest.raises(UserError, match="at least one Parquet file"):
        schema.read_table([])
