"""Checkpoints are whole or absent."""

import pytest
import torch

from unif2ace.errors import UserError
from unif2ace.training import checkpoint


def test_the_newest_checkpoint_is_loaded_and_old_ones_go(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step, "x": torch.full((2,), float(step))}, keep=2)
    assert checkpoint.latest(tmp_path)["step"] == 3
    assert len(list(tmp_path.glob("step-*.pt"))) == 2


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_a_truncated_checkpoint_is_refused_by_name(tmp_path):
    path = checkpoint.save(tmp_path, 5, {"x": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"step-00000005\.pt: expected a training checkpoint"):
        checkpoint.latest(tmp_path)


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
