"""Files are whole or absent."""

import pytest

from unif2ace.errors import UserError
from unif2ace.files import replace_file, write_text


def test_folders_are_made_and_the_file_replaced(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("No space left on device\nstack")]
)
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, error):
    path = write_text(tmp_path / "file", "old")

    def fail(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(UserError, match=r"file: No space left on device; expected a writable folder"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    write_text(tmp_path / "taken", "a file")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "taken" / "inside.txt", "text")
