"""The one table layout of every face dataset: Apache Parquet, one row per face.

| column | type | meaning |
|---|---|---|
| `id` | string | unique within the dataset |
| `split` | string | `train`, `val` or `test` |
| `image` | struct(bytes, path) | an encoded picture (the Hugging Face `Image` layout); `path` may be null |
| `attributes` | list(struct(name, value)) | the labelled attributes that can be seen; empty where none are known |
| `captions` | list(struct(text, attributes)) | sentences and the attribute names each one states (may be empty) |
| `questions` | list(struct(question, answer, attribute)) | question-answer pairs; `attribute` may be null |
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unif2ace.errors import UserError
from unif2ace.files import replace_file

SPLITS = ("train", "val", "test")
_PAIR = pa.struct([("name", pa.string()), ("value", pa.string())])
_CAPTION = pa.struct([("text", pa.string()), ("attributes", pa.list_(pa.string()))])
_QUESTION = pa.struct([("question", pa.string()), ("answer", pa.string()), ("attribute", pa.string())])

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("attributes", pa.list_(_PAIR)),
        ("captions", pa.list_(_CAPTION)),
        ("questions", pa.list_(_QUESTION)),
    ]
)


def write_table(rows: list[dict], path: Path) -> None:
    """Write `rows` (dicts with the columns above) to `path`; readers see the whole file or none of it."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    replace_file(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def read_table(paths: Iterable[Path], split: str | None = None) -> pa.Table:
    """Read shards, checked against `SCHEMA`, keeping one split if asked.

    Raises `UserError` for a file that is missing, truncated, no Parquet, or of other columns.
    """
    tables = []
    for path in paths:
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{path}: expected a readable Parquet file of faces, got: {str(error).splitlines()[0]}"
            ) from error
        if not table.schema.equals(SCHEMA):
            raise UserError(f"{path}: expected the columns {SCHEMA.names}, got {table.schema.names} (or other types)")
        tables.append(table)
    if not tables:
        raise UserError("expected at least one Parquet file of faces, got none")
    table = pa.concat_tables(tables)
    return table if split is None else table.filter(pa.compute.equal(table["split"], split))
