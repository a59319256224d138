"""Run benchmarks and print one table: `python -m benchmarks.run [OP ...] [--full] [--device cuda] [--keep NAME]`.

The suite is pytest's; this file chooses what runs, keeps pytest's own lines out of the way and puts the record where it
belongs. A benchmark that fails its correctness gate leaves no figure but a red row, and the status is 1.

Records: on a GPU `benchmarks/results/<gpu>-<date>.json`, under version control; on a CPU, where figures tell little of
other machines, `out/bench/` outside it, except when `--keep NAME` makes one that the README may cite.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.machine import ROOT
from unif2ace.errors import UserError
from unif2ace.files import check_folder, write_text

FOLDER = ROOT / "benchmarks"
# No caches, no tables: output is shown only where the suite cannot run. File and function names stand here as well as
# in pyproject.toml because `benchmarks.compare` runs this file in older checkouts.
PYTEST = [
    *("-q", "--no-header", "--tb=short", "--benchmark-quiet", "-p", "no:cacheprovider"),
    *("--import-mode=importlib", "--continue-on-collection-errors"),
    *("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"),
]


@dataclass(frozen=True)
class Selection:
    """What to run: files `bench_<op>.py` (all when empty), and the options of `benchmarks/conftest.py`."""

    ops: Sequence[str] = ()
    device: str = "cpu"
    full: bool = False
    shapes: Sequence[str] = ()
    backends: Sequence[str] = ()
    threads: int | None = None
    seconds: float | None = None
    trace_file: str | None = None

    def arguments(self) -> list[str]:
        """For pytest."""
        listed = {"shapes": ",".join(self.shapes), "backends": ",".join(self.backends)}
        named = {**listed, "threads": self.threads, "seconds": self.seconds, "trace-file": self.trace_file}
        named["device"] = self.device
        targets = [str(FOLDER / f"bench_{op}.py") for op in self.ops or known_ops()]
        return [*targets, *(["--full"] if self.full else []), *(f"--{k}={v}" for k, v in named.items() if v)]


@dataclass(eq=False)  # pytest keeps its plugins in sets
class Watch:
    """A pytest plugin: one line of progress per benchmark, and the failures, which pytest-benchmark does not record."""

    failures: list[dict[str, object]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    done: int = 0
    total: int = 0
    interrupted: bool = False

    def pytest_keyboard_interrupt(self) -> None:
        self.interrupted = True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail({"op": _op(report.nodeid)}, report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._fail(dict(report.user_properties).get("benchmark", {"op": _op(report.nodeid)}), report)
        if report.skipped and report.when == "setup":
            self.skipped.append(report.nodeid.rpartition("/")[2])
        if report.when == "teardown":
            self.done += 1
            self._say(f"[{self.done}/{self.total}] {report.nodeid.rpartition('::')[2]}")

    def _fail(self, what: dict[str, object], report: pytest.CollectReport | pytest.TestReport) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash is not None else str(report.longrepr)
        lines = [line.strip().removeprefix("E  ").strip() for line in reason.splitlines() if line.strip()]
        shown = lines[0] if crash is not None else lines[-1]
        self.failures.append({**what, "test": report.nodeid, "reason": shown.removeprefix("AssertionError: ")})

    def _say(self, text: str) -> None:
        if sys.__stderr__.isatty():
            print(f"\r\033[K{text}", end="\n" if self.done == self.total else "", file=sys.__stderr__, flush=True)


def _op(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).stem.removeprefix("bench_")


def known_ops() -> list[str]:
    """What has a benchmark file."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def run(selection: Selection) -> dict[str, object]:
    """Run the selection; the record: pytest-benchmark's, with "red" and "skipped" (no time left) beside "benchmarks".

    Raises `UserError` for names that select nothing, `RuntimeError` with pytest's output where the suite cannot run.
    """
    watch, output = Watch(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        arguments = [*selection.arguments(), *PYTEST, f"--rootdir={FOLDER.parent}", f"--benchmark-json={path}"]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = pytest.main(arguments, plugins=[watch])
        if watch.interrupted:
            raise KeyboardInterrupt
        if status == pytest.ExitCode.USAGE_ERROR:
            raise UserError(output.getvalue().strip().splitlines()[-1].removeprefix("ERROR: "))
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
            raise RuntimeError(output.getvalue())
        record = json.loads(path.read_text()) if path.is_file() else {}  # no file where nothing was timed
    return {"benchmarks": [], **record, "red": watch.failures, "skipped": watch.skipped}


def default_path(selection: Selection, keep: str | None) -> Path:
    """Where the record of a run belongs; that of some ops does not replace that of all."""
    gpu = selection.device == "cuda"
    name = keep or "-".join(selection.ops)
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower() if gpu else "cpu"
    folder = FOLDER / "results" if gpu or keep is not None else ROOT / "out" / "bench"
    return folder / f"{'-'.join(filter(None, (device, name)))}-{datetime.date.today().isoformat()}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"some of {', '.join(known_ops())} (default: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--full", action="store_true", help="every shape")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--keep", metavar="NAME", help="write the record into benchmarks/results/")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in known_ops():
            parser.error(f"expected one of {', '.join(known_ops())}, got {op!r}")
    selection = Selection(options.ops, options.device, options.full, threads=options.threads)
    path = options.out or default_path(selection, options.keep)
    try:
        check_folder(path.parent)
        record = run(selection)
        write_text(path, json.dumps(record, indent=1))
    except (UserError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 130
    print(report.table(record))
    print(f"record: {path}")
    return 1 if record["red"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
