"""Writes the tables of docs/reference/telemetry.md from the names: `python -m workers.telemetry.document`.

The text around the tables is written by hand and stays; a test compares the tables with the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from workers.telemetry.names import ATTRIBUTES, IMAGE_STAGES, METRICS, PUBLISH, REQUEST_STAGES, SPANS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "telemetry.md"
_TABLE = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def tables() -> dict[str, str]:
    """Return each table by its name in the document."""
    request_stages = [(f"`{name}`", meaning) for name, meaning in REQUEST_STAGES.items()]
    published = (
        f"`{PUBLISH}`",
        "From the outcome until the broker has all its messages. A metric only; the span is `send`.",
    )
    return {
        "spans": _table(
            ("span", "kind", "parent", "meaning"),
            [(f"`{span.name}`", span.kind, span.parent, span.meaning) for span in SPANS],
        ),
        "stages": _table(("stage of a request", "meaning"), [*request_stages, published]),
        "image_stages": _table(
            ("stage of an image", "meaning"), [(f"`{name}`", meaning) for name, meaning in IMAGE_STAGES.items()]
        ),
        "attributes": _table(
            ("attribute", "meaning"), [(f"`{attribute.name}`", attribute.meaning) for attribute in ATTRIBUTES]
        ),
        "metrics": _table(
            ("metric", "kind", "labels", "meaning"),
            [
                (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.meaning)
                for metric in METRICS
            ],
        ),
    }


def renewed(text: str) -> str:
    """Return the document with current tables. Raises `KeyError` for an unknown table."""
    made = tables()
    return _TABLE.sub(lambda match: f"<!-- begin {match[1]} -->\n{made[match[1]]}<!-- end {match[1]} -->", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text()))
