"""Shows the timings of one of the demo's requests, from the rerank worker's spans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from server_process import ServiceError
from workers.traces.reading import read_spans
from workers.traces.showing import shared_sentence, terminal_table, write_page
from workers.traces.waterfall import waterfall_of


def show_trace(console: Console, spans: Path, request_ids: Sequence[str], page: Path) -> None:
    """Show the request that shared its batches with most others, in the terminal and as a page.

    Raises `ServiceError` if the worker recorded none of the requests.
    """
    found = read_spans([spans]).spans
    waterfalls = [waterfall for name in request_ids if (waterfall := waterfall_of(found, name)) is not None]
    if not waterfalls:
        raise ServiceError(f"the rerank worker has recorded no spans of the requests in {spans}")
    shown = max(waterfalls, key=lambda waterfall: len(waterfall.shared_with))
    console.print(terminal_table(shown))
    console.print(shared_sentence(shown))
    write_page(shown, page)
    console.print(f"As a page: {page}; of any other request: python -m workers.traces REQUEST_ID --file {spans}")
