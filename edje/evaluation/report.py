"""The report of an evaluation: tables in the terminal, Markdown, and a JSON document that can be read again.

Figures are fractions in JSON and per cent in the tables, followed by their 95 % intervals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Protocol

from pydantic import ConfigDict, TypeAdapter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edje.calibration import Calibration
from edje.evaluation.bootstrap import Interval
from edje.evaluation.comparison import Comparison, MetricRow
from edje.evaluation.cost import ScorerCost
from edje.evaluation.reliability import Reliability
from edje.evaluation.storage import Storage

SCHEMA_VERSION = 2
HEADINGS = ("first stage", "reranked", "difference")
_UNTRAINED = " (UNTRAINED: its scores mean nothing)"


@dataclass(frozen=True, slots=True)
class Section:
    """One table of a report: a title, a row per metric, and sentences below it."""

    title: str
    rows: tuple[MetricRow, ...]
    remarks: tuple[str, ...]


class Tabular(Protocol):
    """A report that can be printed as tables."""

    def facts(self) -> Sequence[str]:
        """Model, data and settings, in a few words each."""
        ...

    def sections(self) -> Sequence[Section]: ...


@dataclass(frozen=True, slots=True)
class Result:
    """One direction at one k."""

    comparison: Comparison
    cost: ScorerCost | None  # None: unknown
    reliability: Reliability | None = None  # None: the scorer returns no log-odds
    shuffled: Comparison | None = None  # requests in random order without scores; None: the model reads no scores

    def section(self) -> Section:
        """The result as a table."""
        comparison = self.comparison
        title = (
            f"{comparison.direction}, k = {comparison.k}: {comparison.num_queries:,} queries, "
            f"{comparison.num_candidates:,} candidates"
        )
        if self.cost is not None:
            title += f", {self.cost.per_pair_at(comparison.k):.3g} GFLOP per pair"
        remarks = [changes(comparison.better, comparison.worse)]
        if self.shuffled is not None:
            remarks.append(
                "requests without scores: as above if the candidates keep the first stage's order; in random order R@1 "
                f"{percent(self.shuffled.row('R@1').reranked)}"
            )
        if self.reliability is not None:
            remarks.append(_probabilities(self.reliability))
        return Section(title, comparison.rows, tuple(remarks))


@dataclass(frozen=True, slots=True)
class Report:
    """The model and data of an evaluation, its settings and its results."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    checkpoint: str
    model_digest: str
    trained: bool
    calibration: Calibration | None
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

    def facts(self) -> Sequence[str]:
        """Model, data and settings, in a few words each."""
        stored = f"{self.num_visual_tokens} visual tokens as {self.storage}, {self.payload_bytes_per_image:,} B"
        if self.blob_bytes_per_image is not None:
            stored += f" ({self.blob_bytes_per_image:,} B as a blob)"
        return (
            f"{self.checkpoint}, model {self.model_digest}{'' if self.trained else _UNTRAINED}",
            calibration_fact(self.calibration),
            self.data,
            f"scorer {self.scorer} after {self.first_stage}",
            f"{stored} per image",
            f"95 % intervals of {self.num_resamples:,} resamples over images, or groups of them",
        )

    def sections(self) -> Sequence[Section]:
        """A section per direction and k."""
        return [result.section() for result in self.results]


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


def to_markdown(report: Tabular) -> str:
    """A line about model, data and settings, then one table per section."""
    parts = [" · ".join(report.facts())]
    for section in report.sections():
        lines = [f"**{section.title}**", "", f"| % | {' | '.join(HEADINGS)} |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in section.rows]
        parts.append("\n".join(lines))
        parts += [f"{remark}." for remark in section.remarks]
    return "\n\n".join(parts) + "\n"


def print_report(report: Tabular, console: Console) -> None:
    """Print the content of `to_markdown` as tables in a terminal."""
    console.print(Text(", ".join(report.facts())), soft_wrap=True)
    for section in report.sections():
        console.print(Text(f"\n{section.title}"), soft_wrap=True)
        table = Table("%")
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        for row in section.rows:
            table.add_row(*map(Text, _cells(row)))
        console.print(table)
        for remark in section.remarks:
            console.print(Text(remark), soft_wrap=True)


def calibration_fact(calibration: Calibration | None) -> str:
    """Whether relevance scores are probabilities."""
    if calibration is None:
        return "not calibrated: relevance scores are sigmoids of logits, not probabilities"
    gains = [f"{direction} {constants.first_stage_gain:.3g}" for direction, constants in calibration.by_direction()]
    return f"calibrated, first-stage gain {', '.join(gains)}"


def changes(better: Interval, worse: Interval) -> str:
    """The shares of queries that reranking made better and worse."""
    return f"queries: {percent(better)} % better, {percent(worse)} % worse"


def percent(interval: Interval, *, sign: str = "") -> str:
    """A figure and its interval in per cent, with one decimal."""
    # Adding zero turns a negative zero into a positive one.
    value, low, high = (
        f"{round(100 * each, 1) + 0.0:{sign}.1f}" for each in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


def _cells(row: MetricRow) -> tuple[str, str, str, str]:
    return row.metric, percent(row.first_stage), percent(row.reranked), percent(row.difference, sign="+")


def _probabilities(figures: Reliability) -> str:
    named = (
        ("ECE", figures.calibration_error),
        ("Brier score", figures.brier_score),
        ("log loss", figures.log_loss),
        ("average precision", figures.average_precision),
    )
    values = ", ".join(f"{name} {each.value:.4f} [{each.low:.4f}, {each.high:.4f}]" for name, each in named)
    share = 100 * figures.positive_share
    return f"probabilities of {figures.num_pairs:,} pairs, {share:.1f} % of them positive: {values}"
