"""Plots: R@1 against GFLOP per pair, bytes per image or candidates per query, and reliability diagrams.

Computes nothing. The same figures give the same file, byte for byte, with one version of matplotlib, which is imported
when the first plot is drawn.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edje.evaluation.errors import PlotImpossible
from edje.evaluation.reliability import NUM_BINS, Reliability

#: Okabe and Ito's colours, distinct for any colour vision; their yellow is left out because it is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SUFFIXES = (".svg", ".png")
_INCHES = (7.2, 4.4)
_STYLE: dict[str, object] = {
    "svg.hashsalt": "edje",  # element ids are random otherwise
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so it is the same on every machine
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}
#: Offsets of a name from its point, in points, and its alignment; the first free one is used.
_OFFSETS = (
    (8, 4, "left"),
    (8, -12, "left"),
    (-8, 4, "right"),
    (-8, -12, "right"),
    (8, 20, "left"),
    (8, -28, "left"),
    (-8, 20, "right"),
    (-8, -28, "right"),
)
#: Least distance between a name and another scorer's point, in pixels.
_CLEARANCE = 12


@dataclass(frozen=True, slots=True)
class Point:
    """A scorer: its name, its cost, and R@1 as a fraction for each seed it was trained with."""

    name: str
    x: float
    recalls: tuple[float, ...]
    note: str = ""  # printed next to a curve's point, such as a number of tokens


@dataclass(frozen=True, slots=True)
class Curve:
    """Points that are joined by a line, in this order."""

    name: str
    points: tuple[Point, ...]


def quality_vs_cost(points: Sequence[Point], path: Path, *, title: str = "", first_stage: float | None = None) -> None:
    """Plot R@1 against GFLOP per pair, with named points and a line for the first stage; writes `.svg` or `.png`."""
    with _axes(path, points, title, "GFLOP per pair") as axes:
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.15)
        for number, point in enumerate(points):
            _errorbar(axes, [point], number, joined=False)
        if first_stage is not None:
            _level(axes, first_stage)
        _plain_ticks(axes, "x")
        _name_points(axes, points)


def quality_vs_bytes(curves: Sequence[Curve], path: Path, *, title: str = "", first_stage: float | None = None) -> None:
    """Plot R@1 against stored bytes per image, a curve per storage type, each point with its note."""
    with _axes(path, _all(curves), title, "bytes per image") as axes:
        axes.set_xscale("log", base=2)
        _draw_curves(axes, curves, first_stage)
        _byte_ticks(axes, [point.x for point in _all(curves)])


def quality_vs_k(
    curves: Sequence[Curve],
    path: Path,
    *,
    title: str = "",
    first_stage: float | None = None,
    scale: Literal["linear", "log"] = "linear",
) -> None:
    """Plot R@1 against the number of candidates that are reranked."""
    with _axes(path, _all(curves), title, "candidates reranked, k") as axes:
        axes.set_xscale(scale)
        _draw_curves(axes, curves, first_stage)
        ks = sorted({point.x for point in _all(curves)})
        axes.set_xticks(ks, [f"{k:g}" for k in ks], minor=False)
        axes.minorticks_off()


def reliability_diagram(curves: Mapping[str, Reliability], path: Path, *, title: str = "") -> None:
    """Plot the share of positives against the predicted probability, a curve per name; writes `.svg` or `.png`.

    The area of a marker grows with the logarithm of the number of pairs in its bin.
    """
    _check_suffix(path)
    if not curves:
        raise PlotImpossible(f"there is nothing to draw in {path}")
    with _figure(path, title, "predicted probability", "share of positives") as axes:
        axes.plot((0, 1), (0, 1), color="#666666", linestyle="--", linewidth=1.2, label="calibrated")
        for number, (name, figures) in enumerate(curves.items()):
            colour = COLOURS[number % len(COLOURS)]
            x = [each.mean_probability for each in figures.bins]
            y = [each.positive_share for each in figures.bins]
            axes.plot(x, y, color=colour, label=f"{name}, ECE {figures.calibration_error.value:.3f}")
            sizes = [10 + 12 * math.log10(each.num_pairs) for each in figures.bins]
            axes.scatter(x, y, s=sizes, color=colour, marker=MARKERS[number % len(MARKERS)], zorder=3)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_xticks([tick / 5 for tick in range(6)])
        axes.legend(loc="upper left", title=f"{NUM_BINS} bins")


@contextmanager
def _axes(path: Path, points: Sequence[Point], title: str, x_label: str) -> Iterator[Any]:
    """Labelled empty axes for R@1; on leaving, the figure is written to `path`. Raises `PlotImpossible`."""
    _refuse(path, points)
    with _figure(path, title, x_label, "R@1, %") as axes:
        yield axes


@contextmanager
def _figure(path: Path, title: str, x_label: str, y_label: str) -> Iterator[Any]:
    """Labelled empty axes; on leaving, the figure is written to `path`. Raises `PlotImpossible` without matplotlib."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise PlotImpossible(
            "plots need the package matplotlib, which is not installed: pip install 'edje-rerank[train]'"
        ) from error
    figure_module = importlib.import_module("matplotlib.figure")
    agg = importlib.import_module("matplotlib.backends.backend_agg")
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=_INCHES, layout="constrained")
        agg.FigureCanvasAgg(figure)  # works without a display
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_title(title, loc="left")
        yield axes
        figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None})


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise PlotImpossible(f"{path} ends in neither {' nor '.join(SUFFIXES)}")


