"""Tables of prompts or questions, read as a stream: .txt (one prompt per line), .jsonl, .parquet.

Every line is a row. A table is read twice: `Table.open` numbers its rows and refuses unknown columns before any work is
done, `rows` hands them out; neither holds more than one piece of it. A row that cannot be read is handed out with the
reason, so that it fails alone. What spoils every row is refused at once: text in UTF-16, a Parquet file without the
column that all rows need, or with a column twice.

Rows count from 0, here and in results; lines count from 1, as in editors. Messages say both: "prompts.jsonl:6 (row 5)".

Numbers: row i stands for `count(row i)` results (images), which carry the running numbers starts[i] .. starts[i+1] - 1.
Every process that reads the table finds the same numbers, whatever share of the rows is its own.

Cost: 8 bytes of memory per row.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from unif2ace.errors import UserError
from unif2ace.files import sha256

SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 1024  # rows decoded at a time
MAX_RESULTS = 100_000_000  # of one table: their record takes a byte each in memory, and names of pictures count so far


class Row(NamedTuple):
    """Row `index` (from 0) of a table: its columns, without those that are null; or why it cannot be read."""

    index: int
    values: dict[str, object]
    error: str | None = None

    def text(self, column: str) -> str | None:
        """A column as it is recorded: None where it is no text; what is no Unicode is written out."""
        value = self.values.get(column)
        return value.encode("utf-8", errors="backslashreplace").decode() if isinstance(value, str) else None

    @property
    def id(self) -> str:
        """The column `id`, else the row's index."""
        value = self.values.get("id")
        return str(value) if type(value) is int else self.text("id") or str(self.index)

    def check(self) -> None:
        """`UserError` for a row that cannot be read, or has an id that is none."""
        if self.error is not None:
            raise UserError(self.error)
        value = self.values.get("id")
        if value is not None and type(value) not in (str, int):
            raise UserError(f"id: expected text or an integer, got {value!r}")


@dataclass(frozen=True)
class Table:
    """A table whose columns are known to be among `columns`; no row can do without the first, which .txt files hold."""

    path: Path
    columns: tuple[str, ...]
    sha256: str
    starts: array = field(repr=False)  # [rows + 1]

    @classmethod
    def open(cls, path: Path, columns: tuple[str, ...], count: Callable[[Row], int]) -> Table:
        """Read `path` once to number its rows.

        Raises `UserError` for a file that is missing, of another kind, empty, too long, or with columns other than
        `columns`.
        """
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: expected a table ending in {', '.join(SUFFIXES)}, got {path.suffix or 'none'}")
        if not path.is_file():
            raise UserError(f"{path}: expected a table, found {'a folder' if path.is_dir() else 'none'}")
        starts = array("q", [0])
        try:
            digest = sha256(path)
            for row in _read(path, columns):
                starts.append(starts[-1] + count(row))
                if starts[-1] > MAX_RESULTS:
                    raise UserError(
                        f"{place(path, row.index)}: expected at most {MAX_RESULTS} results of one table, got more; "
                        "divide it"
                    )
        except OSError as error:
            raise UserError(f"{path}: cannot read the table: {error.strerror or error}") from error
        if len(starts) == 1:
            raise UserError(f"{path}: expected at least one row, got an empty table")
        return cls(path, columns, digest, starts)

    @property
    def total(self) -> int:
        """How many results all rows stand for."""
        return self.starts[-1]

    def numbers(self, rank: int = 0, world_size: int = 1) -> Iterator[range]:
        """The numbers of the results of every `world_size`-th row from row `rank` on."""
        for index in range(rank, len(self.starts) - 1, world_size):
            yield range(self.starts[index], self.starts[index + 1])

    def rows(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Row, range]]:
        """Every `world_size`-th row from row `rank` on, with the numbers of its results."""
        number = 0
        for number, row in enumerate(_read(self.path, self.columns), 1):
            if number == len(self.starts):
                break
            if row.index % world_size == rank:
                yield row, range(self.starts[row.index], self.starts[row.index + 1])
        if number != len(self.starts) - 1:
            raise UserError(f"{self.path}: expected a table that stays as it is, but it has changed since the start")


