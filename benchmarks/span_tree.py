"""Draws the spans of three requests that share a micro-batch, from a real worker, into docs/reference/telemetry.md.

Run: python benchmarks/span_tree.py [--write]

A rerank worker (real Kafka and Redis, an engine that sleeps 0.1 ms per pair) handles three requests, each with a
traceparent, and writes its spans to a file. The output has one tree per trace and letters for the targets of links;
`--write` puts it into the document. The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

from rich.console import Console
from rich.tree import Tree

from harness import ROOT, Bench, RerankTopics, bench, request_json, rerank_worker
from workers.telemetry import names
from workers.traces.reading import Span, read_spans

DOCUMENT = ROOT / "docs" / "reference" / "telemetry.md"
DRAWING = re.compile(r"(<!-- drawing begins -->\n```text\n).*?(```\n<!-- drawing ends -->)", re.DOTALL)
NUM_REQUESTS, CANDIDATES = 3, 8
SHOWN = (names.CONVERSATION, names.STATUS, names.PAIRS, names.MESSAGES, names.DB_BATCH, names.REQUEST_IDS)


def recorded(bench: Bench) -> list[Span]:
    """Return the spans that a worker writes for the three requests."""
    topics = RerankTopics(bench.services.brokers)
    for number in range(NUM_REQUESTS):
        images = bench.images[number * CANDIDATES : (number + 1) * CANDIDATES]
        request_id = f"r-{number + 1}"
        parent = f"00-{number + 1:032x}-{number + 1:016x}-01".encode()
        topics.producer.send(
            topics.topics.rerank_requests,
            request_json(request_id, images),
            request_id.encode(),
            headers=[("traceparent", parent)],
            partition=0,  # one poll returns all of them
        )
    topics.producer.flush()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spans.jsonl"
        settings = {"span_file": path, "constant_engine_ms_per_item": 0.1, "max_batch_wait_ms": 50}
        with rerank_worker(bench, topics.prefix, **settings):
            topics.replies(NUM_REQUESTS)
        spans = read_spans([path]).spans
    topics.close()
    # The benchmark's topics have a unique prefix; the drawing leaves it out.
    return [replace(span, name=span.name.replace(topics.prefix, "")) for span in spans]


def drawing(spans: list[Span]) -> str:
    """Return one tree per trace as text."""
    by_time = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    known = {span.key for span in spans}
    children: dict[tuple[str, str], list[Span]] = defaultdict(list)
    tops = []
    for span in by_time:
        above = (span.trace_id, span.parent_id or "")
        (children[above] if above in known else tops).append(span)
    linked = {link for span in spans for link in span.links}
    letters = dict(zip((span.key for span in by_time if span.key in linked), ascii_uppercase, strict=False))
    # A poll links to the producers' spans: the parents of the process spans.
    for span in by_time:
        if span.name.startswith("process "):
            letters[span.trace_id, span.parent_id or ""] = f"parent of {letters[span.key]}"
    began_ns = by_time[0].start_ns
    console = Console(width=140, highlight=False, markup=False)
    with console.capture() as capture:
        for top in tops:
            tree = Tree(_label(top, began_ns, letters))
            _grow(tree, top, children, began_ns, letters)
            console.print(tree)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def _grow(tree: Tree, span: Span, children: dict, began_ns: int, letters: dict) -> None:
    for child in children[span.key]:
        _grow(tree.add(_label(child, began_ns, letters)), child, children, began_ns, letters)


def _label(span: Span, began_ns: int, letters: dict) -> str:
    letter = f"({letters[span.key]}) " if span.key in letters else ""
    start_ms, took_ms = (span.start_ns - began_ns) / 1e6, (span.end_ns - span.start_ns) / 1e6
    shown = [
        f"{name.name.rpartition('.')[2]}={_text(span.attributes[name.name])}"
        for name in SHOWN
        if name.name in span.attributes
    ]
    links = sorted(letters.get(link, "unknown") for link in span.links)
    arrow = f"  -> {', '.join(links)}" if links else ""
    return f"{letter}{span.name}  {start_ms:.2f} ms + {took_ms:.2f} ms  {' '.join(shown)}{arrow}"


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the drawing into docs/reference/telemetry.md")
    write = parser.parse_args().write
    with bench(NUM_REQUESTS * CANDIDATES) as ready:
        spans = recorded(ready)
    drawn = drawing(spans)
    print(drawn)
    if write:
        text = DOCUMENT.read_text()
        DOCUMENT.write_text(DRAWING.sub(lambda found: found[1] + drawn + found[2], text))
    batches = [span for span in spans if span.name == names.MICRO_BATCH.name]
    print(json.dumps({"spans": len(spans), "micro_batches": len(batches), "links": [len(b.links) for b in batches]}))


if __name__ == "__main__":
    main()
