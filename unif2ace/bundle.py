"""A saved model: one folder with every part a pipeline needs, and how that folder is found, read and written.

config.json, model.safetensors       the transformer
generation_config.json               defaults of drawing and answering
tokenizer.json                       text <-> ids
codec.json, codec.safetensors        picture <-> codes
clip.*, face.*                       frozen encoders whose features understanding reads (where the model uses them)
judge.*                              attribute classifier that `unif2ace evaluate` scores faces with (optional)
README.md                            what it is
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from unif2ace.codec import SmallCodec
from unif2ace.codec.storage import read_config
from unif2ace.data.text import TextTokenizer
from unif2ace.errors import UserError
from unif2ace.evaluation.judge import Judge
from unif2ace.files import sha256
from unif2ace.generation.settings import GenerationConfig
from unif2ace.model.features import FeatureEncoder, SmallClipEncoder, SmallFaceEncoder
from unif2ace.model.transformer import UniF2ace

BUNDLED = Path(__file__).parent / "bundled"
GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"
ENCODERS = {"clip": SmallClipEncoder, "face": SmallFaceEncoder}
_PART_FILES = re.compile(r"(\w*config|tokenizer|codec|clip|face|judge)\.json|README\.md|\w+\.safetensors")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Parts:
    """Everything in the folder, loaded. `encoders`: name -> encoder, those the model asks for. `card`: README.md."""

    model: UniF2ace
    codec: SmallCodec
    tokenizer: TextTokenizer
    encoders: dict[str, FeatureEncoder]
    defaults: GenerationConfig
    judge: Judge | None = None
    card: str = ""

    def __post_init__(self) -> None:
        config, codec, tokenizer = self.model.config, self.codec, self.tokenizer
        _same("image size", codec.image_size, config.image_size, "codec")
        _same("number of image tokens", codec.num_tokens, config.num_image_tokens, "codec")
        _same("number of image codes", codec.codebook_size, config.codebook_size, "codec")
        _same("id of the end-of-text token", tokenizer.end_of_text, config.end_of_text, "tokenizer")
        if tokenizer.size > config.n_text:
            raise UserError(f"model: its tokenizer has {tokenizer.size} ids, expected at most n_text = {config.n_text}")
        for name in feature_names(self.model):
            if name not in self.encoders:
                raise UserError(f"model: its configuration needs the encoder {name!r}, got {sorted(self.encoders)}")
            encoder = self.encoders[name]
            shape = (encoder.num_rows, encoder.width)
            _same("feature shape", shape, config.sequence_moe.feature_shape(name), f"encoder {name!r}")
            _same("image size", encoder.image_size, config.image_size, f"encoder {name!r}")


def _same(what: str, found: object, expected: object, part: str) -> None:
    if found != expected:
        raise UserError(f"model: its configuration expects the {what} {expected}, but its {part} has {found}")


def feature_names(model: UniF2ace) -> tuple[str, ...]:
    """The external features that understanding reads in this model."""
    return () if model.config.sequence_moe is None else model.config.sequence_moe.feature_names("understanding")


def bundled_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(folder.name for folder in BUNDLED.glob("*") if (folder / "config.json").is_file())


def resolve_folder(name: str | Path) -> Path:
    """The folder of a bundled model, else of a path, else of a hub id "owner/name" (downloaded, then cached)."""
    if not isinstance(name, (str, Path)) or not str(name):
        raise UserError(f"model: expected a name, a folder or a hub id, got {name!r}")
    if str(name) in bundled_names():
        return BUNDLED / str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not folder.exists():
        return _download(name)
    known = ", ".join(bundled_names()) or "none in this installation"
    raise UserError(f"model: expected a bundled name ({known}), a folder or a hub id owner/name, got {str(name)!r}")


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"model: {name!r} is no folder here, and reading it from the hub needs huggingface_hub: "
            "pip install 'unif2ace[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:  # the library's HTTP errors are OSErrors, its bad names ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model: {name!r} is no folder here and could not be read from the hub: {reason}") from error


def load_defaults(folder: Path) -> GenerationConfig:
    """How the model in `folder` draws and answers unless it is told otherwise."""
    return read_config(folder / GENERATION_FILE, GenerationConfig)


def model_sha256(folder: Path) -> str:
    """One hex digest of everything in `folder` that results depend on: configurations, weights, codec, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        if path.stem != "judge":
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def load_parts(folder: Path, device: torch.device, dtype: torch.dtype) -> Parts:
    """Read every part of `folder`. Raises `UserError` for a missing, corrupt or unfitting one."""
    model = UniF2ace.from_pretrained(folder, device=device, dtype=dtype)
    card = folder / CARD_FILE
    return Parts(
        model=model,
        codec=SmallCodec.from_pretrained(folder).to(device),
        tokenizer=TextTokenizer.from_pretrained(folder),
        encoders={name: ENCODERS[name].from_pretrained(folder).to(device) for name in feature_names(model)},
        defaults=load_defaults(folder),
        judge=Judge.from_pretrained(folder).to(device) if (folder / "judge.json").is_file() else None,
        card=card.read_text(encoding="utf-8") if card.is_file() else "",
    )


def save_parts(parts: Parts, folder: Path) -> Path:
    """Write `parts` beside `folder` and swap it in, so that readers see the old folder or the whole new one."""
    if folder.exists():
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
        foreign = [name for name in names if not _PART_FILES.fullmatch(name)]
        if foreign or not folder.is_dir():
            found = f"one with {foreign[0]!r}" if folder.is_dir() else "a file"
            raise UserError(f"{folder}: expected a new folder or one that holds a saved model, got {found}")
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        partial.mkdir(parents=True)
        _write(parts, partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the model: {error.strerror or error}") from error
    finally:
        if old.exists() and not folder.exists():  # failed or interrupted between the two renames
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _write(parts: Parts, folder: Path) -> None:
    parts.model.save_pretrained(folder)
    parts.codec.save_pretrained(folder, dtype=None)  # None: as loaded, so that a copy draws the same faces
    parts.tokenizer.save_pretrained(folder)
    for encoder in parts.encoders.values():
        encoder.save_pretrained(folder, dtype=None)
    if parts.judge is not None:
        parts.judge.save_pretrained(folder, dtype=None)
    defaults = json.dumps(dataclasses.asdict(parts.defaults), indent=2) + "\n"
    (folder / GENERATION_FILE).write_text(defaults, encoding="utf-8")
    (folder / CARD_FILE).write_text(parts.card or _card(parts), encoding="utf-8")


def _card(parts: Parts) -> str:
    config = parts.model.config
    return (
        f"# {config.num_parameters() / 1e6:.1f} M-parameter UniF2ace model\n\n"
        f"Draws and describes faces of {config.image_size} x {config.image_size} pixels, {config.num_image_tokens} "
        f"tokens of {config.codebook_size} codes; {config.num_parameters(active=True) / 1e6:.1f} M parameters are "
        "active per token.\n\n"
        "    from unif2ace.pipeline import UniF2acePipeline\n"
        '    pipe = UniF2acePipeline.from_pretrained("this folder")\n'
        '    pipe.generate("a smiling person with red hair")[0].save("face.png")\n'
    )
