"""Turn records of `benchmarks.run` into tables and pictures: `python -m benchmarks.report FILE [--readme] [--plot F]`.

A record is pytest-benchmark's JSON, with the figures of `benchmarks.conftest.compare` under `extra_info` and the failed
benchmarks under "red".
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TITLES = (
    "op", "shape", "case", "dtype", "caches", "variant", "time", "GB/s", "TFLOP/s", "% roof", "peak mem", "spread",
    "speed",
)  # fmt: skip
RIGHT = {"time", "GB/s", "TFLOP/s", "% roof", "peak mem", "spread", "speed", "scatter", "old", "new"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OURS = ("native", "triton", "auto")
BUSY = 0.25  # median spread; two idle cores give 3 to 8 %, with another program on them 20 to 100 %
DIRECTIONS = ("forward", "forward+backward")
CEILING = (
    "ceiling"  # "ceiling: ...": a simpler thing of equal FLOPs or bytes, which no implementation of the op can beat
)


@dataclass(frozen=True)
class Result:
    """One comparison: the figures of its variants, under one op, shape, case and dtype."""

    info: dict

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(op, shape, case, dtype): what a row is about."""
        return (self.info["op"], self.info["shape"], self.info["case"], dtype_name(self.info))

    @property
    def baseline(self) -> str:
        return self.info["baseline"]

    @property
    def seconds(self) -> dict[str, float]:
        """Median seconds by variant."""
        return self.info["seconds"]

    def speed(self, variant: str) -> float:
        """How many times as fast as the baseline."""
        return self.seconds[self.baseline] / self.seconds[variant]


def results(record: dict) -> list[Result]:
    """The comparisons of a record, in the order they ran."""
    return [Result(entry["extra_info"]) for entry in record["benchmarks"] if "seconds" in entry["extra_info"]]


def dtype_name(info: dict) -> str:
    """Short name, "" where the comparison has none."""
    name = info.get("dtype") or ""
    return DTYPES.get(name, name)


# ------------------------------------------------------------------------------------------------------------ the table


def table(record: dict) -> str:
    """Everything in a record as one Markdown table, aligned for a terminal: a row per variant, red rows where a
    benchmark failed, and above it where and when the figures were taken.
    """
    found, red = results(record), record.get("red", [])
    if not found and not red:
        return "no results"
    rows = [_cells(result, variant) for result in found for variant in result.seconds]
    order = list(dict.fromkeys(result.info["op"] for result in found))
    rows += [[f.get("op", ""), f.get("shape", ""), f.get("case", ""), dtype_name(f), "", "**RED**"] for f in red]
    order += [f["op"] for f in red if f.get("op") and f["op"] not in order]
    rows = [row + [""] * (len(TITLES) - len(row)) for row in rows]
    rows.sort(key=lambda row: order.index(row[0]))
    lines = [*heading(found), "", *markdown(TITLES, rows)]
    notes = {f"{r.info['op']} {name}: {text}": None for r in found for name, text in r.info.get("notes", {}).items()}
    lines += ["", *notes] if notes else []
    spread = statistics.median(spread for r in found for spread in r.info["spread"].values()) if found else 0.0
    if spread > BUSY:
        lines += [
            "",
            f"The machine was busy: half of the rows spread by more than {spread:.0%}. Do not cite these figures.",
        ]
    if record.get("skipped"):
        lines += ["", f"not run, no time left: {', '.join(record['skipped'])}"]
    if red:
        lines += ["", f"RED, no figures ({len(red)}); `python -m pytest TEST` shows all of it:"]
        lines += [f"  {failure['test']}: {failure['reason']}" for failure in red]
    return "\n".join(lines)


