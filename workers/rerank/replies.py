"""Reads rerank requests and writes what answers them: rankings, expiries, errors and dead letters.

The bridge between the wire contract and the job; decides nothing about when.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import structlog

from protocols.encoding import (
    CONTENT_TYPE_HEADER,
    JSON,
    MSGPACK,
    EventError,
    content_type_of,
    decode,
    encode,
    encode_response,
)
from protocols.events import ErrorInfo, RerankRequest, RerankResponse
from protocols.fields import MAX_ERROR_MESSAGE_CHARS
from protocols.salvage import salvage_id
from workers.dead_letters import DeadLetters
from workers.errors import Poison, Refused, TooLarge
from workers.metrics import Metrics
from workers.ports import Finished, Outgoing, Record
from workers.rerank.ranking import NotFinite, rank
from workers.rerank.spans import RerankSpans
from workers.rerank.state import ActiveRequest
from workers.rerank.timeline import Timeline, timeline_of, timeline_of_refused
from workers.telemetry.tracer import MessageTrace

log = structlog.get_logger(__name__)

#: Decimals of a relevance score on the wire: finer than any engine's rounding, and a third of the bytes.
SCORE_DECIMALS = 7


def about(record: Record, trace: MessageTrace, request_id: str | None) -> dict[str, object]:
    """What every log line about a request carries."""
    return {"request_id": request_id, "trace_id": trace.trace_id, "offset": record.offset}


@dataclass(frozen=True, slots=True)
class _Asked:
    """Who gets the reply, and what every reply says whatever it says else."""

    record: Record
    trace: MessageTrace
    request_id: str
    reply_topic: str
    timeline: Timeline


class Replies:
    """Writes replies for one model and one engine."""

    def __init__(
        self,
        *,
        reply_topic: str,
        dead_letters: DeadLetters,
        model_digest: str,
        engine_digest: str,
        metrics: Metrics,
        spans: RerankSpans,
    ) -> None:
        """`reply_topic` is where replies go by default, and where the sender learns that they cannot go elsewhere."""
        self._reply_topic = reply_topic
        self._dead_letters = dead_letters
        self._model = model_digest
        self._engine = engine_digest
        self._metrics = metrics
        self._spans = spans

    def read(self, record: Record) -> RerankRequest:
        """Decode a request. Raises `Poison`."""
        try:
            return decode(RerankRequest, record.value, content_type_of(record.headers))
        except EventError as error:
            raise Poison(error.code, str(error)) from error

    def answered(self, active: ActiveRequest, now: float) -> Finished:
        """The ranking of a request whose pairs are all scored or known to be missing."""
        plan, timeline = active.plan, timeline_of(active, now)
        logits, scored = active.logits, active.scored
        absent = np.flatnonzero(~scored)
        if plan.candidate_pairs is not None:
            logits, scored = logits[plan.candidate_pairs], scored[plan.candidate_pairs]
        try:
            order, relevance_scores = rank(logits, scored if len(absent) else None, plan.top_n)
        except NotFinite as error:
            code = "score_not_finite"
            log.error("score not finite", **about(active.record, active.trace, plan.request_id), error=str(error))
            self._metrics.count_event("error")
            self._spans.answered(active, timeline, "error", code)
            asked = _Asked(active.record, active.trace, plan.request_id, plan.reply_topic, timeline)
            return self._error(asked, code, str(error))
        missing = list(dict.fromkeys(plan.images[plan.pair_image(pair)] for pair in absent.tolist()))
        status: Literal["ok", "partial"] = "partial" if missing else "ok"
        value = encode_response(
            plan.request_id,
            status,
            order.tolist(),
            plan.candidate_ids,
            np.round(relevance_scores, SCORE_DECIMALS).tolist(),
            np.round(logits[order].astype(np.float64), SCORE_DECIMALS).tolist(),
            missing=missing,
            model=self._model,
            engine=self._engine,
            timings_ms=timeline.timings_ms(),
            content_type=_content_type(active.record),
        )
        return self._ended(active, timeline, status, value, num_pairs=plan.num_pairs)

    def expired(self, active: ActiveRequest, now: float) -> Finished:
        """The reply to a request whose deadline has passed."""
        plan, timeline = active.plan, timeline_of(active, now)
        response = RerankResponse(
            request_id=plan.request_id,
            status="expired",
            model=self._model,
            engine=self._engine,
            timings_ms=timeline.timings_ms(),
        )
        log.debug("request expired", **about(active.record, active.trace, plan.request_id))
        return self._ended(active, timeline, "expired", encode(response, _content_type(active.record)), num_pairs=0)

    def _ended(
        self,
        active: ActiveRequest,
        timeline: Timeline,
        status: Literal["ok", "partial", "expired"],
        value: bytes,
        *,
        num_pairs: int,
    ) -> Finished:
        plan, exemplar = active.plan, active.trace.exemplar()
        self._metrics.count_event(status)
        seconds = timeline.total.ended_at - active.accepted_at
        self._metrics.count_reply(status, seconds=seconds, num_pairs=num_pairs, exemplar=exemplar)
        self._metrics.observe_stages(timeline.stages, exemplar)
        self._spans.answered(active, timeline, status, "expired" if status == "expired" else None)
        asked = _Asked(active.record, active.trace, plan.request_id, plan.reply_topic, timeline)
        return self._finished(asked, value)

    def refused(self, record: Record, trace: MessageTrace, poison: Poison, reply_topic: str, now: float) -> Finished:
        """The outcome of a message that can never succeed: a dead letter, and a reply if its id can be read."""
        error_class = type(poison.__cause__ or poison).__name__
        messages = [self._dead_letters.of(record, error_class=error_class, code=poison.code, message=str(poison))]
        request_id = salvage_id(record.value, record.key, "request_id")
        log.warning("request refused", **about(record, trace, request_id), code=poison.code, error=str(poison))
        timeline = timeline_of_refused(record, now)
        self._spans.refused(record, trace, timeline, request_id, poison.code)
        if request_id is not None:
            asked = _Asked(record, trace, request_id, reply_topic, timeline)
            messages.extend(self._error(asked, poison.code, str(poison)).messages)
        return Finished(record, tuple(messages), trace.span)

    def _error(self, asked: _Asked, code: str, message: str) -> Finished:
        self._metrics.count_reply("error", seconds=None, num_pairs=0)
        return Finished(asked.record, (self._counted(self._error_reply(asked, code, message)),), asked.trace.span)

    def _error_reply(self, asked: _Asked, code: str, message: str) -> Outgoing:
        response = RerankResponse(
            request_id=asked.request_id,
            status="error",
            model=self._model,
            engine=self._engine,
            timings_ms=asked.timeline.timings_ms(),
            error=ErrorInfo(code=code, message=message[:MAX_ERROR_MESSAGE_CHARS]),
        )
        reply = self._outgoing(asked, encode(response, _content_type(asked.record)))
        return replace(reply, if_refused=lambda refused: self._redirected(asked, refused))

    def _redirected(self, asked: _Asked, refused: Refused) -> Outgoing | None:
        """What tells the sender, where replies go by default, that the topic of its choice takes no reply."""
        if asked.reply_topic == self._reply_topic:
            return None
        asked = replace(asked, reply_topic=self._reply_topic)
        return self._error_reply(asked, "reply_topic_refused", str(refused))

    def _finished(self, asked: _Asked, value: bytes) -> Finished:
        def instead(refused: Refused) -> Outgoing | None:
            if not isinstance(refused, TooLarge):
                return self._redirected(asked, refused)
            message = f"the reply has {len(value)} bytes, more than the broker takes; ask for a smaller top_n"
            return self._error_reply(asked, "reply_too_large", message)

        reply = replace(self._outgoing(asked, value), if_refused=instead)
        return Finished(asked.record, (self._counted(reply),), asked.trace.span)

    def _counted(self, reply: Outgoing) -> Outgoing:
        """This reply, which is counted once if another takes its place, and maybe yet another takes that one's."""

        def instead(refused: Refused) -> Outgoing:
            replacement = reply.instead(refused)
            self._metrics.replies_replaced.inc()
            return replacement

        return replace(reply, if_refused=instead)

    def _outgoing(self, asked: _Asked, value: bytes) -> Outgoing:
        trace_headers, span = asked.trace.outgoing()
        headers = ((CONTENT_TYPE_HEADER, _content_type(asked.record).encode()), *trace_headers)
        return Outgoing(asked.reply_topic, asked.request_id.encode("utf-8", "replace"), value, headers, span=span)


def _content_type(record: Record) -> str:
    """What the reply is written in: what the request was, or JSON where that was neither."""
    content_type = content_type_of(record.headers)
    return content_type if content_type in (JSON, MSGPACK) else JSON
