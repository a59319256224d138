"""What this machine can run: back ends with reasons, versions, processor, GPU, build.

`report()` gathers facts (a dictionary that `json.dumps` accepts), `format_report()` lays them out for a terminal.
Nothing is downloaded; the compiled module and Triton are asked to load, since that is the question.
"""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import unif2ace
from unif2ace import native, ops
from unif2ace.ops import _registry, _varlen

# Packages that change what can run or how fast; the first group is required, the second optional.
REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "pillow", "pyarrow", "vector-quantize-pytorch")
OPTIONAL = (
    "triton",
    "flash-attn",
    "flash-attn-4",
    "transformers",
    "onnxruntime",
    "huggingface_hub",
    "pytest-benchmark",
)


def report() -> dict[str, object]:
    """Facts about this installation.

    Returns:
        A dictionary of plain values: `unif2ace` and `python` versions, `platform`, `packages` (name -> version or
        None), `cpu`, `gpu` (list, one dictionary per device), `native` (build facts, or the reason there is none),
        `attention`: the libraries for attention on CUDA in the order they are tried, "ready" or the reason why not, and
        `backends`: rows with op, backend, device, available and reason, for the CPU and for CUDA where there is one.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = [
        {**row._asdict(), "device": device}
        for device in devices
        for row in sorted(_registry.status(device), key=lambda row: row.op)
    ]
    return {
        "unif2ace": unif2ace.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "cpu": _cpu(),
        "gpu": [_gpu(index) for index in range(torch.cuda.device_count())],
        "native": {"available": native.why_not() is None, "reason": native.why_not(), "build": native.build_info()},
        "attention": _attention(),
        "default_backend": ops.default_backend(),
        "backends": rows,
    }


def format_report(facts: dict[str, object]) -> str:
    """`report()` as aligned text, for people."""
    packages: dict[str, str | None] = facts["packages"]
    cpu: dict[str, object] = facts["cpu"]
    lines = [f"unif2ace {facts['unif2ace']}, Python {facts['python']}, {facts['platform']}", ""]
    lines += _section("packages", [(name, version or "not installed") for name, version in packages.items()])
    lines += _section("processor", list(cpu.items()))
    gpus = [(f"GPU {i}", ", ".join(f"{k} {v}" for k, v in gpu.items())) for i, gpu in enumerate(facts["gpu"])]
    lines += _section("GPU", gpus or [("none", "torch.cuda.is_available() is False")])
    build = facts["native"]["build"]
    native_rows = [("unif2ace._C", facts["native"]["reason"] or "ready")]
    if build is not None:
        native_rows += [(name, value if value is not None else "no") for name, value in build.items() if name != "cpu"]
    lines += _section("compiled module", native_rows)
    lines += _section("attention on CUDA, 16-bit: the first that is ready", list(facts["attention"].items()))
    lines += [f"back ends (default: {facts['default_backend']})"]
    for device in dict.fromkeys(row["device"] for row in facts["backends"]):
        lines += ["", *_table([row for row in facts["backends"] if row["device"] == device], device)]
    return "\n".join(lines) + "\n"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, object]:
    facts: dict[str, object] = {
        "architecture": platform.machine(),
        "capability of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    build = native.build_info()
    if build is not None:
        features = build["cpu"]
        facts["instruction set in use"] = features["isa"]
        facts["features"] = " ".join(name for name, present in features.items() if present is True)
    return facts


def _attention() -> dict[str, str]:
    """Library -> "ready", or why it cannot run attention on this machine's GPU (without one: on a Hopper GPU)."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return {library.name: _varlen.why_not(library, 10 * major + minor) or "ready" for library in _varlen.LIBRARIES}


def _gpu(index: int) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "CUDA of torch": torch.version.cuda,
    }


def _section(title: str, rows: list[tuple[str, object]]) -> list[str]:
    width = max(len(str(name)) for name, _ in rows)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]


def _table(rows: list[dict[str, object]], device: str) -> list[str]:
    """One line per op with yes or a note number per back end, then the notes: reasons repeat, and are long."""
    notes: dict[str, int] = {}
    op_width = max([len(row["op"]) for row in rows] + [len(device) + 4])
    lines = [f"  {'on ' + device:<{op_width}}" + "".join(f"  {name:<10}" for name in _registry.BACKENDS)]
    for op in dict.fromkeys(row["op"] for row in rows):
        cells = []
        for row in (row for row in rows if row["op"] == op):
            number = None if row["available"] else notes.setdefault(row["reason"], len(notes) + 1)
            cells.append(f"  {'yes' if number is None else f'no ({number})':<10}")
        lines.append(f"  {op:<{op_width}}" + "".join(cells))
    return [line.rstrip() for line in lines] + [f"  ({number}) {reason}" for reason, number in notes.items()]
