"""Tables: three formats, one numbering, rows that fail alone, tables that are refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unif2ace.batch.table import PARQUET_ROWS, Row, Table, place
from unif2ace.errors import UserError

COLUMNS = ("prompt", "id", "num_images")


def count(row):
    return row.values.get("num_images", 1)


def open_table(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Table.open(path, COLUMNS, count)


def rows(table, *shard):
    return [row for row, _ in table.rows(*shard)]


def test_text_has_one_prompt_per_line(tmp_path):
    table = open_table(tmp_path / "p.txt", b"\xef\xbb\xbffirst\r\nsecond \xc3\xa9\n\nlast")
    assert rows(table) == [
        Row(0, {"prompt": "first"}),
        Row(1, {"prompt": "second é"}),
        Row(2, {"prompt": ""}),
        Row(3, {"prompt": "last"}),
    ]


def test_json_lines_and_parquet_hold_the_same_rows(tmp_path):
    content = [{"prompt": "a", "id": "x", "num_images": 3}, {"prompt": "b", "id": None, "num_images": None}]
    lines = open_table(tmp_path / "p.jsonl", "".join(json.dumps(values) + "\n" for values in content))
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "p.parquet")
    table = Table.open(tmp_path / "p.parquet", COLUMNS, count)
    assert rows(lines) == rows(table) == [Row(0, content[0]), Row(1, {"prompt": "b"})]
    assert [list(numbers) for _, numbers in table.rows()] == [[0, 1, 2], [3]]
    assert table.total == lines.total == 4


def test_shards_divide_rows_and_keep_numbers(tmp_path):
    content = "".join(json.dumps({"prompt": str(i), "num_images": 1 + i % 3}) + "\n" for i in range(11))
    table = open_table(tmp_path / "p.jsonl", content)
    whole = list(table.rows())
    parts = [list(table.rows(rank, 3)) for rank in range(3)]
    assert sorted(entry for part in parts for entry in part) == whole
    assert all(list(table.numbers(rank, 3)) == [numbers for _, numbers in parts[rank]] for rank in range(3))


def test_parquet_is_read_in_pieces(tmp_path):
    number = 2 * PARQUET_ROWS + 5
    pq.write_table(pa.table({"prompt": [str(i) for i in range(number)]}), tmp_path / "p.parquet", row_group_size=700)
    table = Table.open(tmp_path / "p.parquet", COLUMNS, count)
    assert [row.values["prompt"] for row in rows(table)] == [str(i) for i in range(number)]
    assert [row.index for row in rows(table)] == list(range(number))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a",', "expected a JSON object, got a broken one: Expecting property name"),
        (b"", "expected a JSON object, got an empty line"),
        (
            b'{"prompt": "a", "id": 1, "prompt": "b"}',
            "expected a JSON object, got an unreadable one: 'prompt' stands in",
        ),
        (b'["a"]', "expected a JSON object, got list"),
        (b'{"prompt": "\xff"}', "expected UTF-8 text, got bytes that are none at 12"),
        (b'{"num_images": ' + b"9" * 5000 + b"}", "expected a JSON object, got an unreadable one: "),
        (b"[" * 100_000, "expected a JSON object, got an unreadable one: "),
    ],
)
def test_a_line_that_cannot_be_read_is_a_row_with_a_reason(tmp_path, line, reason):
    table = open_table(tmp_path / "p.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    first, second, third = rows(table)
    assert (first.error, third.error) == (None, None)
    assert second.error.startswith(reason)
    assert table.total == 3


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.csv", b"a", r"p.csv: expected a table ending in .txt, .jsonl, .parquet, got .csv"),
        ("p.txt", b"", r"p.txt: expected at least one row, got an empty table"),
        ("p.parquet", b"PAR1 no", r"p.parquet: expected a readable Parquet file, got: "),
        ("p.txt", "a face".encode("utf-16"), r"p.txt: expected UTF-8 text, got UTF-16; save it as UTF-8"),
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), r"p.jsonl: expected UTF-8 text, got UTF-16"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"num_images": 100000000}',
            r"p.jsonl:2 \(row 1\): expected at most 100000000 results of one table, got more; divide it",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"promt": "b"}',
            r"p.jsonl:2 \(row 1\): expected columns .*, got 'promt'",
        ),
    ],
)
def test_tables_that_are_refused(tmp_path, name, content, sentence):
    with pytest.raises(UserError, match=sentence):
        open_table(tmp_path / name, content)


def test_messages_name_the_row_and_the_line_where_there_are_lines():
    assert place(Path("a/p.jsonl"), 5) == "a/p.jsonl:6 (row 5)"
    assert place(Path("p.txt"), 0) == "p.txt:1 (row 0)"
    assert place(Path("p.Parquet"), 5) == "p.Parquet, row 5"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["prompt", "style"], r"p\.parquet: expected columns among .*, got 'style'"),
        (["prompt", "prompt"], r"p\.parquet: expected each column once, got 'prompt' twice"),
        (["id", "num_images"], r"p\.parquet: expected a column 'prompt', got 'id', 'num_images'"),
    ],
)
def test_parquet_columns_that_are_refused(tmp_path, names, sentence):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=names), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=sentence):
        Table.open(tmp_path / "p.parquet", COLUMNS, count)


def test_a_parquet_value_that_cannot_be_read_spoils_its_own_row(tmp_path):
    offsets = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfec")])
    pq.write_table(pa.table({"prompt": broken, "id": ["x", "y", "z"]}), tmp_path / "p.parquet")
    first, second, third = rows(Table.open(tmp_path / "p.parquet", COLUMNS, count))
    assert (first, third) == (Row(0, {"prompt": "a", "id": "x"}), Row(2, {"prompt": "c", "id": "z"}))
    assert second.error.startswith("expected readable values, got: 'utf-8' codec can't decode byte 0xff")


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt: expected a table, found none"):
        Table.open(tmp_path / "none.txt", COLUMNS, count)


@pytest.mark.parametrize("content", ["a\nb\nc\n", "a\n"])
def test_a_table_that_changes_while_it_is_read_is_noticed(tmp_path, content):
    table = open_table(tmp_path / "p.txt", "a\nb\n")
    (tmp_path / "p.txt").write_text(content)
    with pytest.raises(UserError, match="it has changed since the start"):
        rows(table)
