"""The report of an evaluation: a table in the terminal, Markdown, and a JSON document that can be read again.

Figures are fractions in JSON and per cent in the tables, followed by their 95 % intervals.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache

from pydantic import ConfigDict, TypeAdapter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edje.evaluation.bootstrap import Interval
from edje.evaluation.comparison import Comparison
from edje.evaluation.cost import ScorerCost
from edje.evaluation.storage import Storage

SCHEMA_VERSION = 1
HEADINGS = ("first stage", "reranked", "difference")


@dataclass(frozen=True, slots=True)
class Result:
    """One direction at one k, and the scorer's cost; None where the cost is unknown."""

    comparison: Comparison
    cost: ScorerCost | None


@dataclass(frozen=True, slots=True)
class Report:
    """The model and data of an evaluation, its settings and its results."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    checkpoint: str
    model_digest: str
    trained: bool
    data: str
    split: str
    first_stage: str
    scorer: str
    storage: Storage
    num_visual_tokens: int
    payload_bytes_per_image: int
    blob_bytes_per_image: int | None
    seed: int
    num_resamples: int
    results: tuple[Result, ...]
    schema_version: int = SCHEMA_VERSION


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def to_json(report: Report) -> str:
    """The report as one line of JSON."""
    return json.dumps(asdict(report), allow_nan=False)


def read_report(text: str) -> Report:
    """The inverse of `to_json`. Raises `ValueError` for other text."""
    report = _adapter().validate_json(text)
    if report.schema_version != SCHEMA_VERSION:
        raise ValueError(f"a report of version {report.schema_version}; this program reads version {SCHEMA_VERSION}")
    return report


def to_markdown(report: Report) -> str:
    """A line about model, data and settings, then one table per direction and k."""
    parts = [" · ".join(_facts(report))]
    for result in report.results:
        lines = [f"**{_title(result)}**", "", f"| % | {' | '.join(HEADINGS)} |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(cells)} |" for cells in _cells(result.comparison)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def print_report(report: Report, console: Console) -> None:
    """Print the content of `to_markdown` as tables in a terminal."""
    console.print(Text(", ".join(_facts(report))), soft_wrap=True)
    for result in report.results:
        console.print(Text(f"\n{_title(result)}"), soft_wrap=True)
        table = Table("%")
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        for cells in _cells(result.comparison):
            table.add_row(*map(Text, cells))
        console.print(table)


def _facts(report: Report) -> list[str]:
    trained = "" if report.trained else " (UNTRAINED: its scores mean nothing)"
    stored = f"{report.num_visual_tokens} visual tokens as {report.storage}, {report.payload_bytes_per_image:,} B"
    if report.blob_bytes_per_image is not None:
        stored += f" ({report.blob_bytes_per_image:,} B as a blob)"
    return [
        f"{report.checkpoint}, model {report.model_digest}{trained}",
        report.data,
        f"scorer {report.scorer} after {report.first_stage}",
        f"{stored} per image",
        f"95 % intervals of {report.num_resamples:,} resamples over images, or groups of them",
    ]


def _title(result: Result) -> str:
    comparison = result.comparison
    title = (
        f"{comparison.direction}, k = {comparison.k}: {comparison.num_queries:,} queries, "
        f"{comparison.num_candidates:,} candidates"
    )
    return title if result.cost is None else f"{title}, {result.cost.per_pair_at(comparison.k):.3g} GFLOP per pair"


def _cells(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    return [
        (row.metric, _percent(row.first_stage), _percent(row.reranked), _percent(row.difference, sign="+"))
        for row in comparison.rows
    ]


def _percent(interval: Interval, *, sign: str = "") -> str:
    # Adding zero turns a negative zero into a positive one.
    value, low, high = (
        f"{round(100 * each, 1) + 0.0:{sign}.1f}" for each in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"
