"""The finished result of a run, in the order of its table, made from its record once every result has been tried.

| `--out` | result | record |
|---|---|---|
| folder (pictures) | `images/0000/00000012.png`, ... and `manifest.jsonl` | `parts/` |
| file.parquet | one table; pictures in the column `image`, a struct(bytes, path) | `file.parquet.parts/` |
| file.jsonl (answers) | one object per line | `file.jsonl.parts/` |

The result does not depend on how the work was divided or interrupted: with the native back end on CPUs, pictures,
manifest and answers (these in float32) are the same bytes from one process, from several, and after a crash. On other
back ends the company in a batch may round the last bit of a logit otherwise, and rarely that changes a token.

A Parquet file is written from the pictures in its record folder, which are removed once they are in it and nothing has
failed; the rest of the record stays, so that the command, given again, knows that all is done.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unif2ace.batch.record import Line, Record, open_lock
from unif2ace.errors import UserError
from unif2ace.files import replace_file

IMAGES = "images"
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS_PER_GROUP = 256


@dataclass(frozen=True)
class Output:
    """Where a run writes: `final` when all is done, its record to `parts`, its pictures below `root`."""

    final: Path
    parts: Path
    root: Path | None
    fields: tuple[tuple[str, pa.DataType], ...]

    @classmethod
    def of_faces(cls, out: Path, fields: tuple[tuple[str, pa.DataType], ...]) -> Output:
        """A folder, or a Parquet file."""
        if out.suffix.lower() == ".parquet":
            parts = out.with_name(out.name + ".parts")
            return cls(out, parts, parts, fields)
        if (out.suffix and not out.is_dir()) or out.is_file():
            raise UserError(f"--out: expected a folder or a file ending in .parquet, got {out}")
        return cls(out / "manifest.jsonl", out / "parts", out, fields)

    @classmethod
    def of_answers(cls, out: Path, fields: tuple[tuple[str, pa.DataType], ...]) -> Output:
        """A JSON Lines or a Parquet file."""
        if out.suffix.lower() not in (".jsonl", ".parquet"):
            raise UserError(f"--out: expected a file ending in .jsonl or .parquet, got {out}")
        return cls(out, out.with_name(out.name + ".parts"), None, fields)

    def refuse_foreign(self) -> None:
        """`UserError` where something stands in the place of the result that no run of ours has written."""
        if self.final.exists() and not self.parts.exists():
            raise UserError(f"{self.final}: exists, but not its record {self.parts}; give another --out, or remove it")

    @property
    def is_table(self) -> bool:
        """One Parquet file?"""
        return self.final.suffix.lower() == ".parquet"

    @property
    def pictures_moved(self) -> bool:
        """Are the pictures in the Parquet file, and nowhere else?"""
        return self.is_table and self.root is not None and self.final.exists() and not (self.root / IMAGES).exists()

    def finish(self, record: Record) -> bool:
        """Write the result if every number has been tried, by whatever process; is it there now?

        Processes that end together take turns; each writes the same bytes.
        """
        with open_lock(self.parts / "finish.lock", fcntl.LOCK_EX):
            record.root = None if self.pictures_moved else self.root
            record.refresh()
            if not record.complete:
                return False
            if not self.pictures_moved:
                write = self._write_table if self.is_table else _write_lines
                lines = record.lines_in_order()
                replace_file(self.final, lambda partial: write(partial, lines), record.partial)
                if self.is_table and self.root is not None and not record.failed:
                    shutil.rmtree(self.root / IMAGES)
            record.tidy()
        return True

    def _write_table(self, path: Path, lines: Iterator[Line]) -> None:
        schema = pa.schema(self.fields)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while rows := [self._row(line) for line in islice(lines, ROWS_PER_GROUP)]:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))

    def _row(self, line: Line) -> Line:
        if "file" not in line:
            return line
        name = line["file"]
        image = None if name is None else {"bytes": (self.root / name).read_bytes(), "path": Path(name).name}
        return {**line, "image": image}


def _write_lines(path: Path, lines: Iterable[Line]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