def heading(found: Sequence[Result]) -> list[str]:
    """Machine, commit, date, ceilings, and how to read the columns."""
    if not found:
        return []
    run = found[-1].info["run"]  # the last one knows all ceilings
    ceilings = run["ceilings"]
    rates = ", ".join(
        f"{DTYPES.get(name, name)} {flops / 1e12:.3g} TFLOP/s" for name, flops in ceilings["flops_per_second"].items()
    )
    return [
        f"{run['device']}, {run['cores']} cores, {run['isa']}, {run['threads']} thread(s), torch {run['torch']}, "
        f"commit {run['commit'] or 'unknown'}, {run['date']}",
        f"ceilings measured in this run: copy {ceilings['bytes_per_second'] / 1e9:.3g} GB/s"
        + (f"; dense product {rates}" if rates else ""),
        "time: median of interleaved rounds; spread: interquartile range / median; speed: against the baseline;",
        "% roof: least time by those ceilings / time (operands that a cache holds can exceed 100 %); peak mem: extra "
        "bytes of one call",
    ]


def _cells(result: Result, variant: str) -> list[str]:
    info, seconds = result.info, result.seconds[variant]
    roof = info.get("roofline")
    time = duration(seconds)
    if info.get("items"):
        amount, unit = info["items"]
        time += f" ({_three_digits(amount / seconds)} {unit}/s)"
    return [
        *result.key,
        info["cache"],
        variant,
        time,
        _rate(info.get("bytes"), seconds, 1e9),
        _rate(info.get("flops"), seconds, 1e12),
        "" if roof is None else f"{100 * roof[variant]:.0f}",
        memory(info["peak_bytes"][variant]),
        f"{100 * info['spread'][variant]:.0f} %",
        "baseline" if variant == result.baseline else times(result.speed(variant)),
    ]


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned in plain text too."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if t in RIGHT else c.ljust(w) for c, w, t in zip(cells, widths, titles, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + ":" if t in RIGHT else "-" * w for w, t in zip(widths, titles, strict=True)]
    return [line(titles), line(rule), *(line(row) for row in rows)]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


def times(ratio: float) -> str:
    """ "2.10x"; without decimals from 100 on."""
    return f"{ratio:.2f}x" if ratio < 99.5 else f"{ratio:.0f}x"


def memory(amount: int) -> str:
    """Bytes with a binary unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if amount >= size:
            return f"{_three_digits(amount / size)} {unit}"
    return f"{amount} B"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def _rate(amount: float | None, seconds: float, unit: float) -> str:
    return "" if not amount else _three_digits(amount / seconds / unit)


# ----------------------------------------------------------------------------------------------------------- the README


def readme(record: dict) -> str:
    """The compact table of the README: per op, shape and dtype, our back ends against reference and best peer."""
    found = results(record)
    groups: dict[tuple[str, str, str], dict[str, Result]] = {}
    for result in found:
        op, shape, case, dtype = result.key
        direction, _, variation = case.partition(" ")  # "forward skewed"
        groups.setdefault((op, f"{shape} {variation}".strip(), dtype), {})[direction] = result
    titles = ("op", "shape", "dtype", "back end", *DIRECTIONS)
    rows = []
    for key, cases in groups.items():
        for name in OURS:
            cells = [_against(cases.get(direction), name) for direction in DIRECTIONS]
            if any(cells):
                rows.append([*key, name, *cells])
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    lines = [
        *heading(found)[:1],
        "Time; speed against the reference; speed against the fastest peer. One interleaved run.",
    ]
    return "\n".join([*lines, "", *markdown(titles, rows)])


def _against(result: Result | None, name: str) -> str:
    """ "12 ms, **2.1x**, 1.4x torch: grouped_mm", or "" where it was not timed."""
    if result is None or name not in result.seconds:
        return ""
    cell = f"{duration(result.seconds[name])}, **{result.speed(name):.1f}x**"
    peers = [peer for peer in result.seconds if ":" in peer and not peer.startswith(CEILING)]
    if peers:
        best = min(peers, key=result.seconds.get)
        cell += f", {result.seconds[best] / result.seconds[name]:.1f}x {best}"
    return cell


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a record of benchmarks.run")
    parser.add_argument("--readme", action="store_true", help="print the README's table instead of the whole one")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write OUT-speed and OUT-roofline (.svg or .png)")
    options = parser.parse_args(arguments)
    record = json.loads(options.file.read_text())
    print(readme(record) if options.readme else table(record))
    if options.plot is not None:
        from benchmarks import plots  # matplotlib only where a picture is asked for

        for path in plots.write(record, options.plot):
            print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
