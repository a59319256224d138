"""CUDA sources run on the CPU by the emulator of thread blocks in tests/emulator: proof where there is no GPU.

`load("routing", "route", "route_backward")` compiles csrc/cuda/routing.cu with the C++ compiler and gives its
registered ops as CPU ops of the namespace `unif2ace_emulated`, under the schemas of `unif2ace_native`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
CXX = os.environ.get("CXX", "c++").split()[0]
FLAGS = (
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-w",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


def why_not() -> str | None:
    """Why the emulator cannot be compiled here, or None."""
    return None if shutil.which(CXX) is not None else f"no C++ compiler: {CXX} not found"


@cache
def load(op: str, *names: str) -> SimpleNamespace:
    """The ops by name, `setup(multiprocessors, reversed)`: how many blocks run at once, and in which order threads;
    and `launches()`: how many kernels were launched so far.

    Cost: a few seconds of compiling, once per process.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "emulated.so"
        include = [ROOT / "tests" / "emulator", ROOT / "csrc", *cpp_extension.include_paths(device_type="cpu")]
        source = ROOT / "tests" / "emulator" / "emulated.cpp"
        command = [CXX, *FLAGS, "-DUSE_CUDA", f'-DUNIF2ACE_SOURCE="cuda/{op}.cu"', *(f"-I{path}" for path in include)]
        libraries = [*(f"-L{path}" for path in cpp_extension.library_paths("cpu")), "-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run([*command, source, *libraries, "-o", output], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        module = ctypes.CDLL(str(output))
    library = torch.library.Library("unif2ace_emulated", "FRAGMENT")
    for name in names:
        schema = str(getattr(torch.ops.unif2ace_native, name).default._schema)
        library.define(schema.removeprefix("unif2ace_native::"))
    ops = {name: getattr(torch.ops.unif2ace_emulated, name).default for name in names}
    return SimpleNamespace(**ops, setup=module.emulator_setup, launches=module.emulator_launches, library=library)
