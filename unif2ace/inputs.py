"""What people hand to a pipeline, checked and turned into tensors before any work is done.

Every function returns what the models take or raises `UserError` with one sentence that names the argument, what came
and what was expected. Nothing is converted silently: a picture of another size or mode is refused together with the
line that converts it, because the right crop is the caller's to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unif2ace.data.text import END_OF_TEXT, TextTokenizer
from unif2ace.errors import UserError
from unif2ace.generation.settings import MAX_SEED

KEEP_LEVEL = 128  # grey masks: from here on a pixel counts as white


def as_texts(name: str, value: object, blank: bool = False) -> list[str]:
    """A string or a sequence of strings as a list of non-empty strings; with `blank`, of white space alone too."""
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else None
    if texts is None or isinstance(value, bytes):
        raise UserError(f"{name}: expected a string or a list of strings, got {type(value).__name__}")
    if not texts:
        raise UserError(f"{name}: expected at least one string, got an empty list")
    for index, text in enumerate(texts):
        where = name if len(texts) == 1 else f"{name}[{index}]"
        if not isinstance(text, str):
            raise UserError(f"{where}: expected a string, got {type(text).__name__}")
        if not (text if blank else text.strip()):
            raise UserError(f"{where}: expected some text, got an empty string")
        if END_OF_TEXT in text:
            raise UserError(f"{where}: expected plain text, got the control token {END_OF_TEXT}")
        if "\0" in text:  # as in UTF-16 that is read as UTF-8
            raise UserError(f"{where}: expected plain text, got a null character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: expected Unicode text, got bytes that are none at {error.start}") from error
    return texts


def encode_texts(
    name: str, texts: Sequence[str], tokenizer: TextTokenizer, limit: int, question: bool
) -> list[list[int]]:
    """Token ids of every text, with the question template around it where `question`; at most `limit` tokens each."""
    encoded = []
    for text in texts:
        ids = tokenizer.encode_question(text) if question else tokenizer.encode(text)
        if len(ids) > limit:
            raise UserError(f"{name}: expected at most {limit} tokens, got {len(ids)} in {text[:40]!r}...; shorten it")
        encoded.append(ids)
    return encoded


def as_seeds(seed: object, count: int) -> list[int]:
    """One seed per image or answer: an integer s gives s, s + 1, ...; a sequence must hold `count` integers."""
    value = seed.tolist() if isinstance(seed, (np.ndarray, np.integer, Tensor)) else seed
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != count:
            raise UserError(f"seed: expected one integer or a list of {count}, got a list of {len(value)}")
        return [_seed(item) for item in value]
    first = _seed(value)
    return [(first + index) % (MAX_SEED + 1) for index in range(count)]


def _seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= MAX_SEED:
        raise UserError(f"seed: expected an integer from 0 to 2^64 - 1, got {value!r}")
    return int(value)


def as_pixels(name: str, value: object, size: int) -> tuple[Tensor, list[int]]:
    """A PIL image or a sequence of them, RGB of `size` x `size`: the distinct ones, and which of them each one is.

    Returns uint8 [distinct, size, size, 3] and one index per image given, so that twenty questions about one face cost
    one encoding.
    """
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    if not images:
        raise UserError(f"{name}: expected at least one image, got an empty list")
    slots: dict[int, int] = {}  # id of a picture object -> its index among the distinct ones
    pixels: list[np.ndarray] = []
    for index, image in enumerate(images):
        if id(image) not in slots:
            where = name if len(images) == 1 else f"{name}[{index}]"
            slots[id(image)] = len(pixels)
            pixels.append(_pixels(where, image, size))
    return torch.from_numpy(np.stack(pixels)), [slots[id(image)] for image in images]


def _pixels(where: str, image: object, size: int) -> np.ndarray:
    if not isinstance(image, Image.Image):
        hint = "; open files with PIL.Image.open" if isinstance(image, (str, Path)) else ""
        raise UserError(f"{where}: expected a PIL image, got {type(image).__name__}{hint}")
    if image.mode != "RGB" or image.size != (size, size):
        raise UserError(
            f"{where}: expected an RGB image of {size} x {size} pixels, got {image.mode} of {image.width} x "
            f'{image.height}; convert it with image.convert("RGB").resize(({size}, {size}))'
        )
    try:
        return np.array(image)
    except OSError as error:  # PIL reads lazily: a truncated file shows here
        raise UserError(f"{where}: expected a complete image, got a truncated or corrupt file ({error})") from error


def as_keep_mask(value: object, size: int) -> Tensor:
    """bool [size, size], True where a pixel is kept: a black-and-white or grey PIL image, or a bool array."""
    expected = f"known_mask: expected a PIL image of mode 1 or L (white = keep) or a bool array, {size} x {size}"
    if isinstance(value, Image.Image):
        if value.mode not in ("1", "L"):
            raise UserError(f'{expected}, got a PIL image of mode {value.mode}; convert it with mask.convert("L")')
        mask = np.array(value.convert("L")) >= KEEP_LEVEL
    elif isinstance(value, (np.ndarray, Tensor)):
        mask = value.cpu().numpy() if isinstance(value, Tensor) else value
        if mask.dtype != np.bool_:
            raise UserError(f"{expected}, got an array of {mask.dtype}; compare it with a level, e.g. mask > 0")
    else:
        raise UserError(f"{expected}, got {type(value).__name__}")
    if mask.shape != (size, size):
        raise UserError(f"{expected}, got {' x '.join(map(str, mask.shape[::-1]))}")
    return torch.from_numpy(np.array(mask))


def kept_cells(keep: Tensor, grid: int) -> Tensor:
    """bool [grid * grid]: token cells whose pixels are all kept. keep: bool [size, size]."""
    cell = keep.shape[0] // grid
    return keep.view(grid, cell, grid, cell).all(3).all(1).flatten()


def open_image(path: str | Path) -> Image.Image:
    """A picture file, read completely and turned as its camera says; `UserError` where it is missing or no picture."""
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"{path}: expected a picture file, found a pipe or device")  # which might never end
    try:
        with Image.open(path) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected a picture file, found none") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: expected a picture file, found a folder") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        # Pillow reports broken files as any of these.
        raise UserError(f"{path}: expected a readable picture, got: {str(error).splitlines()[0]}") from error
    if turned.mode.startswith(("I", "F")):  # Pillow would clip them to 255
        raise UserError(f"{path}: expected a picture of 8 bits per channel, got {turned.mode}")
    return turned


def open_mask(path: str | Path, size: int, fit: bool) -> Image.Image:
    """A picture file as a grey mask of `size` x `size`; `fit` crops and resizes it to that."""
    image = open_image(path)
    if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:  # is what lies below white or black?
        raise UserError(f"{path}: expected a mask of white (kept) and black, got one with transparent pixels")
    mask = image.convert("L")
    if fit:
        return ImageOps.fit(mask, (size, size))
    if mask.size != (size, size):
        raise UserError(
            f"{path}: expected a picture of {size} x {size} pixels, got {mask.width} x {mask.height}; --fit crops and "
            "resizes it"
        )
    return mask


def open_face(path: str | Path, size: int, fit: bool) -> Image.Image:
    """A picture file as a model takes it, RGB of `size` x `size`; `fit` crops, resizes and converts it to that."""
    image = open_image(path)
    if fit:
        return ImageOps.fit(image.convert("RGB"), (size, size))
    if image.mode != "RGB" or image.size != (size, size):
        raise UserError(
            f"{path}: expected an RGB picture of {size} x {size} pixels, got {image.mode} of {image.width} x "
            f"{image.height}; --fit crops, resizes and converts it"
        )
    return image


def as_device(device: torch.device | str | None) -> torch.device:
    """A device that is there: cpu or cuda; None takes CUDA where there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device: expected a name such as cpu or cuda, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected cpu or cuda, got {device!r}")
    found = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= found:
        expected = f"cpu or one of {found} CUDA devices" if found else "cpu, as there is no CUDA device here"
        raise UserError(f"device: expected {expected}, got {str(device)!r}")
    return chosen
