"""Where and when figures were taken: commit, date, processor, versions. A number without these says nothing."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from unif2ace import native

ROOT = Path(__file__).resolve().parent.parent


def facts(device: str) -> dict[str, object]:
    """Plain values for JSON."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(ROOT),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit(root: Path) -> str | None:
    """Abbreviated commit of the checkout, "-dirty" behind it where tracked files differ; None outside one."""
    found = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def processor() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def isa() -> str:
    """The instruction set the compiled module chose; torch's own choice where there is no compiled module."""
    build = native.build_info()
    return str(build["cpu"]["isa"]) if build is not None else torch.backends.cpu.get_cpu_capability().lower()
