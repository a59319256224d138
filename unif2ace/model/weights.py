"""Weights on disk: a folder with `config.json` and `model.safetensors`.

Files appear complete or not at all: each is written beside its final name and renamed over it, so an interrupted save
leaves the previous one intact. Reading refuses anything doubtful by name: missing files, truncated files, tensors that
the configuration does not have or that have another shape.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from unif2ace.config import UniF2aceConfig
from unif2ace.errors import UserError
from unif2ace.files import replace_file, write_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save(folder: Path, config: UniF2aceConfig, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write both files; floating-point tensors are stored as `dtype` when it is given."""
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    content = tensors_to_bytes(stored, metadata={"format": "pt"})
    replace_file(folder / WEIGHTS_FILE, lambda partial: partial.write_bytes(content))
    write_text(folder / CONFIG_FILE, config.to_json())


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[UniF2aceConfig, dict[str, Tensor]]:
    """Read configuration and tensors. Raises `UserError` for missing or unreadable files."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"from_pretrained: expected a file {name} in {folder}, found none")
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"from_pretrained: {folder / CONFIG_FILE} is not text, expected JSON ({error})") from error
    config = UniF2aceConfig.from_json(text)
    try:
        state = load_file(folder / WEIGHTS_FILE, device=str(device))
    except SafetensorError as error:
        raise UserError(
            f"from_pretrained: {folder / WEIGHTS_FILE} is truncated or no safetensors file ({error})"
        ) from error
    # Slices of a mapped file start at any byte, which slows vector loads and sends matrix products down other code
    # paths, with other last bits, than the same numbers in memory of their own.
    return config, {name: tensor.clone() for name, tensor in state.items()}


def check(folder: Path, expected: dict[str, torch.Size], state: dict[str, Tensor]) -> None:
    """Raise `UserError` unless `state` has exactly the tensors and shapes of `expected`."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"from_pretrained: {folder / WEIGHTS_FILE} does not fit its configuration: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(extra)} unknown {extra[:3]}"
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UserError(
                f"from_pretrained: {folder / WEIGHTS_FILE}: {name} must be {list(shape)}, got {list(state[name].shape)}"
            )
