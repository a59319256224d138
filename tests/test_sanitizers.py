"""The op tests again, on a compiled module that the address and undefined-behaviour sanitizers watch.

A kernel that reads one element too many usually gets away with it; here it ends the process. The sanitized module is
compiled into build/sanitize (setup.py has the flags), together with a copy of the package, so the module in use stays
as it is. Sanitizers have to be in a process from its start: each run is a Python of its own under LD_PRELOAD. Its
leak detector is off, since Python and torch keep memory until the end on purpose.

The vector code differs from one instruction set to the next. The op tests run on the widest of this machine, the fuzz
tests on all of them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
CXX = os.environ.get("CXX", "c++").split()[0]
# libstdc++ too: the address sanitizer looks for its exceptions when the process starts, and Python does not link it.
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")

# Tests without native code for CPUs (`reference`, `triton`, `cuda`, gradcheck), those that compare its bits or its
# memory use with a normal build, and torch.compile, which is slow here and calls the same ops.
UNWANTED = "reference or gradcheck or compiles or instruction_set or memory or triton or cuda"

pytestmark = pytest.mark.slow


def library(name: str) -> str | None:
    """The full path of one of the compiler's libraries, or None where it has none of this name."""
    found = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return str(Path(found).resolve()) if os.path.isabs(found) else None


def why_not() -> str | None:
    """Why the sanitizers cannot run here, or None."""
    if platform.system() != "Linux":
        return "LD_PRELOAD of the sanitizers' libraries is for Linux"
    if shutil.which(CXX) is None:
        return f"no C++ compiler: {CXX} not found"
    missing = [name for name in LIBRARIES if library(name) is None]
    return f"{CXX} comes without {', '.join(missing)} (GCC on Debian: apt install g++)" if missing else None


REASON = why_not()
needs_sanitizers = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments under the sanitizers, on the package of the sanitized build."""
    environment = {
        "LD_PRELOAD": ":".join(str(library(name)) for name in LIBRARIES),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": f"{BUILD}{os.pathsep}{ROOT}",
        "PYTHONSAFEPATH": "1",  # the checkout comes second, also for `python -c`
        "OMP_NUM_THREADS": "2",  # fewer threads than chunks, and more than one
        **environment,
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def run_tests(*arguments: str, **environment: str) -> None:
    """Run pytest under the sanitizers; fail with the first report of a sanitizer, or the end of what pytest said."""
    # Only sys is captured: a sanitizer writes to file descriptor 2 and ends the process, and its report has to survive.
    options = ("-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-o", "pythonpath=")
    done = run("-m", "pytest", *options, *arguments, **environment)
    found = re.search(r"^.*(ERROR: AddressSanitizer|runtime error:)", done.stderr, re.MULTILINE)
    report = done.stderr[found.start() :][:6000] if found else done.stdout[-4000:] + done.stderr[-4000:]
    assert found is None, report
    assert done.returncode == 0, f"status {done.returncode}\n{report}"


@pytest.fixture(scope="module")
def sanitized_build() -> None:
    """Compile what changed, and make sure that it is this build that the runs below load."""
    folders = ["--build-lib", str(BUILD), "--build-temp", f"{BUILD}-objects"]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", *folders],
        cwd=ROOT,
        env={**os.environ, "UNIF2ACE_SANITIZE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    done = run("-c", "from unif2ace import native; print(native.build_info()['flags'], native.load().__file__)")
    assert done.returncode == 0, done.stderr
    assert "-fsanitize=address" in done.stdout
    assert str(BUILD) in done.stdout


@needs_sanitizers
def test_an_overflow_ends_the_process():
    """The runs below prove something only if a sanitizer in such a process stops it."""
    done = run("-c", "import ctypes; ctypes.memset(ctypes.create_string_buffer(1000), 1, 1001)")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@needs_sanitizers
@pytest.mark.usefixtures("sanitized_build")
def test_op_tests_under_the_sanitizers():
    run_tests("tests/ops", "-m", "not slow", "-k", f"not ({UNWANTED})")


@needs_sanitizers
@pytest.mark.usefixtures("sanitized_build")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_fuzz_under_the_sanitizers(capability: str):
    run_tests("tests/fuzz", ATEN_CPU_CAPABILITY=capability, UNIF2ACE_FUZZ_EXAMPLES="100")
