"""Run the benchmarks and print them as a table: `python -m benchmarks.report --run` or `... report FILE.json ...`.

A file is what pytest-benchmark writes, with the figures of `benchmarks.conftest.compare` under `extra_info`. Runs on a
GPU are kept as `benchmarks/results/<gpu>-<date>.json`; those on a CPU, which say little about other machines, in
`out/bench/`, outside version control.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# `make bench` has to end soon on a laptop; --full runs every size.
SHORT = "train or decode-64 or laptop"


def run(device: str, full: bool, threads: int | None) -> Path | None:
    """Run the suite on `device`; the JSON file, or None when a benchmark failed its correctness gate."""
    if threads is not None:
        torch.set_num_threads(threads)
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name() if device == "cuda" else "cpu").strip("-").lower()
    folder = ROOT / ("benchmarks/results" if device == "cuda" else "out/bench")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{datetime.date.today().isoformat()}.json"
    selection = [] if full else ["-k", SHORT]
    options = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "--benchmark-quiet", "-q"]
    arguments = [str(ROOT / "benchmarks"), *options, *selection, f"--device={device}", f"--benchmark-json={path}"]
    return path if pytest.main(arguments) == pytest.ExitCode.OK else None


def table(path: Path) -> str:
    """A Markdown table of one file: one row per case and variant, times as medians, ratios against the baseline."""
    results = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    results = [info for info in results if "seconds" in info]
    if not results:
        return f"{path.name}: no results\n"
    first = results[0]
    lines = [
        f"{path.name}: {first['device']}, {first['threads']} thread(s), torch {first['torch']}",
        "(time: median of interleaved rounds; spread: interquartile range over median)",
        "",
        "| op | shape | case | variant | time | GB/s | TFLOP/s | spread | vs baseline |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for info in results:
        for variant, seconds in info["seconds"].items():
            ratio = "baseline" if variant == info["baseline"] else f"{info['ratio'][variant]:.2f}x"
            cells = [
                info["op"],
                info["shape"],
                info["case"],
                variant,
                _duration(seconds),
                _rate(info.get("bytes"), seconds, 1e9),
                _rate(info.get("flops"), seconds, 1e12),
                f"{100 * info['spread'][variant]:.0f} %",
                ratio,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _rate(amount: float | None, seconds: float, unit: float) -> str:
    return "" if amount is None else f"{amount / seconds / unit:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON files to print")
    parser.add_argument("--run", action="store_true", help="run the suite first and print its file")
    parser.add_argument("--full", action="store_true", help="with --run: all sizes, not only the short list")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="with --run: CPU threads (default: torch's)")
    options = parser.parse_args(arguments)
    if not options.run and not options.files:
        parser.error("name a JSON file, or --run")
    files = list(options.files)
    if options.run:
        path = run(options.device, options.full or options.device == "cuda", options.threads)
        if path is None:
            print("benchmarks: a correctness gate or a benchmark failed; no table", file=sys.stderr)
            return 1
        files.append(path)
    for path in files:
        print("\n" + table(path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
