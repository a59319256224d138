"""Memory that a process of ours keeps: freed tensors stay with it, for the next ones.

glibc gives large blocks back to the system as soon as they are free. A forward pass on a CPU allocates and frees tens
of megabytes in every layer, and the system hands them out again as zeroed pages, one fault for every 4 KiB: for
`avatars-tiny`, 32 faces, 300,000 faults and a third of the time (`benchmarks/bench_generation.py`).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
KEEP = 2**30  # bytes: what lies free at the end of the heap, and the largest block that comes from the heap
GROW = 2**26  # bytes by which the heap grows


def keep_freed_memory() -> bool:
    """Tell glibc to keep what this process frees, up to 1 GiB. False where there is no glibc: nothing is changed.

    It concerns the whole process, so programs decide: the command line, workers and benchmarks of this project call it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((M_MMAP_THRESHOLD, KEEP), (M_TRIM_THRESHOLD, KEEP), (M_TOP_PAD, GROW))
    return all([mallopt(option, value) == 1 for option, value in wanted])
