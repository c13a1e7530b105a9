"""Reads rerank requests and writes what answers them: rankings, expiries, errors and dead letters.

The bridge between the wire contract and the job; decides nothing about when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    salvage_id,
)
from protocols.events import ErrorInfo, RerankRequest, RerankResponse
from protocols.fields import MAX_ERROR_MESSAGE_CHARS
from workers.dead_letters import DeadLetters
from workers.errors import Poison, Refused, TooLarge
from workers.job import Finished
from workers.metrics import Metrics
from workers.ports import Headers, Outgoing, Record
from workers.rerank.ranking import NotFinite, rank
from workers.rerank.state import ActiveRequest
from workers.tracing import trace_id_of

log = structlog.get_logger(__name__)

#: Decimals of a relevance score on the wire: finer than any engine's rounding, and a third of the bytes.
SCORE_DECIMALS = 7


def about(record: Record, request_id: str | None) -> dict[str, object]:
    """What every log line about a request carries."""
    return {"request_id": request_id, "trace_id": trace_id_of(record.headers), "offset": record.offset}


class Replies:
    """Writes replies for one model and one engine."""

    def __init__(
        self,
        *,
        reply_topic: str,
        dead_letters: DeadLetters,
        model_digest: str,
        engine_digest: str,
        reply_headers: Callable[[Headers], Headers],
        metrics: Metrics,
    ) -> None:
        """`reply_topic` is where replies go by default, and where the sender learns that they cannot go elsewhere."""
        self._reply_topic = reply_topic
        self._dead_letters = dead_letters
        self._model = model_digest
        self._engine = engine_digest
        self._reply_headers = reply_headers
        self._metrics = metrics

    def read(self, record: Record) -> RerankRequest:
        """Decode a request. Raises `Poison`."""
        try:
            return decode(RerankRequest, record.value, content_type_of(record.headers))
        except EventError as error:
            raise Poison(error.code, str(error)) from error

    def answered(self, active: ActiveRequest, now: float) -> Finished:
        """The ranking of a request whose pairs are all scored or known to be missing."""
        plan = active.plan
        logits, scored = active.logits, active.scored
        absent = np.flatnonzero(~scored)
        if plan.candidate_pairs is not None:
            logits, scored = logits[plan.candidate_pairs], scored[plan.candidate_pairs]
        try:
            order, relevance_scores = rank(logits, scored if len(absent) else None, plan.top_n)
        except NotFinite as error:
            log.error("score not finite", **about(active.record, plan.request_id), error=str(error))
            self._metrics.count_event("error")
            return self._error(active.record, plan.request_id, plan.reply_topic, "score_not_finite", str(error))
        missing = list(dict.fromkeys(plan.images[plan.pair_image(pair)] for pair in absent.tolist()))
        status: Literal["ok", "partial"] = "partial" if missing else "ok"
        content_type = _content_type(active.record)
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
            timings_ms=timings_ms(active, now),
            content_type=content_type,
        )
        self._metrics.count_event(status)
        self._metrics.count_reply(status, seconds=now - active.accepted_at, num_pairs=plan.num_pairs)
        return self._finished(active.record, plan.request_id, plan.reply_topic, value, content_type)

    def expired(self, active: ActiveRequest, now: float) -> Finished:
        """The reply to a request whose deadline has passed."""
        plan, content_type = active.plan, _content_type(active.record)
        response = RerankResponse(
            request_id=plan.request_id,
            status="expired",
            model=self._model,
            engine=self._engine,
            timings_ms={"total": _ms(now - active.accepted_at)},
        )
        log.debug("request expired", **about(active.record, plan.request_id))
        self._metrics.count_event("expired")
        self._metrics.count_reply("expired", seconds=now - active.accepted_at, num_pairs=0)
        return self._finished(
            active.record, plan.request_id, plan.reply_topic, encode(response, content_type), content_type
        )

    def refused(self, record: Record, poison: Poison, reply_topic: str) -> Finished:
        """The outcome of a message that can never succeed: a dead letter, and a reply if its id can be read."""
        error_class = type(poison.__cause__ or poison).__name__
        messages = [self._dead_letters.of(record, error_class=error_class, code=poison.code, message=str(poison))]
        request_id = salvage_id(record.value, content_type_of(record.headers), "request_id")
        log.warning("request refused", **about(record, request_id), code=poison.code, error=str(poison))
        if request_id is not None:
            messages.extend(self._error(record, request_id, reply_topic, poison.code, str(poison)).messages)
        return Finished(record, tuple(messages))

    def _error(self, record: Record, request_id: str, topic: str, code: str, message: str) -> Finished:
        self._metrics.count_reply("error", seconds=None, num_pairs=0)
        return Finished(record, (self._counted(self._error_reply(record, request_id, topic, code, message)),))

    def _error_reply(self, record: Record, request_id: str, topic: str, code: str, message: str) -> Outgoing:
        content_type = _content_type(record)
        response = RerankResponse(
            request_id=request_id,
            status="error",
            model=self._model,
            engine=self._engine,
            error=ErrorInfo(code=code, message=message[:MAX_ERROR_MESSAGE_CHARS]),
        )

        def redirected(refused: Refused) -> Outgoing | None:
            return self._redirected(record, request_id, topic, refused)

        reply = self._outgoing(record, request_id, topic, encode(response, content_type), content_type)
        return replace(reply, if_refused=redirected)

    def _redirected(self, record: Record, request_id: str, topic: str, refused: Refused) -> Outgoing | None:
        """What tells the sender, where replies go by default, that the topic of its choice takes no reply."""
        if topic == self._reply_topic:
            return None
        return self._error_reply(record, request_id, self._reply_topic, "reply_topic_refused", str(refused))

    def _finished(self, record: Record, request_id: str, topic: str, value: bytes, content_type: str) -> Finished:
        def instead(refused: Refused) -> Outgoing | None:
            if not isinstance(refused, TooLarge):
                return self._redirected(record, request_id, topic, refused)
            message = f"the reply has {len(value)} bytes, more than the broker takes; ask for a smaller top_n"
            return self._error_reply(record, request_id, topic, "reply_too_large", message)

        reply = self._outgoing(record, request_id, topic, value, content_type)
        return Finished(record, (self._counted(replace(reply, if_refused=instead)),))

    def _counted(self, reply: Outgoing) -> Outgoing:
        """This reply, which is counted once if another takes its place, and maybe yet another takes that one's."""

        def instead(refused: Refused) -> Outgoing:
            replacement = reply.instead(refused)
            self._metrics.replies_replaced.inc()
            return replacement

        return replace(reply, if_refused=instead)

    def _outgoing(self, record: Record, request_id: str, topic: str, value: bytes, content_type: str) -> Outgoing:
        headers = ((CONTENT_TYPE_HEADER, content_type.encode()), *self._reply_headers(record.headers))
        return Outgoing(topic, request_id.encode("utf-8", "replace"), value, headers)


def timings_ms(active: ActiveRequest, now: float) -> dict[str, float]:
    """Where the time of a request went; the stages add up to the total."""
    if not active.plan.pieces:
        return {"total": _ms(now - active.accepted_at)}
    return {
        "queue": _ms(active.started_at - active.accepted_at),
        "fetch": _ms(active.fetched_at - active.started_at),
        "score": _ms(now - active.fetched_at),
        "total": _ms(now - active.accepted_at),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _content_type(record: Record) -> str:
    """What the reply is written in: what the request was, or JSON where that was neither."""
    content_type = content_type_of(record.headers)
    return content_type if content_type in (JSON, MSGPACK) else JSON
