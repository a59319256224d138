"""`unif2ace bench OP`: the repository's own benchmark of one op, for users of a checkout.

`benchmarks/` is no part of the installed package, so it is imported when asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from unif2ace.errors import UserError
from unif2ace.ops import BACKENDS, _registry

ROOT = Path(__file__).resolve().parents[2]


def bench_op(
    op: str,
    *,
    device: str = "cpu",
    shapes: Sequence[str] = (),
    backends: Sequence[str] = (),
    threads: int | None = None,
    as_json: bool = False,
    trace: str | None = None,
) -> None:
    """Run `benchmarks/bench_<op>.py` and print its table, or with `as_json` one object.

    Args:
        op: name of the file. device: "cpu" or "cuda".
        shapes: names in `benchmarks/shapes.py`; none takes the short list.
        backends: some of ours (whole models also have "auto"), "peers" for the others'; none takes all that
            run here. The reference always runs.
        trace: write a Chrome trace with one call of every variant there.

    Raises `UserError` outside a checkout, for names that are not known or cannot run, and, after the table, where a
    variant failed its correctness gate.
    """
    known = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))
    if op not in known:
        hint = "" if known else "; ops are timed in a checkout of the repository only"
        raise UserError(f"bench: expected one of {', '.join(['generate', 'train', *known])}, got {op!r}{hint}")
    for backend in backends:
        if backend not in (*BACKENDS, "auto", "peers"):
            raise UserError(f"bench: expected back ends among {', '.join(BACKENDS)}, auto, peers; got {backend!r}")
        if backend in BACKENDS and importlib.util.find_spec(f"unif2ace.ops.{op}") is not None:
            _registry.choose(op, backend, torch.device(device))
    try:
        importlib.import_module("pytest_benchmark")
    except ImportError as error:
        raise UserError("bench: timing an op needs pytest-benchmark: pip install pytest-benchmark") from error
    run, report = _benchmarks("run"), _benchmarks("report")
    selection = run.Selection([op], device, shapes=shapes, backends=backends, threads=threads, trace_file=trace)
    record = run.run(selection)
    if as_json:
        found = [result.info for result in report.results(record)]
        print(json.dumps({"what": op, "results": found, "red": record["red"]}, indent=2))
    else:
        print(report.table(record))
    if record["red"]:
        raise UserError(f"bench: {len(record['red'])} of the benchmarks of {op} failed: {record['red'][0]['reason']}")


def tune_op(op: str, shapes: Sequence[str] = ()) -> Path:
    """Measure launch configurations of the Triton kernels of `op` on this GPU; the path of the table written.

    Raises `UserError` for an op without a table, for unknown shapes, outside a checkout and without a GPU.
    """
    if op != "experts":
        raise UserError(f"bench: --tune is for experts, whose launches have a table, not for {op}")
    if not (ROOT / "benchmarks").is_dir():
        raise UserError("bench: --tune needs a checkout of the repository")
    known = _benchmarks("shapes").EXPERTS
    for name in shapes:
        if name not in known:
            raise UserError(f"bench: expected shapes of experts among {', '.join(known)}, got {name!r}")
    reason = _registry.why_not(op, "triton", "cuda") if torch.cuda.is_available() else "there is no CUDA device here"
    if reason is not None:
        raise UserError(f"bench: --tune measures on a GPU: {reason}")
    return _benchmarks("tune_experts").main(shapes or list(known))


def _benchmarks(name: str) -> ModuleType:
    """A module of the checkout's benchmarks/."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"benchmarks.{name}")
