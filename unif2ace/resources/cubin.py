"""Facts out of machine code (a cubin): resources of each function, and the instructions that tell how it works.

The tools that read it come with Triton's wheel (triton/backends/nvidia/bin).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

_FUNCTION = re.compile(r"Function (\S+):\s*\n\s*(REG:.*)")
_SASS_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_GLOBAL_LOAD = re.compile(r"\b(LDG|LDGSTS|UTMALDG)\b((?:\.\w+)*)")


class Facts(NamedTuple):
    """One function of a cubin.

    `spill_bytes` counts local memory per thread: registers that did not fit, or arrays indexed at run time; both are
    slow. `loads` are instructions that read global memory, `wide_loads` those of them that move 16 bytes per thread
    (or, by the bulk copy engine, whole tiles). `matrix` names the matrix instruction: wgmma, mma or "".
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    loads: int
    wide_loads: int
    matrix: str


def read(cubin: Path) -> dict[str, Facts]:
    """Facts of every kernel in the file, by its (mangled) name."""
    resources = {name: _pairs(line) for name, line in _FUNCTION.findall(_run("cuobjdump", "-res-usage", cubin))}
    pieces = _SASS_FUNCTION.split(_run("cuobjdump", "-sass", cubin))
    code = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return {name: _facts(usage, code[name]) for name, usage in resources.items() if name in code}


def _facts(usage: dict[str, int], code: str) -> Facts:
    loads = _GLOBAL_LOAD.findall(code)
    wide = [name for name, suffixes in loads if name == "UTMALDG" or ".128" in suffixes]
    matrix = "wgmma" if "GMMA" in code else "mma" if "HMMA" in code else ""
    return Facts(usage["REG"], usage["SHARED"], usage["STACK"] + usage["LOCAL"], len(loads), len(wide), matrix)


def _pairs(line: str) -> dict[str, int]:
    """ "REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:564 .." as a dictionary."""
    return {name: int(value) for name, value in (item.rsplit(":", 1) for item in line.split())}


def _run(tool: str, *arguments: object) -> str:
    (triton,) = importlib.util.find_spec("triton").submodule_search_locations
    program = Path(triton) / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout
