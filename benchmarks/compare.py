"""Did a change make anything slower? `python -m benchmarks.compare BASE [OP ...]`, or `make compare BASE=main`.

Both revisions are measured with *this* checkout's ruler: BASE is checked out into a temporary folder, its extension is
built there, and the files of `RULER` replace its own. The other side is the working tree as it stands, built already.

Each op is timed in processes of its own, base and head in turn: A B B A A B ... What drifts over minutes (temperature,
neighbours) then meets both sides, and what differs from process to process (where memory lands) shows as scatter. A row
is flagged when the sides differ by more than their own processes do among themselves, and by `NOISE` beyond that, and
when the quartiles of their rounds do not overlap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from benchmarks.machine import ROOT, commit
from benchmarks.report import duration, markdown, results, times
from benchmarks.run import known_ops
from benchmarks.timing import quartiles

# What measures, as opposed to what is measured; of the package only files that nothing else imports.
RULER = ("benchmarks", "tests/oracle.py", "unif2ace/evaluation/speed.py", "unif2ace/evaluation/tracing.py")
NOISE = 0.03  # medians of equal code on two idle cores differ by up to 3 %
PROCESSES = 2  # per side and op

Key = tuple[str, str, str, str, str, str]  # op, shape, case, dtype, caches, variant


@dataclass(frozen=True)
class Change:
    """One row: the rounds of each process on both sides, in seconds."""

    key: Key
    old: tuple[tuple[float, ...], ...]
    new: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> tuple[float, float]:
        """Of all rounds, old and new."""
        return statistics.median(chain(*self.old)), statistics.median(chain(*self.new))

    @property
    def speedup(self) -> float:
        """Above 1: the new side is faster."""
        old, new = self.medians
        return old / new

    @property
    def scatter(self) -> float:
        """Largest ratio between the medians of two processes of one side."""
        sides = [[statistics.median(rounds) for rounds in side] for side in (self.old, self.new)]
        return max(max(medians) / min(medians) for medians in sides)

    @property
    def verdict(self) -> str:
        """ "faster", "slower", or "" where the difference drowns."""
        (old_low, old_high), (new_low, new_high) = (quartiles(list(chain(*side))) for side in (self.old, self.new))
        needed = self.scatter * (1 + NOISE)
        if self.speedup > needed and new_high < old_low:
            return "faster"
        if self.speedup < 1 / needed and new_low > old_high:
            return "slower"
        return ""


def rounds(records: Sequence[dict]) -> dict[Key, tuple[tuple[float, ...], ...]]:
    """The rounds of every row, one tuple for each of the records of one side."""
    found: dict[Key, tuple[tuple[float, ...], ...]] = {}
    for result in (result for record in records for result in results(record)):
        for variant, seconds in result.info["rounds"].items():
            key = (*result.key, result.info["cache"], variant)
            found[key] = (*found.get(key, ()), tuple(seconds))
    return found


def changes(old: Sequence[dict], new: Sequence[dict]) -> list[Change]:
    """Rows that both sides measured."""
    before, after = rounds(old), rounds(new)
    return [Change(key, before[key], seconds) for key, seconds in after.items() if key in before]


def table(old: Sequence[dict], new: Sequence[dict]) -> str:
    """Markdown: old and new median, ratio and verdict of every row; then what only one side has, and red rows."""
    titles = ("op", "shape", "case", "dtype", "caches", "variant", "old", "new", "speed", "scatter", "")
    found = changes(old, new)
    rows = [[*c.key, *map(duration, c.medians), times(c.speedup), times(c.scatter), c.verdict] for c in found]
    lines = markdown(titles, rows) if rows else ["no row was measured on both sides"]
    before, after = rounds(old), rounds(new)
    for side, keys in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        lines += [f"only {side}: {', '.join(filter(None, key))}" for key in sorted(keys)]
    for side, records in (("old", old), ("new", new)):
        red = {failure["test"]: failure["reason"] for record in records for failure in record.get("red", [])}
        lines += [f"RED {side}: {test}: {reason}" for test, reason in red.items()]
    slower, faster = (sum(c.verdict == word for c in found) for word in ("slower", "faster"))
    lines.append(
        f"{len(found)} rows: {faster} faster, {slower} slower (speed: old / new; scatter: processes of one side; "
        f"flagged beyond scatter and {NOISE:.0%})"
    )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def checkout(base: str) -> Iterator[Path]:
    """BASE in a temporary worktree, built, with this checkout's ruler; nothing of it stays, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="unif2ace-compare-") as folder:
        tree = Path(folder) / "base"
        _git("worktree", "add", "--detach", "--quiet", str(tree), base)
        try:
            _build(tree)
            for name in RULER:
                _replace(ROOT / name, tree / name)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    command = ["git", "-C", str(ROOT), *arguments]
    subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True)  # Ctrl-C is not for git


def _build(tree: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja lives in the venv
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(tree)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("results", "__pycache__"))
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def measure(tree: Path, op: str, options: Sequence[str]) -> dict:
    """The record of one op's benchmarks, run in a process of its own on the package in `tree`."""
    with tempfile.TemporaryDirectory(prefix="unif2ace-compare-") as folder:
        out = Path(folder) / "record.json"
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.run", op, *options, "--out", str(out)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.is_file():
            reason = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
            return {"benchmarks": [], "red": [{"op": op, "test": f"benchmarks/bench_{op}.py", "reason": reason}]}
        return json.loads(out.read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a revision of git, such as main or HEAD~3")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"some of {', '.join(known_ops())} (default: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in known_ops():
            parser.error(f"expected one of {', '.join(known_ops())}, got {op!r}")
    passed = [f"--device={options.device}", *([f"--threads={options.threads}"] if options.threads else [])]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the worktree is removed
    old: list[dict] = []
    new: list[dict] = []
    try:
        with checkout(options.base) as tree:
            print(f"old: {options.base} ({commit_of(options.base)});  new: working tree ({commit(ROOT)})")
            for op in options.ops or known_ops():
                for number in range(PROCESSES):
                    sides = [(old, tree), (new, ROOT)]
                    for records, place in sides if number % 2 == 0 else reversed(sides):
                        print(f"{op}: {'old' if place == tree else 'new'} ...", file=sys.stderr, flush=True)
                        records.append(measure(place, op, passed))
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines()[-1:] or [f"status {error.returncode}"]
        print(f"compare: {' '.join(map(str, error.cmd[:4]))} ... failed: {reason[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare: interrupted; the temporary checkout is gone", file=sys.stderr)
        return 130
    print(table(old, new))
    return 1 if any(record.get("red") for record in new) else 0


def commit_of(revision: str) -> str:
    """Abbreviated commit of a revision."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", f"{revision}^{{commit}}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
