"""Two pictures of a record: how much faster than the baseline, and how close to what the machine can do.

* `speed`: one panel per op, one group of bars per case, one bar per variant; a logarithmic axis, since 2x and 0.5x are
  equally far from 1x.
* `roofline`: a point per measurement, arithmetic intensity (FLOP per byte of the algorithm) against the rate reached,
  under the ceilings of the same session; ops without FLOPs stand in a panel of their own, by bytes per second.

A variant has one colour everywhere: ours by back end, peers in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import DTYPES, Result, heading, results
from unif2ace.files import replace_file

# Okabe and Ito's palette: told apart by every kind of eye.
COLORS = {"reference": "#8a8f98", "native": "#0072b2", "triton": "#d55e00", "auto": "#00497a"}
PEER_COLORS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8a800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "unif2ace",  # the same record gives the same file
    "svg.fonttype": "none",  # text stays text: smaller, sharper, searchable
}
INK, FAINT = "#202124", "#5f6368"
BAR, GAP = 0.20, 0.12  # inches


def write(record: dict, path: Path, goal: float | None = None) -> list[Path]:
    """Write `<path>-speed` and `<path>-roofline` with the suffix of `path` (.svg or .png); the files written."""
    found = results(record)
    pictures = {"speed": speed_chart(found, goal), "roofline": roofline_chart(found)}
    written = []
    for name, figure in pictures.items():
        if figure is None:
            continue
        target = path.with_name(f"{path.stem}-{name}{path.suffix}")
        options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
        with plt.rc_context(STYLE):
            written.append(replace_file(target, lambda file, f=figure, o=options: f.savefig(file, **o)))
        plt.close(figure)
    return written


def colors_of(found: Iterable[Result]) -> dict[str, str]:
    """A colour for every variant of a record."""
    names = list(dict.fromkeys(name for result in found for name in result.seconds))
    peers = sorted(name for name in names if name not in COLORS)
    return {**COLORS, **{name: PEER_COLORS[i % len(PEER_COLORS)] for i, name in enumerate(peers)}}


def speed_chart(found: list[Result], goal: float | None = None) -> Figure | None:
    """Bars: how many times as fast as the baseline. `goal` draws a dashed line there."""
    found = [result for result in found if len(result.seconds) > 1]
    if not found:
        return None
    colors = colors_of(found)
    ops = list(dict.fromkeys(result.info["op"] for result in found))
    panels = [[result for result in found if result.info["op"] == op] for op in ops]
    heights = [sum(BAR * (len(r.seconds) - 1) + GAP for r in panel) + GAP for panel in panels]
    top, bottom, between = 0.95, 0.55, 0.42
    height = top + bottom + sum(heights) + between * (len(panels) - 1)
    speeds = [r.speed(name) for r in found for name in r.seconds]
    low, high = min([*speeds, 0.8]) / 1.1, max([*speeds, 2.0]) * 1.5
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.0, height))
        y = height - top
        for op, panel, size in zip(ops, panels, heights, strict=True):
            axes = figure.add_axes((0.30, (y - size) / height, 0.66, size / height))
            _speed_panel(axes, panel, colors, size)
            axes.set_title(op, color=INK, fontsize=10, pad=4)
            axes.set_xlim(low, high)
            if goal is not None:
                axes.axvline(goal, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            if panel is not panels[-1]:
                axes.tick_params(axis="x", labelbottom=False)
            y -= size + between
        axes.set_xlabel(f"times as fast as {found[0].baseline} (logarithmic)", color=FAINT)
        _caption(figure, found, "Speed against the baseline", height)
        _legend(figure, [n for n in colors if any(n in r.seconds and n != r.baseline for r in found)], colors, height)
    return figure


def _speed_panel(axes: Axes, panel: list[Result], colors: dict[str, str], size: float) -> None:
    axes.set_xscale("log")
    axes.set_ylim(size, 0)
    axes.axvline(1.0, color=INK, linewidth=0.9)
    axes.grid(axis="x", color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    y, ticks, labels = GAP, [], []
    for result in panel:
        names = [name for name in result.seconds if name != result.baseline]
        ticks.append(y + BAR * len(names) / 2)
        labels.append(_label(result))
        for name in names:
            speed = result.speed(name)
            axes.barh(y + BAR / 2, speed - 1, BAR * 0.86, left=1, color=colors[name])
            at, side = (speed, "left") if speed >= 1 else (1, "left")
            axes.annotate(
                f"{speed:.3g}x", (at, y + BAR / 2), (3, -0.5), textcoords="offset points", va="center", ha=side,
                fontsize=7.5, color=INK,
            )  # fmt: skip
            y += BAR
        y += GAP
    axes.set_yticks(ticks, labels, fontsize=8, color=INK)
    axes.tick_params(axis="both", length=0)


def _label(result: Result) -> str:
    _, shape, case, dtype = result.key
    cold = ", cold" if result.info["cache"] == "cold" else ""
    return f"{shape}, {case}{', ' + dtype if dtype else ''}{cold}"


def roofline_chart(found: list[Result]) -> Figure | None:
    """Points under the ceilings. Left: ops with FLOPs, against intensity. Right: ops that only move bytes."""
    found = [result for result in found if result.info.get("bytes")]
    if not found:
        return None
    colors = colors_of(found)
    heavy = [result for result in found if result.info.get("flops")]
    light = [result for result in found if not result.info.get("flops")]
    ceilings = found[-1].info["run"]["ceilings"]
    height = 5.0
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.0, height))
        if heavy:
            _roofline_panel(figure.add_axes((0.08, 0.12, 0.52 if light else 0.86, 0.60)), heavy, ceilings, colors)
        if light:
            place = (0.72, 0.12, 0.25, 0.60) if heavy else (0.22, 0.12, 0.7, 0.60)
            _bandwidth_panel(figure.add_axes(place), light, ceilings, colors)
        _caption(figure, found, "Distance from the ceilings of the machine", height)
        _legend(figure, [n for n in colors if any(n in r.seconds for r in found)], colors, height)
    return figure


def _roofline_panel(axes: Axes, found: list[Result], ceilings: dict, colors: dict[str, str]) -> None:
    bandwidth = ceilings["bytes_per_second"]
    intensity = [r.info["flops"] / r.info["bytes"] for r in found]
    low, high = min([*intensity, 1.0]) / 2, max([*intensity, 100.0]) * 4
    for name, rate in ceilings["flops_per_second"].items():
        ridge = rate / bandwidth
        axes.plot([low, min(ridge, high), high], [low * bandwidth, min(ridge, high) * bandwidth, rate], color="#9aa0a6",
                  linewidth=1.2, zorder=1)  # fmt: skip
        axes.annotate(f"{DTYPES.get(name, name)} product", (high, rate), (0, 3), textcoords="offset points", ha="right",
                      fontsize=8, color=FAINT)  # fmt: skip
    ops = list(dict.fromkeys(r.info["op"] for r in found))
    for result, x in zip(found, intensity, strict=True):
        for name, seconds in result.seconds.items():
            axes.plot(x, result.info["flops"] / seconds, MARKERS[ops.index(result.info["op"]) % len(MARKERS)],
                      color=colors[name], markersize=5.5, markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_title("products: rate reached", fontsize=10, color=INK)
    axes.set_xlabel("FLOP per byte of the algorithm", color=FAINT)
    axes.set_ylabel("FLOP/s", color=FAINT)
    axes.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(color="#eceef0", linewidth=0.7)
    axes.tick_params(colors=FAINT, which="both", length=0)
    handles = [plt.Line2D([], [], marker=MARKERS[i % len(MARKERS)], color=FAINT, linestyle="") for i in range(len(ops))]
    axes.legend(handles, ops, loc="lower right", fontsize=8, frameon=False, labelcolor=INK)


def _bandwidth_panel(axes: Axes, found: list[Result], ceilings: dict, colors: dict[str, str]) -> None:
    ops = list(dict.fromkeys(r.info["op"] for r in found))
    axes.axvline(ceilings["bytes_per_second"] / 1e9, color="#9aa0a6", linewidth=1.2)
    axes.annotate("copy", (ceilings["bytes_per_second"] / 1e9, len(ops) - 0.5), (3, 2), textcoords="offset points",
                  fontsize=8, color=FAINT)  # fmt: skip
    for result in found:
        row = ops.index(result.info["op"])
        for name, seconds in result.seconds.items():
            axes.plot(result.info["bytes"] / seconds / 1e9, row, "o", color=colors[name], markersize=5.5,
                      markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(len(ops) - 0.5, -0.5)
    axes.set_yticks(range(len(ops)), ops, fontsize=8, color=INK)
    axes.set_title("data movement: GB/s", fontsize=10, color=INK)
    axes.set_xlabel("GB/s of the algorithm", color=FAINT)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(axis="x", color="#eceef0", linewidth=0.7)
    axes.tick_params(which="both", length=0)


def _caption(figure: Figure, found: list[Result], title: str, height: float) -> None:
    figure.text(0.02, 1 - 0.12 / height, title, fontsize=13, fontweight="bold", color=INK, va="top")
    figure.text(0.021, 1 - 0.38 / height, heading(found)[0], fontsize=7.5, color=FAINT, va="top")


def _legend(figure: Figure, names: list[str], colors: dict[str, str], height: float) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    figure.legend(
        handles, names, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.50 / height), ncols=len(names), frameon=False,
        fontsize=8.5, handlelength=1.0, handleheight=0.9, columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip
