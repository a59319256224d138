"""Writing results so that a reader sees the old file or the whole new one, with one sentence when that fails."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from unif2ace.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def replace_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Make `path` what `write(temporary path)` writes; folders are created. Raises `UserError` where it cannot."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def write_text(path: Path, text: str) -> Path:
    """UTF-8 text."""
    return replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_image(path: Path, image: Image.Image) -> Path:
    """A picture in the format its suffix names."""
    return replace_file(path, image.save)


def is_image_path(path: Path) -> bool:
    """True where the name says "one picture file", False where it says "folder"."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
