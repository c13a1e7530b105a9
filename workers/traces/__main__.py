"""`python -m workers.traces REQUEST_ID --file spans.jsonl`: the waterfall of one request, as a table and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from workers.telemetry.span_file import predecessor_of
from workers.traces.reading import read_spans
from workers.traces.showing import shared_sentence, terminal_table, write_page
from workers.traces.waterfall import waterfall_of

app = typer.Typer(add_completion=False)


@app.command()
def main(
    request_id: Annotated[str, typer.Argument(help="request_id of a request, or image_id of an image.")],
    file: Annotated[
        list[Path] | None, typer.Option(help="File of spans, *_SPAN_FILE of a worker; several may be given.")
    ] = None,
    html: Annotated[Path, typer.Option(help="Path of the HTML page.")] = Path("trace.html"),
) -> None:
    """Show the timings of one request."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    given = file or [Path("spans.jsonl")]
    paths = [path for name in given for path in (predecessor_of(name), name) if path.exists() or path == name]
    try:
        found = read_spans(paths)
    except OSError as error:
        console.print(f"{error.filename}: {error.strerror}")
        raise typer.Exit(1) from error
    if found.num_bad_lines:
        console.print(f"{found.num_bad_lines} lines are not spans and were left out")
    waterfall = waterfall_of(found.spans, request_id)
    if waterfall is None:
        console.print(
            f"none of {len(found.spans)} spans is of {request_id}: was it sampled, and is this its worker's file?"
        )
        raise typer.Exit(1)
    console.print(terminal_table(waterfall))
    console.print(shared_sentence(waterfall))
    try:
        write_page(waterfall, html)
    except OSError as error:
        console.print(f"{html}: {error.strerror}")
        raise typer.Exit(1) from error
    console.print(f"HTML page: {html}")


if __name__ == "__main__":
    app(prog_name="python -m workers.traces")
