"""Shows a waterfall as a table in the terminal and as one self-contained HTML page.

Names and attributes are untrusted: the page escapes every value.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from workers.traces.waterfall import Row, Waterfall

BAR_CHARS = 30
NUMBER_CHARS = 8
#: Most requests that are listed as sharing a batch.
MAX_NAMED = 12


def headline(waterfall: Waterfall) -> str:
    """Return the sentence that identifies the trace."""
    again = f", the latest of {waterfall.num_traces} traces" if waterfall.num_traces > 1 else ""
    return f"{waterfall.event_id}: trace {waterfall.trace_id}{again}"


def shared_sentence(waterfall: Waterfall) -> str:
    """Return the sentence about the requests that shared the request's batches."""
    others = waterfall.shared_with
    if not others:
        return "It had its batches to itself."
    more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
    return f"Its batches were shared with {', '.join(others[:MAX_NAMED])}{more}."


def terminal_table(waterfall: Waterfall) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    table.title = Text(headline(waterfall), style="bold")
    table.add_column("span", overflow="ellipsis", no_wrap=True)
    for numbers in ("from ms", "ms"):
        table.add_column(numbers, justify="right", no_wrap=True, min_width=NUMBER_CHARS)
    table.add_column("", min_width=BAR_CHARS, no_wrap=True)
    for row in waterfall.rows:
        style = "red" if row.span.is_error else "cyan" if row.is_shared else ""
        table.add_row(
            Text("  " * row.depth + row.span.name, style=style),
            f"{row.start_ms:.2f}",
            f"{row.duration_ms:.2f}",
            Text(_bar(waterfall, row), style=style or "green"),
        )
    return table


def _bar(waterfall: Waterfall, row: Row) -> str:
    left = int((row.start_ms - waterfall.first_ms) / waterfall.span_ms * BAR_CHARS)
    left = min(left, BAR_CHARS - 1)
    width = max(1, round(row.duration_ms / waterfall.span_ms * BAR_CHARS))
    return " " * left + "█" * min(width, BAR_CHARS - left)


def page_of(waterfall: Waterfall) -> str:
    """Return the HTML page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html").render(
        headline=headline(waterfall), shared=shared_sentence(waterfall), bars=list(_bars(waterfall))
    )


def write_page(waterfall: Waterfall, path: Path) -> None:
    """Write the HTML page. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(waterfall), encoding="utf-8")


def _bars(waterfall: Waterfall) -> Iterator[dict[str, object]]:
    for row in waterfall.rows:
        yield {
            "row": row,
            "left": round((row.start_ms - waterfall.first_ms) / waterfall.span_ms * 100, 3),
            "width": round(row.duration_ms / waterfall.span_ms * 100, 3),
            "kind": "error" if row.span.is_error else "shared" if row.is_shared else "own",
        }
