"""Writes the results of `benchmarks/quality.py` as plots and as Markdown tables. Computes nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edje.evaluation.plots import Curve, Point, quality_vs_bytes, quality_vs_cost, quality_vs_k


def show(found: Mapping[str, Any], folder: Path) -> None:
    """Write NAME.json, NAME.md and three plots of a study to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name, k = found["study"], found["k"]
    title = f"{name}: text-to-image, k = {k}, int8"
    first = statistics.fmean(each["first_stage"] for seed in found["encoders"] for each in seed.values())
    quality_vs_cost(_by_cost(found), folder / f"{name}-cost.svg", title=title, first_stage=first)
    curves = [
        Curve(kind, tuple(Point("", int(depth), (r1,)) for depth, r1 in by_depth.items()))
        for kind, by_depth in found["by_k"].items()
    ]
    quality_vs_k(curves, folder / f"{name}-k.svg", title=f"{name}: text-to-image, int8", first_stage=first)
    title = f"{name}: text-to-image, k = {k}, `{found['tokens_kind']}`"
    quality_vs_bytes(_by_bytes(found), folder / f"{name}-bytes.svg", title=title, first_stage=first)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / f"{name}.md").write_text("\n".join(_tables(found, first)))


def _by_cost(found: Mapping[str, Any]) -> list[Point]:
    by_seed = found["encoders"]
    return [
        Point(scorer, by_seed[0][scorer]["gflop"], tuple(seed[scorer]["r1"] for seed in by_seed))
        for scorer in by_seed[0]
    ]


def _by_bytes(found: Mapping[str, Any]) -> list[Curve]:
    points: dict[str, list[Point]] = {}
    for each in found["by_tokens"]:
        name = f"{each['storage']}, {each['adapter']}"  # the points of one curve have one adapter
        points.setdefault(name, []).append(Point("", each["bytes"], (each["r1"],), str(each["tokens"])))
    return [Curve(name, tuple(joined)) for name, joined in points.items()]


def _tables(found: Mapping[str, Any], first: float) -> Iterable[str]:
    num_seeds, captions = len(found["encoders"]), found["captions"]
    queries = "all test captions" if captions is None else f"{captions:,} test captions"
    runs = f"{num_seeds} training runs of each" if num_seeds > 1 else "one training run of each"
    yield f"# {found['study']}: quality and cost of each encoder"
    yield ""
    yield f"Written by `benchmarks/quality.py {found['study']}`: R@1 of text-to-image search, %, {queries}, {runs}."
    yield f"Blobs are int8 unless a table states another type. The first stage alone: {_percent(first)}."
    yield ""
    rows = [
        [
            f"`{point.name}`",
            f"{point.x:.4f}",
            _percent(statistics.fmean(point.recalls)),
            *([", ".join(map(_percent, point.recalls))] if num_seeds > 1 else []),
        ]
        for point in sorted(_by_cost(found), key=lambda point: point.x)
    ]
    head = [f"scorer, k = {found['k']}", "GFLOP a pair", "R@1", *(["of each run"] if num_seeds > 1 else [])]
    yield from _table(head, rows)
    depths = next(iter(found["by_k"].values()))
    rows = [[f"`{kind}`", *map(_percent, by_depth.values())] for kind, by_depth in found["by_k"].items()]
    yield from _table(["encoder", *(f"k = {depth}" for depth in depths)], rows)
    rows = [
        [each["tokens"], each["adapter"], each["storage"], f"{each['bytes']:,}", _percent(each["r1"])]
        for each in found["by_tokens"]
    ]
    yield from _table(["tokens", "adapter", "stored as", "bytes an image", f"R@1 of `{found['tokens_kind']}`"], rows)
    yield f"![cost]({found['study']}-cost.svg) ![k]({found['study']}-k.svg) ![bytes]({found['study']}-bytes.svg)"
    yield ""


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Iterable[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(map(str, row))} |"
    yield ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
