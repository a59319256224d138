"""Training checkpoints that are whole or absent.

A checkpoint is one file, written under a temporary name, flushed to disk and renamed: a crash at any moment leaves
the previous checkpoint in place. `latest` skips nothing silently: the newest file either loads or is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from unif2ace.errors import UserError

_NAME = re.compile(r"step-(\d{8})\.pt")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create or replace `path` with what `write(file)` writes; readers see the old file or the whole new one.

    Raises `UserError` where the disk is full or the folder cannot be written; the partial file is removed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; expected a writable folder with free space") from error
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def save(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `step`, then delete all but the newest `keep`."""
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    for old in _sorted(folder)[:-keep]:
        old.unlink()
    return path


def latest(folder: Path) -> dict | None:
    """The newest checkpoint's state, or None where there is none; `UserError` where the file is not loadable."""
    paths = _sorted(folder)
    if not paths:
        return None
    try:
        return torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and io errors of many types: all mean "not a checkpoint"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{paths[-1]}: expected a training checkpoint, got a corrupt file ({reason}); delete it to resume from an older one"
        ) from error


def _sorted(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
