"""A tracer whose spans a test looks at, and a view of them that is easy to compare."""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from workers.telemetry.sampling import Sampling
from workers.telemetry.tracer import Tracer

EVERYTHING = Sampling.named("parentbased_always_on", 0.0)


class Recorded:
    """What a tracer has recorded."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
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
            resource=Resource.get_empty(),
            emit=self.spans.append,
            clock=clock,
            wall_ns=wall_ns,
            count_bad_context=self.count_bad_context,
        )

    def count_bad_context(self) -> None:
        self.num_bad_contexts += 1

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


def seconds(span: ReadableSpan) -> float:
    return (span.end_time - span.start_time) / 1e9


def links(span: ReadableSpan) -> set[int]:
    """The ids of the spans that this one links to."""
    return {link.context.span_id for link in span.links}
