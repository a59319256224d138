"""Compile csrc/cuda/*.cu for chips that need not be here, with the flags of setup.py.

The stable ABI keeps torch's CUDA headers out of these sources, so nvcc and a CPU build of torch are enough.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

from unif2ace.errors import UserError
from unif2ace.resources import cubin
from unif2ace.resources.kernel import Kernel, architecture

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def why_not() -> str | None:
    """Why the CUDA sources cannot be compiled here, or None."""
    if not sources():
        return "no csrc/cuda/*.cu beside the package: CUDA sources are read in a checkout of the repository"
    if shutil.which("nvcc") is None:
        return "nvcc is not installed (NVIDIA CUDA toolkit)"
    return None


def sources() -> list[Path]:
    """The CUDA sources, by name."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_source(source: Path, capability: int) -> list[Kernel]:
    """The kernels of one source, which is named for its op."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.cubin"
        include = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths(device_type="cpu"))]
        command = ["nvcc", "-cubin", f"-arch={architecture(capability)}", *FLAGS, "-DUSE_CUDA", *include]
        done = subprocess.run([*command, "-o", output, source], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"nvcc does not compile {source.relative_to(ROOT)}:\n{done.stderr}")
        facts = cubin.read(output)
    return [
        Kernel(source.stem, _readable(name), "cuda", capability, "", "", {}, 0, found) for name, found in facts.items()
    ]


def _readable(mangled: str) -> str:
    """ "void unif2ace::sample<float, 4>(float*, ..)" as "sample<float, 4>"; the mangled name without a demangler."""
    tool = next((path for path in map(shutil.which, ("cu++filt", "c++filt")) if path), None)
    if tool is None:
        return mangled
    name = subprocess.run([tool, mangled], check=True, capture_output=True, text=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = name[: name.rindex("(")] if "(" in name else name
    head, bracket, arguments = name.partition("<")
    return head.rsplit("::", 1)[-1] + bracket + arguments
