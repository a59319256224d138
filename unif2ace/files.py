"""Writing results so that a reader sees the old file or the whole new one, with one sentence when that fails."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from unif2ace.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def replace_file(path: Path, write: Callable[[Path], object], partial: Path | None = None) -> Path:
    """Make `path` what `write(temporary path)` writes; folders are created.

    The bytes are on the disk before the name changes, so a crash at any moment leaves the old file or the new one (and
    perhaps the temporary one; give its name, on the same file system, where many processes write and are killed).
    Raises `UserError` where the folder cannot be written or the disk is full; nothing partial stays.
    """
    partial = partial or path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; expected a writable folder with free space") from error
    return path


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk: after a power cut, files renamed before this are there."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_folder(path: Path) -> None:
    """Create the folder `path`; `UserError` where that or writing into it is impossible. Call it before long work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror or error}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write into {path}: permission denied")


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
    """Hex digest of a file, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
