"""A tracer whose spans a test can inspect, converted to spans of the SDK."""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from workers.telemetry.finished_span import SCOPE, FinishedSpan
from workers.telemetry.sampling import Sampling
from workers.telemetry.tracer import Tracer

EVERYTHING = Sampling.named("parentbased_always_on", 0.0)


class Recorded:
    """The spans that a tracer has recorded."""

    def __init__(self) -> None:
        self.finished: list[FinishedSpan] = []
        self.num_bad_contexts = 0

    def tracer(
        self,
        clock: Callable[[], float] = lambda: 0.0,
        *,
        wall_ns: Callable[[], int] = lambda: 0,
        sampling: Sampling = EVERYTHING,
    ) -> Tracer:
        return Tracer(
            sampling=sampling,
            emit=self.finished.append,
            clock=clock,
            wall_ns=wall_ns,
            count_bad_context=self.count_bad_context,
        )

    def count_bad_context(self) -> None:
        self.num_bad_contexts += 1

    @property
    def spans(self) -> list[ReadableSpan]:
        return [as_sdk_span(span) for span in self.finished]

    def names(self) -> list[str]:
        return [span.name for span in self.spans]

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        """The one span of this name."""
        (span,) = self.named(name)
        return span

    def under(self, parent: ReadableSpan) -> list[ReadableSpan]:
        return [span for span in self.spans if span.parent and span.parent.span_id == parent.context.span_id]


def as_sdk_span(span: FinishedSpan) -> ReadableSpan:
    """The same span as the SDK would have made it, without a resource."""

    def context(span_id: int, *, is_remote: bool = False, state: bytes = b"", trace_id: int = span.ids.trace_id):
        parsed = TraceState.from_header([state.decode()]) if state else None
        return SpanContext(trace_id, span_id, is_remote, TraceFlags(TraceFlags.SAMPLED), parsed)

    parent_id = span.ids.parent_id
    return ReadableSpan(
        name=span.name,
        context=context(span.ids.span_id, state=span.state),
        parent=None if parent_id is None else context(parent_id, is_remote=span.parent_is_remote),
        resource=Resource.get_empty(),
        attributes=span.attributes,
        links=[Link(context(link.span_id, trace_id=link.trace_id)) for link in span.links],
        kind=SpanKind[span.what.kind],
        status=Status(StatusCode.ERROR if span.failed else StatusCode.UNSET),
        start_time=span.started_ns,
        end_time=span.ended_ns,
        instrumentation_scope=InstrumentationScope(SCOPE),
    )


def seconds(span: ReadableSpan) -> float:
    return (span.end_time - span.start_time) / 1e9


def links(span: ReadableSpan) -> set[int]:
    """The ids of the spans that this one links to."""
    return {link.context.span_id for link in span.links}
