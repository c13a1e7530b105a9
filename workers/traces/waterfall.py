"""Arranges the spans of one request: its trace, and linked spans that it shared with other requests.

Pure. Knows neither files nor how a waterfall is shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from workers.telemetry import names
from workers.traces.reading import Span, Value

Key = tuple[str, str]  # trace id and span id


@dataclass(frozen=True, slots=True)
class Row:
    """One bar; times are milliseconds from the start of the request's processing."""

    span: Span
    depth: int
    start_ms: float
    duration_ms: float
    is_shared: bool  # with other requests, and linked to them


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The bars of one request."""

    event_id: str
    trace_id: str
    rows: Sequence[Row]
    shared_with: Sequence[str]  # the other requests of its micro-batches
    num_traces: int  # traces of this id; the latest is shown

    @property
    def first_ms(self) -> float:
        return min(row.start_ms for row in self.rows)

    @property
    def span_ms(self) -> float:
        """Milliseconds from the first beginning to the last end; never 0, because bars are fractions of it."""
        return max(max(row.start_ms + row.duration_ms for row in self.rows) - self.first_ms, 1e-6)


def waterfall_of(spans: Sequence[Span], event_id: str) -> Waterfall | None:
    """Return the waterfall of a request or an image by its id, None without a span of it."""
    processed = [
        span
        for span in spans
        if span.name.startswith("process ") and span.attributes.get(names.CONVERSATION.name) == event_id
    ]
    if not processed:
        return None
    latest = max(processed, key=lambda span: span.start_ns)
    children: dict[Key, list[Span]] = defaultdict(list)
    for span in spans:
        if span.parent_id is not None:
            children[span.trace_id, span.parent_id].append(span)
    own = [*_ancestors(latest, spans), *_subtree(latest, children)]
    ours = {span.key for span in own}
    linked = {link for span in own for link in span.links}
    producer = (latest.trace_id, latest.parent_id)
    roots = [
        span
        for span in spans
        if names.CONVERSATION.name not in span.attributes  # others belong to another message
        and span.key not in ours
        and (span.key in linked or any(link in ours or link == producer for link in span.links))
    ]
    shared = [each for span in roots for each in _subtree(span, children)]
    return Waterfall(
        event_id=event_id,
        trace_id=latest.trace_id,
        rows=_rows([*own, *shared], processed=latest, roots={span.key for span in roots}, shared=shared),
        shared_with=_shared_with(shared, event_id),
        num_traces=len({span.trace_id for span in processed}),
    )


def _subtree(top: Span, children: Mapping[Key, list[Span]]) -> list[Span]:
    """Return a span and its descendants, without other requests of the trace."""
    found = {top.key: top}
    waiting = [top]
    while waiting:
        for child in children.get(waiting.pop().key, ()):
            if child.key not in found:  # in a manipulated file, parents may form a circle
                found[child.key] = child
                waiting.append(child)
    return list(found.values())


def _ancestors(processed: Span, spans: Iterable[Span]) -> list[Span]:
    """Return the ancestors of the processing span."""
    trace = {span.span_id: span for span in spans if span.trace_id == processed.trace_id}
    found: dict[str, Span] = {}
    above = trace.get(processed.parent_id or "")
    while above is not None and above.span_id not in found and above.span_id != processed.span_id:
        found[above.span_id] = above
        above = trace.get(above.parent_id or "")
    return list(found.values())


def _shared_with(spans: Iterable[Span], event_id: str) -> list[str]:
    found: dict[str, None] = {}
    for span in spans:
        ids: Value = span.attributes.get(names.REQUEST_IDS.name) or span.attributes.get(names.IMAGE_IDS.name) or []
        if isinstance(ids, list):
            found.update(dict.fromkeys(map(str, ids)))
    found.pop(event_id, None)
    return list(found)


def _rows(spans: Sequence[Span], *, processed: Span, roots: set[Key], shared: Iterable[Span]) -> list[Row]:
    """Return the bars depth first, in order of time; shared `roots` follow the processing span that links to them."""
    known = {span.key: span for span in spans}
    keys_shared = {span.key for span in shared}
    children: dict[Key | None, list[Span]] = defaultdict(list)
    for span in known.values():
        parent = processed.key if span.key in roots else (span.trace_id, span.parent_id or "")
        children[parent if parent in known else None].append(span)
    rows: list[Row] = []
    waiting = [(span, 0) for span in sorted(children.pop(None, []), key=_by_time, reverse=True)]
    while waiting:
        span, depth = waiting.pop()
        start_ms, duration_ms = (span.start_ns - processed.start_ns) / 1e6, (span.end_ns - span.start_ns) / 1e6
        rows.append(Row(span, depth, start_ms, duration_ms, is_shared=span.key in keys_shared))
        below = sorted(children.pop(span.key, []), key=_by_time, reverse=True)
        waiting.extend((child, depth + 1) for child in below)
    return rows


def _by_time(span: Span) -> tuple[int, int]:
    return span.start_ns, -span.end_ns
