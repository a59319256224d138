"""Memory that a process of ours keeps: freed tensors stay with it, for the next ones.

A forward pass on a CPU allocates and frees tens of megabytes in every layer. glibc gives large free blocks back to the
system, which hands them out again as zeroed pages, with one fault for every 4 KiB: drawing 32 faces with `avatars-tiny`
can take 300,000 faults and a quarter of the time. Pages of 2 MiB, where the system offers them, save another 4 %, as
fewer of them are looked up (two cores of a Zen 5, `benchmarks/bench_generation.py`).
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
KEEP = 2**30  # bytes: what may lie free at the end of the heap, and the largest block that is taken from the heap
GROW = 2**26  # bytes by which the heap grows


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory, and torch take large pages. False where it isn't glibc's.

    It concerns the whole process, so programs decide, before their first tensor: the command line, its workers and the
    benchmarks of this project call it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own switch
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((M_MMAP_THRESHOLD, KEEP), (M_TRIM_THRESHOLD, KEEP), (M_TOP_PAD, GROW))
    return sum(mallopt(option, value) for option, value in wanted) == len(wanted)
