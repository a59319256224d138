"""What may stand in a row, and what a run has written."""

import json
from pathlib import Path

from hypothesis import strategies as st

json_values = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary() | st.sampled_from(["a", 1, 3]),
    lambda values: st.lists(values, max_size=3),
    max_leaves=4,
)  # and bytes, which Parquet has too


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def result(out):
    """Every file of a finished folder of pictures, without its record: name -> bytes."""
    files = (path for path in Path(out).rglob("*") if path.is_file() and "parts" not in path.relative_to(out).parts)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}
