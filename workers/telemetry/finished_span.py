"""A finished span as a plain tuple, which the loop's thread fills in and an exporter converts.

The SDK's span takes ten microseconds more and leaves a dozen objects to the garbage collector (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from workers.ports import SpanIds
from workers.telemetry.names import SpanName

#: The instrumentation scope of every span.
SCOPE: Final = "edje.workers"


class FinishedSpan(NamedTuple):
    """Times are nanoseconds since 1970."""

    what: SpanName
    of: str  # completes the name: a topic or a stage
    ids: SpanIds
    started_ns: int
    ended_ns: int
    attributes: Mapping[str, Any]
    links: tuple[SpanIds, ...] = ()
    state: bytes = b""  # the message's `tracestate`
    failed: bool = False

    @property
    def name(self) -> str:
        return self.what.stem + self.of

    @property
    def parent_is_remote(self) -> bool:
        """Whether the parent span belongs to another process: to a producer or an HTTP client."""
        return self.what.kind in ("CONSUMER", "SERVER")


class SpanExporter(Protocol):
    """A destination of spans, called from its own thread."""

    def export(self, spans: Sequence[FinishedSpan]) -> bool:
        """Send these spans and wait; returns whether the destination has accepted them."""

    def shutdown(self) -> None:
        """End a wait, from any thread; later spans are not accepted."""
