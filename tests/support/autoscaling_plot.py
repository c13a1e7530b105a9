"""Draws the record of `make test-autoscaling`: work that waits, workers wanted and ready, latency, over time.

    python tests/support/autoscaling_plot.py build/autoscaling.jsonl docs/autoscaling.png

The same record gives the same file, byte for byte, with one version of matplotlib.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLE = {
    "svg.hashsalt": "edje",  # names inside the file would otherwise be random
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 120,
}
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
Line = dict[str, Any]


def draw(lines: list[Line], out: Path) -> None:
    """A column for each run, in each the backlog above the workers above the latency."""
    runs = [(name, list(group)) for name, group in itertools.groupby(lines, key=lambda line: line["run"])]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(runs), 6.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(3, len(runs), sharex="col", sharey="row", squeeze=False)
        for column, (name, run) in enumerate(runs):
            draw_run(list(axes[:, column]), name, run)
        axes[0, 0].set_ylabel("work that waits, in seconds\nof one worker")
        axes[1, 0].set_ylabel("rerank workers")
        axes[2, 0].set_ylabel("latency, s (median of a second)")
        axes[0, -1].legend(loc="upper right")
        axes[1, -1].legend(loc="lower right", frameon=True, framealpha=0.9)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def draw_run(panels: list[Axes], name: str, run: list[Line]) -> None:
    start = run[0]["unix_s"]
    samples = [line for line in run if "wanted" in line]
    events = [line for line in run if "event" in line]
    seconds = [line["unix_s"] - start for line in samples]

    def series(field: str) -> list[float]:
        return [float("nan") if line[field] is None else line[field] for line in samples]

    backlog, workers, latency = panels
    backlog.set_title(name, loc="left", pad=14)
    backlog.fill_between(seconds, series("waiting_s"), color=BLUE, alpha=0.25, linewidth=0, label="known to the client")
    backlog.plot(seconds, series("backlog_s"), color=BLUE, linewidth=1, label="seen by Prometheus")
    workers.step(seconds, series("wanted"), color=ORANGE, where="post", linewidth=1.2, label="wanted")
    workers.fill_between(seconds, series("ready"), color=GREEN, step="post", alpha=0.4, linewidth=0, label="ready")
    workers.set_ylim(bottom=0)
    latency.plot(seconds, series("median_latency_s"), color=BLUE, linewidth=0, marker=".", markersize=2)
    latency.set_ylim(bottom=0)
    latency.set_xlabel("seconds")
    for number, line in enumerate(events, 1):
        for panel in panels:
            panel.axvline(line["unix_s"] - start, color="#888888", linewidth=0.7, linestyle=":")
        backlog.annotate(
            str(number), (line["unix_s"] - start, 1), xycoords=("data", "axes fraction"), ha="center", fontsize=7
        )
    told = "\n".join(f"{number} {line['event']}" for number, line in enumerate(events, 1))
    latency.text(0, -0.35, told, transform=latency.transAxes, va="top", fontsize=7)


def main(
    record: Annotated[Path, typer.Argument(help="Lines of JSON, as the run has written them.", exists=True)],
    out: Annotated[Path, typer.Argument(help="The picture: .svg or .png.")],
) -> None:
    """Draw a run's record."""
    draw([json.loads(line) for line in record.read_text().splitlines()], out)


if __name__ == "__main__":
    typer.run(main)
