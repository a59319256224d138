"""How a small network lies on disk: `<stem>.safetensors` with its weights and `<stem>.json` with its configuration.

The JSON is written last, so a folder that has it has both.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from unif2ace.errors import UserError
from unif2ace.files import replace_file, write_text

Config = TypeVar("Config")


def save_network(folder: str | Path, stem: str, module: nn.Module, config: object, dtype: torch.dtype | None) -> None:
    """Write both files into `folder`; floating-point weights are stored as `dtype` where one is given."""
    folder = Path(folder)
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for name, value in module.state_dict().items()
    }
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    # Not safetensors' own save_file: it leaves a file that only its owner may read.
    replace_file(folder / f"{stem}.safetensors", lambda partial: partial.write_bytes(save(tensors)))
    write_text(folder / f"{stem}.json", text)


def read_config(path: Path, config_class: type[Config]) -> Config:
    """A dataclass from a JSON file; `UserError` for a missing or broken file, an unknown field or a value of no use."""
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected a configuration file, found none") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected JSON, got something else ({error})") from error
    known = {field.name for field in dataclasses.fields(config_class)}
    if not isinstance(fields, dict) or set(fields) - known:
        raise UserError(f"{path}: expected an object with the fields {sorted(known)}, got {str(fields)[:200]}")
    try:
        return config_class(**fields)
    except TypeError as error:
        name = config_class.__name__
        raise UserError(f"{path}: expected the values of a {name}, got {str(fields)[:200]} ({error})") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file, converting dtypes; `UserError` for a missing, corrupt or foreign file."""
    if not path.is_file():
        raise UserError(f"{path}: expected a weights file, found none")
    try:
        module.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{path}: expected a safetensors file, got a corrupt or truncated one ({error})") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: expected the weights of its configuration, got others ({reason})") from error