def place(path: Path, row: int) -> str:
    """Row `row` of the table `path`, as messages name it: by its line too, where it is one."""
    return f"{path}, row {row}" if path.suffix.lower() == ".parquet" else f"{path}:{row + 1} (row {row})"


def _read(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    return _read_jsonl(path, columns) if suffix == ".jsonl" else _read_text(path, columns[0])


def _read_text(path: Path, column: str) -> Iterator[Row]:
    for index, line in _lines(path):
        yield Row(index, {}, line.error) if isinstance(line, _Unreadable) else Row(index, {column: line})


def _read_jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    for index, line in _lines(path):
        if isinstance(line, _Unreadable):
            yield Row(index, {}, line.error)
            continue
        if not line.strip():
            yield Row(index, {}, "expected a JSON object, got an empty line")
            continue
        try:
            values = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            reason = f"{error.msg}, at character {error.colno}"
            yield Row(index, {}, f"expected a JSON object, got a broken one: {reason}")
            continue
        except (ValueError, RecursionError) as error:  # a name twice, thousands of digits, brackets in brackets in ...
            yield Row(index, {}, f"expected a JSON object, got an unreadable one: {error}")
            continue
        if not isinstance(values, dict):
            yield Row(index, {}, f"expected a JSON object, got {type(values).__name__}")
            continue
        _refuse_unknown(place(path, index), values, columns)
        yield Row(index, {name: value for name, value in values.items() if value is not None})


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; `ValueError` where a name stands twice, as the values may differ."""
    if repeated := _repeated([name for name, _ in pairs]):
        raise ValueError(f"{repeated!r} stands in it twice")
    return dict(pairs)


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_unknown(str(path), names, columns)
            if repeated := _repeated(names):
                raise UserError(f"{path}: expected each column once, got {repeated!r} twice")
            if columns[0] not in names:
                raise UserError(f"{path}: expected a column {columns[0]!r}, got {', '.join(map(repr, names))}")
            index = 0
            for batch in file.iter_batches(PARQUET_ROWS):
                for values, error in _decode(batch):
                    yield Row(index, {name: value for name, value in values.items() if value is not None}, error)
                    index += 1
    except pa.ArrowException as error:
        raise UserError(f"{path}: expected a readable Parquet file, got: {str(error).splitlines()[0]}") from error


def _decode(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, object], str | None]]:
    """Values of every row, or why it has none."""
    try:
        yield from ((values, None) for values in batch.to_pylist())
    except (ValueError, OverflowError):  # text that is no UTF-8, a date beyond Python's: it spoils its own row only
        for row in range(len(batch)):
            try:
                yield batch.slice(row, 1).to_pylist()[0], None
            except (ValueError, OverflowError) as error:
                yield {}, f"expected readable values, got: {error}"


class _Unreadable(NamedTuple):
    error: str


def _lines(path: Path) -> Iterator[tuple[int, str | _Unreadable]]:
    """Lines without their ends. Decoded one by one: bytes that are no UTF-8 spoil their own line only."""
    with open(path, "rb") as file:
        for index, line in enumerate(file):
            if index == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}: expected UTF-8 text, got UTF-16; save it as UTF-8")
            try:
                yield index, line.decode("utf-8-sig" if index == 0 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield index, _Unreadable(f"expected UTF-8 text, got bytes that are none at {error.start}")


def _refuse_unknown(where: str, found: object, columns: tuple[str, ...]) -> None:
    unknown = [name for name in found if name not in columns]
    if unknown:
        raise UserError(f"{where}: expected columns among {', '.join(columns)}, got {', '.join(map(repr, unknown))}")


def _repeated(names: list[str]) -> str | None:
    """A name that stands more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
