"""Freed memory stays with the process, where the system's allocator would give it back."""

import subprocess
import sys

import pytest

PROGRAM = """
import os
import torch
from unif2ace.memory import keep_freed_memory

def resident():  # bytes
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def left_by_tensors():
    before = resident()
    some = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each
    del some
    return (resident() - before) >> 20

torch.ones(1)
usual = left_by_tensors()
kept = keep_freed_memory()
print(kept, usual, left_by_tensors())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_kept():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, *left = run.stdout.split()
    if kept == "False":
        pytest.skip("not glibc")
    usual, with_switch = map(int, left)
    assert usual < 64  # of 256 MiB
    assert with_switch > 192
