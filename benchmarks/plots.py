"""Two pictures of a record: how much faster than the baseline, and how close to what the machine can do.

* `speed`: one panel per op and one row per case, with a bar for each of our back ends and a mark for each library that
  does the same; a logarithmic axis, since 2x and 0.5x are equally far from 1x.
* `roofline`: a point per measurement. Left, ops with FLOPs: arithmetic intensity (FLOP per byte of the algorithm)
  against the rate reached, under the ceilings of the same run. Right, ops that only move bytes: bytes per second.

A variant has one colour everywhere. Of several variants of one library ("torch: this", "torch: that") a picture shows
the fastest; the table has them all.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.report import CEILING, DTYPES, OURS, Result, heading, results
from unif2ace.files import replace_file

# Okabe and Ito's palette: told apart by every kind of eye.
COLORS = {
    "reference": "#8a8f98",
    "native": "#0072b2",
    "triton": "#d55e00",
    "auto": "#00497a",
    "torch": "#009e73",
    "transformers": "#cc79a7",
    "liger": "#e69f00",
    CEILING: "#202124",
}
OTHER = "#56b4e9"
MARKERS = ("o", "s", "^", "v", "P", "X", "*", "h")
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
BAR, GAP = 0.15, 0.10  # inches
WIDTH = 9.0  # inches; a README shows about as much without shrinking letters


def write(record: dict, path: Path, goal: float | None = None) -> list[Path]:
    """Write `<path>-speed` and `<path>-roofline` with the suffix of `path` (.svg or .png); the files written."""
    found = results(record)
    written = []
    with plt.rc_context(STYLE):
        for name, figure in (("speed", speed_chart(found, goal)), ("roofline", roofline_chart(found))):
            if figure is None:
                continue
            target = path.with_name(f"{path.stem}-{name}{path.suffix}")
            options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
            written.append(replace_file(target, lambda file, f=figure, o=options: f.savefig(file, **o)))
            plt.close(figure)
    return written


def shown(result: Result) -> dict[str, float]:
    """Median seconds by what a picture names: our back ends, and the fastest variant of each library."""
    fastest: dict[str, float] = {}
    for variant, seconds in result.seconds.items():
        name = variant.partition(":")[0]
        fastest[name] = min(seconds, fastest.get(name, seconds))
    return fastest


def speed_chart(found: list[Result], goal: float | None = None) -> Figure | None:
    """Bars and marks: how many times as fast as the baseline. `goal` draws a dashed line there.

    Rows that compare no back ends, as those of single savings, are left to the table.
    """
    found = [result for result in found if any(name in OURS for name in result.seconds if name != result.baseline)]
    if not found:
        return None
    panels = [[r for r in found if r.info["op"] == op] for op in dict.fromkeys(r.info["op"] for r in found)]
    heights = [GAP + sum(_row_height(result) for result in panel) for panel in panels]
    top, bottom, between = 1.10, 0.50, 0.36
    height = top + bottom + sum(heights) + between * (len(panels) - 1)
    speeds = [result.seconds[result.baseline] / seconds for result in found for seconds in shown(result).values()]
    figure = plt.figure(figsize=(WIDTH, height))
    y = height - top
    for panel, size in zip(panels, heights, strict=True):
        axes = figure.add_axes((0.26, (y - size) / height, 0.66, size / height))
        _speed_panel(axes, panel, size)
        axes.set_xlim(min([*speeds, 0.8]) / 1.15, max([*speeds, 2.0]) * 1.15)
        if goal is not None:
            axes.axvline(goal, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        if panel is not panels[-1]:
            axes.tick_params(axis="x", labelbottom=False)
        y -= size + between
    axes.set_xlabel(f"times as fast as {found[0].baseline} (logarithmic)", color=FAINT)
    _caption(figure, found, "Speed against the plain PyTorch reference", height)
    names = dict.fromkeys(name for r in found for name in shown(r) if name != r.baseline)
    _legend(figure, names, height, bars=OURS)
    return figure


def _row_height(result: Result) -> float:
    return BAR * max(1, sum(name in OURS for name in result.seconds)) + GAP


def _speed_panel(axes: Axes, panel: list[Result], size: float) -> None:
    axes.set_title(panel[0].info["op"], color=INK, fontsize=10, pad=4)
    axes.set_xscale("log")
    axes.set_ylim(size, 0)
    axes.axvline(1.0, color=INK, linewidth=0.9)
    axes.grid(axis="x", color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    y, ticks = GAP, {}
    for result in panel:
        row = _row_height(result) - GAP
        ticks[y + row / 2] = _label(result)
        speeds = {name: result.seconds[result.baseline] / seconds for name, seconds in shown(result).items()}
        for index, name in enumerate(name for name in speeds if name in OURS):
            middle = y + BAR * (index + 0.5)
            axes.barh(middle, speeds[name] - 1, BAR * 0.9, left=1, color=_color(name))
            axes.text(1.01, middle, f"{speeds[name]:.3g}x", transform=axes.get_yaxis_transform(), va="center",
                      fontsize=8, fontweight="bold", color=_color(name))  # fmt: skip
        for name, speed in speeds.items():
            if name not in (*OURS, result.baseline):
                _mark(axes, speed, y + row / 2, name)
        y += row + GAP
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8, color=INK)
    axes.tick_params(axis="both", length=0)


def _mark(axes: Axes, x: float, y: float, name: str) -> None:
    if name == CEILING:
        axes.plot(x, y, "|", color=_color(name), markersize=13, markeredgewidth=1.6)
    else:
        axes.plot(x, y, "D", color=_color(name), markersize=5.5, markeredgecolor="white", markeredgewidth=0.8)


def _color(name: str) -> str:
    return COLORS.get(name, OTHER)


def _label(result: Result) -> str:
    _, shape, case, dtype = result.key
    case = case.replace("forward+backward", "fwd+bwd").replace("forward", "fwd")
    cold = "cold" if result.info["cache"] == "cold" and "cold" not in case else ""
    return ", ".join(filter(None, (shape, case, dtype, cold)))


def roofline_chart(found: list[Result]) -> Figure | None:
    """Points under the ceilings: products against intensity on the left, ops that only move bytes on the right."""
    found = [result for result in found if result.info.get("bytes")]
    if not found:
        return None
    products = [result for result in found if result.info.get("flops")]
    movers = [result for result in found if not result.info.get("flops")]
    ceilings = found[-1].info["run"]["ceilings"]
    height = 4.8
    figure = plt.figure(figsize=(WIDTH, height))
    if products:
        axes = figure.add_axes((0.075, 0.11, 0.535 if movers else 0.90, 0.66))
        _roofline_panel(axes, products, ceilings)
    if movers:
        axes = figure.add_axes((0.735, 0.11, 0.245, 0.66) if products else (0.16, 0.11, 0.80, 0.66))
        _bandwidth_panel(axes, movers, ceilings["bytes_per_second"] / 1e9)
    _caption(figure, found, "Distance from what the machine can do", height)
    _legend(figure, dict.fromkeys(name for r in found for name in shown(r) if name != CEILING), height)
    return figure


def _roofline_panel(axes: Axes, found: list[Result], ceilings: dict) -> None:
    bandwidth = ceilings["bytes_per_second"]
    intensities = [r.info["flops"] / r.info["bytes"] for r in found]
    rates = ceilings["flops_per_second"]
    ridges = [rate / bandwidth for rate in rates.values()]
    low, high = min(intensities + ridges) / 4, max(intensities + ridges) * 4
    for name, rate in rates.items():
        ridge = rate / bandwidth
        axes.plot([low, ridge, high], [low * bandwidth, rate, rate], color="#9aa0a6", zorder=1)
        axes.annotate(f"dense product, {DTYPES.get(name, name)}", (high, rate), (-2, 3), textcoords="offset points",
                      ha="right", fontsize=8, color=FAINT)  # fmt: skip
    ops = list(dict.fromkeys(r.info["op"] for r in found))
    for result, intensity in zip(found, intensities, strict=True):
        marker = MARKERS[ops.index(result.info["op"]) % len(MARKERS)]
        for name, seconds in shown(result).items():
            if name != CEILING:
                _point(axes, intensity, result.info["flops"] / seconds, marker, name, result)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=min(low * bandwidth, axes.get_ylim()[0]))
    axes.set_title("matrix products: FLOP/s", fontsize=10, color=INK)
    axes.set_xlabel("FLOP per byte of the algorithm", color=FAINT)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#eceef0", linewidth=0.7)
    axes.tick_params(which="both", length=0, colors=FAINT)
    handles = [plt.Line2D([], [], marker=MARKERS[i % len(MARKERS)], color=FAINT, linestyle="") for i in range(len(ops))]
    handles.append(plt.Line2D([], [], marker="o", color="none", markeredgecolor=FAINT, linestyle=""))
    axes.legend(handles, [*ops, "hollow: 16-bit floats"], loc="lower right", fontsize=8, frameon=False, labelcolor=INK)


def _bandwidth_panel(axes: Axes, found: list[Result], copy: float) -> None:
    ops = list(dict.fromkeys(r.info["op"] for r in found))
    rates = [copy]
    for result in found:
        for name, seconds in shown(result).items():
            if name != CEILING:
                rates.append(result.info["bytes"] / seconds / 1e9)
                _point(axes, rates[-1], ops.index(result.info["op"]), "o", name, result)
    axes.set_xscale("log")
    axes.set_xlim(min(rates) / 1.6, max(rates) * 1.6)
    axes.axvline(copy, color="#9aa0a6", zorder=1)
    axes.text(copy, 1.0, "copy ", transform=axes.get_xaxis_transform(), ha="right", va="top", fontsize=8, color=FAINT)
    axes.set_ylim(len(ops) - 0.5, -0.5)
    axes.set_yticks(range(len(ops)), ops, fontsize=8, color=INK)
    axes.set_title("data movement: GB/s", fontsize=10, color=INK)
    axes.set_xlabel("GB/s of the algorithm", color=FAINT)
    axes.xaxis.set_major_locator(LogLocator(base=10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(axis="x", color="#eceef0", linewidth=0.7)
    axes.tick_params(which="both", length=0)
    axes.tick_params(axis="x", colors=FAINT)


def _point(axes: Axes, x: float, y: float, marker: str, name: str, result: Result) -> None:
    half = result.info.get("dtype") in ("bfloat16", "float16")
    face, edge = ("white", _color(name)) if half else (_color(name), "white")
    axes.plot(x, y, marker, color=face, markersize=6, markeredgecolor=edge, markeredgewidth=1.3 if half else 0.6)


def _caption(figure: Figure, found: list[Result], title: str, height: float) -> None:
    figure.text(0.02, 1 - 0.10 / height, title, fontsize=13, fontweight="bold", color=INK, va="top")
    figure.text(0.02, 1 - 0.37 / height, heading(found)[0], fontsize=7.5, color=FAINT, va="top")


def _legend(figure: Figure, names: dict[str, None], height: float, bars: tuple[str, ...] = ()) -> None:
    """One line of names below the caption; those in `bars` as rectangles, the others as marks."""
    ordered = [name for name in COLORS if name in names] + [name for name in names if name not in COLORS]
    shapes = {CEILING: "|"}
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=_color(name))
        if name in bars
        else plt.Line2D([], [], linestyle="", color=_color(name), marker=shapes.get(name, "D" if bars else "o"))
        for name in ordered
    ]
    texts = [name if name in (*OURS, "reference") else _library(name) for name in ordered]
    figure.legend(
        handles, texts, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.48 / height), ncols=len(texts), frameon=False,
        fontsize=8.5, handlelength=1.0, handleheight=0.8, columnspacing=1.4, handletextpad=0.6, labelcolor=INK,
    )  # fmt: skip


def _library(name: str) -> str:
    return "ceiling timed beside it" if name == CEILING else f"fastest of {name}"
