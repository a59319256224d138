"""Build script: the Python package, and the compiled module `unif2ace._C` where a C++ compiler is at hand.

Metadata lives in pyproject.toml; this file only decides what can be compiled here.

* No torch or no C++ compiler: the package still installs, and one message says what is missing. Every op keeps its
  reference implementation, `unif2ace doctor` repeats the reason.
* A compiler, but no nvcc or a CPU-only torch: the CPU sources (`csrc/*.cpp`, `csrc/cpu/*.cpp`).
* nvcc and a CUDA torch: `csrc/cuda/*.cu` as well.

All torch calls go through the LibTorch stable ABI (`TORCH_TARGET_VERSION` = 2.10), so a build made against one torch
loads in any torch >= 2.10. The compiler may not contract a*b+c into one rounding: routing indices have to be identical
on every machine. No `-march=native` either: hot loops carry their own AVX2 / AVX-512 versions, chosen at run time.

`UNIF2ACE_SANITIZE=1` compiles for GCC's address and undefined-behaviour sanitizers. Such a module loads only into a
Python that was started with the sanitizers' run-time library, so build it into a folder of its own; the whole recipe is
tests/test_sanitizers.py:

    UNIF2ACE_SANITIZE=1 python setup.py build --build-lib build/sanitize --build-temp build/sanitize-objects
"""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # 2.10: the first release whose stable ABI has parallel_for and typed pointers
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",  # a square root is one instruction, of a vector too, if nobody asks for errno
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-maybe-uninitialized",  # GCC 12 is wrong about arrays of vector types
    "-Wno-psabi",  # vector types only travel through inlined functions: their calling convention does not matter
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
LINK_FLAGS = []
if os.environ.get("UNIF2ACE_SANITIZE") == "1":
    # The last of several -O and -g counts. Python's own flags have -fwrapv, which would hide signed overflow; checked
    # containers of the standard library see an index past the end that stays inside of the allocation.
    LINK_FLAGS = ["-fsanitize=address,undefined,float-cast-overflow"]
    CXX_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS", *LINK_FLAGS]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
CUDA_ARCHITECTURES = "8.0+PTX;9.0a"  # A100 and Hopper; the PTX of 8.0 carries the code to later chips


def sources(pattern: str) -> list[str]:
    """Files under csrc/ that match, relative to the repository root (setuptools refuses absolute paths)."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


def why_no_compiler() -> str | None:
    """The reason the compiled module cannot be built here, or None."""
    if platform.system() == "Windows":
        return "Windows is not supported by the compiled module"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in the building environment (install torch first, then pip --no-build-isolation)"
    # torch's build command asks for $CXX or `c++`; where only another name exists, set it.
    wanted = [os.environ["CXX"].split()[0]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    found = next((name for name in wanted if shutil.which(name)), None)
    if found is None:
        return f"no C++ compiler: {' / '.join(wanted)} not found (Debian: apt install g++; or set CXX)"
    os.environ.setdefault("CXX", found)
    return None


def compiled_module() -> tuple[list[Extension], dict[str, type]]:
    """The extension and its build command; two empty containers, and a message, where it cannot be built."""
    reason = why_no_compiler()
    if reason is not None:
        print(f"unif2ace: installing WITHOUT the compiled module: {reason}.", file=sys.stderr)
        print("unif2ace: the reference implementations of all ops still work.", file=sys.stderr)
        return [], {}
    import torch
    from torch.utils import cpp_extension

    files = sources("*.cpp") + sources("cpu/*.cpp")
    cuda_files = sources("cuda/*.cu")
    with_cuda = bool(cuda_files) and torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    device = "cuda" if with_cuda else "cpu"
    macros = [
        ("UNIF2ACE_BUILD_TORCH", f'"{torch.__version__}"'),
        ("UNIF2ACE_BUILD_FLAGS", '"' + " ".join(CXX_FLAGS) + '"'),
    ]
    libraries = ["c10", "torch", "torch_cpu"]
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        files += cuda_files
        libraries += ["cudart", "c10_cuda", "torch_cuda"]
        macros += [("UNIF2ACE_WITH_CUDA", None), ("UNIF2ACE_BUILD_CUDA", f'"{torch.version.cuda}"'), ("USE_CUDA", None)]
    extension = Extension(
        name="unif2ace._C",
        sources=files,
        depends=sources("**/*.h") + sources("**/*.cuh"),
        include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths(device_type=device)],
        library_dirs=cpp_extension.library_paths(device_type=device),
        libraries=libraries,
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=LINK_FLAGS,
        language="c++",
    )
    # ninja, where installed, compiles the files in parallel and only those that changed.
    return [extension], {
        "build_ext": cpp_extension.BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)
    }


extensions, commands = compiled_module()
setup(
    # `kernels/` has no __init__.py and arrives through the symlink unif2ace/kernels: hence namespace packages. Never a
    # bare find_packages(): it would also install a top-level `kernels` and hide Hugging Face's package of that name.
    packages=find_namespace_packages(include=["unif2ace", "unif2ace.*"]),
    package_data={"unif2ace": ["bundled/**"], "unif2ace.kernels": ["tuning/*.json"]},
    include_package_data=False,
    ext_modules=extensions,
    cmdclass=commands,
)