def _refuse(path: Path, points: Sequence[Point]) -> None:
    _check_suffix(path)
    if not points:
        raise PlotImpossible(f"there is nothing to draw in {path}")
    for point in points:
        if not point.recalls or not point.x > 0:
            raise PlotImpossible(f"the point {point.name!r} at {point.x:g} has no R@1, or its x is not positive")


def _all(curves: Sequence[Curve]) -> list[Point]:
    return [point for curve in curves for point in curve.points]


def _draw_curves(axes: Any, curves: Sequence[Curve], first_stage: float | None) -> None:
    for number, curve in enumerate(curves):
        _errorbar(axes, curve.points, number, joined=True, label=curve.name)
        for point in curve.points:
            if point.note:
                axes.annotate(
                    point.note,
                    (point.x, 100 * _mean(point)),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=COLOURS[number % len(COLOURS)],
                )
    if first_stage is not None:
        _level(axes, first_stage)
    axes.margins(y=0.12)
    axes.legend(loc="best")


def _errorbar(axes: Any, points: Sequence[Point], number: int, *, joined: bool, label: str | None = None) -> None:
    """Draw means, with bars from the worst to the best seed if there are several seeds."""
    means = [100 * _mean(point) for point in points]
    below = [mean - 100 * min(point.recalls) for mean, point in zip(means, points, strict=True)]
    above = [100 * max(point.recalls) - mean for mean, point in zip(means, points, strict=True)]
    has_seeds = any(len(point.recalls) > 1 for point in points)
    axes.errorbar(
        [point.x for point in points],
        means,
        yerr=(below, above) if has_seeds else None,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle="-" if joined else "none",
        markersize=7,
        capsize=3,
        label=label,
    )


def _level(axes: Any, first_stage: float) -> None:
    axes.axhline(100 * first_stage, color="#666666", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"first stage, {100 * first_stage:.1f}",
        (0.995, 100 * first_stage),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color="#444444",
    )


def _name_points(axes: Any, points: Sequence[Point]) -> None:
    """Print each name at the first offset that covers no other name or point, or else at the least crowded one."""
    figure = axes.figure
    figure.draw_without_rendering()
    centres = axes.transData.transform([(point.x, 100 * _mean(point)) for point in points])
    taken: list[Any] = []
    for number, point in enumerate(points):
        others = [centre for at, centre in enumerate(centres) if at != number]
        tries = []
        for offset in _OFFSETS:
            text = _name(axes, point, number, offset)
            box = text.get_window_extent()
            text.remove()
            outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1)
            covered = sum(box.overlaps(name) for name in taken)
            crowded = sum(box.padded(_CLEARANCE).contains(x, y) for x, y in others)
            tries.append(((outside, covered, crowded), offset))
        best = min(tries, key=lambda one: one[0])[1]
        taken.append(_name(axes, point, number, best).get_window_extent())


def _name(axes: Any, point: Point, number: int, offset: tuple[int, int, str]) -> Any:
    right, up, align = offset
    return axes.annotate(
        point.name,
        (point.x, 100 * _mean(point)),
        xytext=(right, up),
        textcoords="offset points",
        ha=align,
        color=_darkened(COLOURS[number % len(COLOURS)]),
    )


def _darkened(colour: str) -> str:
    """A darker colour for text: some of the colours are too light to be read on white."""
    return "#" + "".join(f"{int(colour[at : at + 2], 16) * 6 // 10:02x}" for at in (1, 3, 5))


def _plain_ticks(axes: Any, which: str) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _byte_ticks(axes: Any, num_bytes: Sequence[float]) -> None:
    low, high = min(num_bytes), max(num_bytes)
    ticks = [2.0**power for power in range(4, 40) if low / 1.5 <= 2.0**power <= high * 1.5]
    axes.set_xticks(ticks, [f"{tick / 1024:g} KiB" if tick >= 1024 else f"{tick:g} B" for tick in ticks])
    axes.minorticks_off()


def _mean(point: Point) -> float:
    return sum(point.recalls) / len(point.recalls)
