"""Writes the demo's report: one HTML file that needs nothing else, with the pictures before and after.

File names and captions come from outside; the template escapes whatever it is given.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageOps

TEMPLATE = "demo_report.html"
#: Twice the size at which they are shown, for dense screens.
THUMBNAIL_SIZE = (256, 192)
JPEG_QUALITY = 70


@dataclass(frozen=True, slots=True)
class Ranked:
    """One candidate in the reply, with its place before."""

    name: str
    caption: str
    rank: int
    rank_before: int
    relevance_score: float
    path: Path | None = None  # of a picture; a text has none


@dataclass(frozen=True, slots=True)
class Ranking:
    """One request and its reply, best first."""

    query: str
    results: Sequence[Ranked]
    timings_ms: Mapping[str, float]
    query_picture: Path | None = None

    def before(self) -> list[Ranked]:
        """The same candidates in the order of the first stage."""
        return sorted(self.results, key=lambda result: result.rank_before)


def write_report(
    path: Path,
    *,
    rankings: Sequence[Ranking],
    trained: bool,
    facts: Mapping[str, str],
    credits: Sequence[str],
) -> None:
    """Write the report; `facts` are shown as they are, in a table."""
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    environment.globals["thumbnail"] = thumbnail
    page = environment.get_template(TEMPLATE).render(rankings=rankings, trained=trained, facts=facts, credits=credits)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def thumbnail(path: Path) -> str:
    """A small copy of a picture, as a data URI."""
    with Image.open(path) as image:
        image.draft("RGB", THUMBNAIL_SIZE)
        small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail(THUMBNAIL_SIZE)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
