"""The same bits every time: for any number of threads, and for every instruction set of the compiled module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unif2ace import native

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = torch.get_default_device().type == "cpu"
needs_native = pytest.mark.skipif(
    native.load() is None or not ON_CPU, reason=native.why_not() or "about the kernels for CPUs"
)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own, in the repository's root, with one thread."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def assert_same_for_threads(run: Callable[[], Sequence[Tensor]], counts: Sequence[int] = (1, 2, 5)) -> None:
    """`run()` returns equal tensors with each number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for count, results in zip(counts[1:], found[1:], strict=True):
        for number, (one, many) in enumerate(zip(found[0], results, strict=True)):
            assert torch.equal(one, many), f"result {number} differs between {counts[0]} and {count} threads"


def assert_same_in_any_company(
    run: Callable[[Tensor], Tensor], inputs: Tensor, counts: Sequence[int] = (1, 2, 3)
) -> None:
    """`run(inputs)` gives each input the same bits alone and among any others, with each number of threads."""
    before, alone = torch.get_num_threads(), None
    try:
        for count in counts:
            torch.set_num_threads(count)
            alone = torch.cat([run(one[None]) for one in inputs]) if alone is None else alone
            for number in range(1, len(inputs) + 1):
                order = torch.randperm(len(inputs))[:number]
                found = run(inputs[order])
                assert torch.equal(found, alone[order]), f"{number} inputs together, {count} threads"
    finally:
        torch.set_num_threads(before)


def assert_same_on_instruction_sets(program: str) -> None:
    """`program` fills `digest` (hashlib.sha256()) with results; ATEN_CPU_CAPABILITY, torch's own variable, narrows the
    instruction set. Inputs should be whole numbers or exact fractions: torch draws normal numbers differently per set.
    """
    seen = {}
    head = "import hashlib, torch\nfrom unif2ace import native, ops\ndigest = hashlib.sha256()\n"
    tail = "\nprint(native.build_info()['cpu']['isa'], digest.hexdigest())"
    for capability in ("default", "avx2", "avx512"):
        done = run_python(head + program + tail, ATEN_CPU_CAPABILITY=capability)
        assert done.returncode == 0, done.stderr
        isa, digest = done.stdout.split()
        seen[isa] = digest
    assert "baseline" in seen
    assert len(set(seen.values())) == 1, seen
