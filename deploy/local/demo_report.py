"""Writes the demo's report: one self-contained HTML file with the pictures before and after reranking.

File names and captions are untrusted; the template escapes every value.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageOps

from demo_rankings import Figures, Ranking

TEMPLATE = "demo_report.html"
#: Size of thumbnails in pixels: twice the size on the page, for dense screens.
THUMBNAIL_SIZE = (256, 192)
JPEG_QUALITY = 70
#: Most candidates of a question that are shown.
NUM_PICTURES = 10


@dataclass(frozen=True, slots=True)
class Caveat:
    """The reason why a ranking is meaningless."""

    headline: str
    explanation: str


def write_report(
    path: Path,
    *,
    rankings: Sequence[Ranking],
    found_by: str,
    figures: Figures | None,
    caveat: Caveat | None,
    facts: Mapping[str, str],
) -> None:
    """Write the report; `found_by` is the first stage's means, `facts` are shown as they are, in a table."""
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    environment.globals["thumbnail"] = thumbnail
    page = environment.get_template(TEMPLATE).render(
        rankings=rankings,
        found_by=found_by,
        figures=figures,
        caveat=caveat,
        facts=facts,
        num_pictures=NUM_PICTURES,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def thumbnail(path: Path) -> str:
    """Return a small copy of a picture as a data URI."""
    with Image.open(path) as image:
        image.draft("RGB", THUMBNAIL_SIZE)
        small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail(THUMBNAIL_SIZE)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
