"""All rows of the table of kernel resources, compiled on all cores, and the table as text."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from unif2ace.errors import UserError
from unif2ace.resources import cuda
from unif2ace.resources.calls import CALLS
from unif2ace.resources.kernel import SHARED_LIMITS, Kernel


def kernels(ops: list[str] | None = None) -> list[Kernel]:
    """Compile every shipped configuration (of these ops, default all) for all chips of `SHARED_LIMITS`.

    Cost: seconds for each configuration the first time; Triton keeps what it compiled in its cache.

    Raises:
        UserError: an op without GPU kernels, no Triton, or Triton's interpreter is on.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "kernel resources need Triton, which brings the tools that read machine code: pip install triton"
        )
    available = list(dict.fromkeys([*CALLS, *(path.stem for path in cuda.sources())]))
    unknown = [op for op in ops or [] if op not in available]
    if unknown:
        raise UserError(f"no GPU kernels of {unknown[0]!r}; there are kernels of {', '.join(available)}")
    jobs = [(_job, op, capability) for op in ops or available for capability in SHARED_LIMITS]
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(*job) for job in jobs]
        return [row for future in futures for row in future.result()]


def _job(op: str, capability: int) -> list[Kernel]:
    rows = []
    if op in CALLS:
        from unif2ace.resources.triton import launches  # here: Triton is not installed everywhere

        rows += launches(op, capability)
    if cuda.why_not() is None:
        rows += [row for path in cuda.sources() if path.stem == op for row in cuda.compile_source(path, capability)]
    return rows


def format_kernels(rows: list[Kernel]) -> str:
    """The rows as aligned text and, last, the verdict."""
    head = ("kernel", "arch", "dtype", "warps", "registers", "shared KiB", "spills", "matrix", "wide loads", "launch")
    table = [head, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head) - 1)]
    lines = ["  ".join([*(f"{x:<{w}}" for x, w in zip(line, widths, strict=False)), line[-1]]) for line in table]
    bad = [f"{row.op}: {row.name} on {row.arch}: {problem}" for row in rows for problem in row.problems()]
    lines += ["", f"{len(rows)} kernels: " + ("no spills, everything within the limits" if not bad else "NOT good:")]
    if cuda.why_not() is not None:
        bad.append(f"without the CUDA sources: {cuda.why_not()}")
    return "\n".join([*(line.rstrip() for line in lines), *bad]) + "\n"


def _cells(row: Kernel) -> tuple[str, ...]:
    facts = row.facts
    launch = [f"[{row.call}]"] if row.call else []
    launch += [f"{name}={value}" for name, value in row.configuration.items()]
    return (
        f"{row.op}: {row.name}" + (" (CUDA)" if row.source == "cuda" else ""),
        row.arch,
        row.dtype,
        str(row.threads // 32 or ""),
        str(facts.registers),
        f"{facts.shared_bytes / 1024:.1f}",
        str(facts.spill_bytes),
        facts.matrix,
        f"{facts.wide_loads}/{facts.loads}",
        " ".join(launch),
    )
