"""Reads spans from files of OTLP in JSON lines, as workers and the OpenTelemetry Collector's file exporter write them.

A file may be cut off or contain other data: lines that are no spans are counted and left out.
Knows nothing of the spans' meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

#: Longest line: a collector's batch has a few hundred spans.
MAX_LINE_BYTES = 16 << 20
MAX_TEXT_CHARS = 300
_ID, _TRACE_ID = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{32}")
_MAX_NS = 1 << 63

Value = str | int | float | bool | list[Any]


@dataclass(frozen=True, slots=True)
class Span:
    """One validated span."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    start_ns: int
    end_ns: int
    is_error: bool
    attributes: Mapping[str, Value]
    links: frozenset[tuple[str, str]]  # trace id and span id

    @property
    def key(self) -> tuple[str, str]:
        return self.trace_id, self.span_id


@dataclass(slots=True)
class SpanFile:
    """The spans in some files."""

    spans: list[Span] = field(default_factory=list)
    num_bad_lines: int = 0


def read_spans(paths: Iterable[Path]) -> SpanFile:
    """Return every span of the files. Raises `OSError` for a file that cannot be read."""
    found = SpanFile()
    for path in paths:
        with path.open("rb") as file:
            for line in _lines(file):
                try:
                    found.spans.extend(_spans(orjson.loads(line)))
                except (ValueError, TypeError, KeyError, AttributeError):  # not a span
                    found.num_bad_lines += 1
    return found


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the non-empty lines; a too long line is split into parts, which are not valid JSON."""
    while line := file.readline(MAX_LINE_BYTES):
        if line.strip():
            yield line


def _spans(document: Any) -> list[Span]:
    spans: list[Span] = []
    for resource in document["resourceSpans"]:
        service = _attributes(resource.get("resource", {}).get("attributes", ())).get("service.name", "")
        for scope in resource["scopeSpans"]:
            spans.extend(_span(span, str(service)) for span in scope["spans"])
    return spans


def _span(span: Any, service: str) -> Span:
    start_ns, end_ns = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
    if not 0 <= start_ns <= end_ns < _MAX_NS:
        raise ValueError("a span ends before it starts")
    return Span(
        trace_id=_id(_TRACE_ID, span["traceId"]),
        span_id=_id(_ID, span["spanId"]),
        parent_id=_id(_ID, span["parentSpanId"]) if span.get("parentSpanId") else None,
        name=_text(span["name"]),
        service=service,
        start_ns=start_ns,
        end_ns=end_ns,
        is_error=span.get("status", {}).get("code") == 2,
        attributes=_attributes(span.get("attributes", ())),
        links=frozenset((_id(_TRACE_ID, link["traceId"]), _id(_ID, link["spanId"])) for link in span.get("links", ())),
    )


def _attributes(attributes: Any) -> dict[str, Value]:
    return {_text(each["key"]): _value(each["value"]) for each in attributes}


def _value(value: Any) -> Value:
    match value:
        case {"stringValue": text}:
            return _text(text)
        case {"intValue": number}:
            return int(number)
        case {"doubleValue": float() | int() as number}:
            return number
        case {"boolValue": bool() as flag}:
            return flag
        case {"arrayValue": {"values": parts}}:
            return [_value(part) for part in parts]
        case _:
            return ""


def _text(text: Any) -> str:
    """Return text that is safe to print: bounded, without control characters."""
    if not isinstance(text, str):
        raise TypeError("not a text")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:MAX_TEXT_CHARS])


def _id(pattern: re.Pattern[str], text: Any) -> str:
    if not pattern.fullmatch(text):
        raise ValueError("not an id")
    return str(text)
