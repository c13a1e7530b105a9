"""Reads and writes the W3C trace context of a message.

Headers only; `workers.telemetry.tracer` makes spans. Written by hand because every message needs it: the
propagator of the OpenTelemetry API takes two to three times as long (a test compares the two).
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from workers.ports import Headers

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

#: version-trace-span-flags; later versions than 00 may have more after the flags.
_PARENT = re.compile(rb"[ \t]*([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x20-\x7e]*|[ \t]*)")
_STATE = re.compile(rb"[\x20-\x7e]*")
#: The tracestate length that W3C requires to be propagated, and the limits of reading.
MAX_STATE_BYTES = 512
MAX_PARENT_BYTES = 512
_NO_TRACE, _NO_SPAN = b"0" * 32, b"0" * 16
SAMPLED = 1


class TraceContext(NamedTuple):
    """A span's identity as messages carry it: ids in lower-case hexadecimal."""

    trace_id: bytes
    span_id: bytes
    flags: int
    state: bytes = b""

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & SAMPLED)


def read_context(headers: Headers) -> TraceContext | None:
    """Return the context of a message, None without a valid one.

    Of several headers with the name, the last counts, as usual in Kafka.
    """
    value, states = b"", []
    for name, given in headers:
        if name == TRACEPARENT:
            value = given
        elif name == TRACESTATE:
            states.append(given)
    match = _PARENT.fullmatch(value) if len(value) <= MAX_PARENT_BYTES else None
    if match is None:
        return None
    version, trace, span, flags, rest = match.groups()
    if trace == _NO_TRACE or span == _NO_SPAN or version == b"ff" or (version == b"00" and rest[:1] == b"-"):
        return None
    state = b",".join(states)
    if state and (len(state) > MAX_STATE_BYTES or not _STATE.fullmatch(state)):
        state = b""
    return TraceContext(trace, span, int(flags, 16), state)


def names_context(headers: Headers) -> bool:
    """Whether a message has a `traceparent`, valid or not."""
    return any(name == TRACEPARENT for name, _ in headers)


def new_context(flags: int = 0) -> TraceContext:
    """Return the context of a new trace."""
    return TraceContext(b"%032x" % new_id(128), b"%016x" % new_id(64), flags)


def context_headers(context: TraceContext) -> Headers:
    """Return the headers of a context."""
    traceparent = (TRACEPARENT, b"00-%b-%b-%02x" % (context.trace_id, context.span_id, context.flags))
    return (traceparent, (TRACESTATE, context.state)) if context.state else (traceparent,)


def trace_id_of(headers: Headers) -> str | None:
    """Return the trace id of a message as 32 hexadecimal digits, None without a valid one."""
    context = read_context(headers)
    return None if context is None else context.trace_id.decode()


def new_id(bits: int) -> int:
    return random.getrandbits(bits) or 1  # zero is not a valid id
