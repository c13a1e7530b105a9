"""Writes the outcomes of rerank requests: rankings, expired and error replies, dead letters.

Maps a finished request to messages of the wire contract; decides nothing about timing.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import partial

import numpy as np
import structlog

from edje.calibration import Calibration
from protocols.encoding import CONTENT_TYPE_HEADER, encode, encode_response
from protocols.events import ErrorInfo, RerankResponse, Status
from protocols.fields import MAX_ERROR_MESSAGE_CHARS
from workers.dead_letters import DeadLetters
from workers.errors import Poison, Refused, TooLarge
from workers.metrics import Metrics
from workers.ports import Finished, Outgoing
from workers.rerank.ranking import NotFinite, Ranking, rank
from workers.rerank.request import Request
from workers.rerank.spans import RerankSpans
from workers.rerank.timeline import Timeline, timeline_of

log = structlog.get_logger(__name__)

#: Decimals of scores in a reply: finer than any engine's rounding, in a third of the bytes.
SCORE_DECIMALS = 7


class _Kind(Enum):
    """The kinds of replies to one request; a later kind replaces an earlier one that the broker refused."""

    RESULT = auto()
    ERROR = auto()
    SECOND_ERROR = auto()  # to the request's own address, in place of a result
    REDIRECTED = auto()  # to the default topic


class Replies:
    """Writes replies for one model and one engine."""

    def __init__(
        self,
        *,
        reply_topic: str,
        dead_letters: DeadLetters,
        model_digest: str,
        engine_digest: str,
        calibration: Calibration | None,
        metrics: Metrics,
        spans: RerankSpans,
    ) -> None:
        """`reply_topic` is the default topic; it also gets the error reply if a request's reply topic is refused."""
        self._reply_topic = reply_topic
        self._dead_letters = dead_letters
        self._model = model_digest
        self._engine = engine_digest
        self._calibration = calibration
        self._metrics = metrics
        self._spans = spans

    def rank(self, request: Request) -> Ranking:
        """Rank the candidates of a request whose pairs are all scored or missing. Raises `NotFinite`."""
        logits, scored, first_stage = request.logits, request.scored, request.first_stage
        if request.pair_of_candidate is not None:
            logits, scored = logits[request.pair_of_candidate], scored[request.pair_of_candidate]
            first_stage = None if first_stage is None else first_stage[request.pair_of_candidate]
        return rank(
            logits,
            None if scored.all() else scored,
            request.top_n,
            first_stage=first_stage,
            calibration=None if self._calibration is None else self._calibration.of(request.direction),
        )

    def ranked(self, request: Request, now: float) -> Finished:
        """Return the reply with the request's ranking; an error reply if a score is not finite."""
        try:
            ranking = request.ranking or self.rank(request)
        except NotFinite as error:
            log.error("score not finite", **request.for_log(), error=str(error))
            return self._without_ranking(request, "score_not_finite", str(error), now)
        timeline = timeline_of(request, now)
        missing = self._missing(request)
        status: Status = "partial" if missing else "ok"
        value = encode_response(
            request.request_id or "",
            status,
            ranking.order.tolist(),
            request.candidate_ids,
            np.round(ranking.relevance, SCORE_DECIMALS).tolist(),
            np.round(ranking.logits.astype(np.float64), SCORE_DECIMALS).tolist(),
            missing=missing,
            model=self._model,
            engine=self._engine,
            timings_ms=timeline.timings_ms(),
            warnings=request.warnings,
            explanations=request.explanations,
            content_type=request.content_type,
        )
        for warning in request.warnings:
            self._metrics.count_warning(warning.code)
        return self._finished(request, timeline, status, value, num_pairs=request.num_pairs)

    def _missing(self, request: Request) -> list[str]:
        """Return the ids of the images without usable tokens; add a warning if no image has any."""
        absent = np.flatnonzero(~request.scored).tolist()
        missing = list(dict.fromkeys(map(request.image_of_pair, absent)))
        if missing and len(missing) == len(request.images):
            request.warn(
                "all_images_missing",
                f"the store has no usable tokens under model {self._model} for any of the {len(missing)} images: index "
                "them with this model",
            )
        return missing

    def expired(self, request: Request, now: float) -> Finished:
        """Return the reply to a request whose deadline has passed."""
        timeline = timeline_of(request, now)
        response = RerankResponse(
            request_id=request.request_id or "",
            status="expired",
            model=self._model,
            engine=self._engine,
            timings_ms=timeline.timings_ms(),
        )
        log.debug("request expired", **request.for_log())
        return self._finished(request, timeline, "expired", encode(response, request.content_type), num_pairs=0)

    def _finished(
        self, request: Request, timeline: Timeline, status: Status, value: bytes, *, num_pairs: int
    ) -> Finished:
        exemplar = request.trace.exemplar()
        self._metrics.count_event(status)
        seconds = timeline.total.ended_at - request.accepted_at
        self._metrics.count_reply(status, seconds=seconds, num_pairs=num_pairs, exemplar=exemplar)
        self._metrics.observe_stages(timeline.stages, exemplar)
        self._spans.processed(request, timeline, status, "expired" if status == "expired" else None)
        return Finished(request.record, (self._reply(request, timeline, value, _Kind.RESULT),), request.trace.span)

    def refused(self, request: Request, error: Poison, now: float) -> Finished:
        """Return the outcome of a request that can never succeed: a dead letter and, given its id, an error reply."""
        error_class = type(error.__cause__ or error).__name__
        letter = self._dead_letters.of(request.record, error_class=error_class, code=error.code, message=str(error))
        log.warning("request refused", **request.for_log(), code=error.code, error=str(error))
        timeline = timeline_of(request, now)
        messages = [letter]
        if request.request_id is not None:
            messages.append(self._error_reply(request, timeline, error.code, str(error), _Kind.ERROR))
            self._metrics.count_reply("error", seconds=None, num_pairs=0)
        status = "dead_letter" if request.request_id is None else "error"
        self._spans.processed(request, timeline, status, error.code)
        return Finished(request.record, tuple(messages), request.trace.span)

    def _without_ranking(self, request: Request, code: str, message: str, now: float) -> Finished:
        """Return the error reply to a valid request."""
        timeline = timeline_of(request, now)
        self._metrics.count_event("error")
        self._metrics.count_reply("error", seconds=None, num_pairs=0)
        self._spans.processed(request, timeline, "error", code)
        reply = self._error_reply(request, timeline, code, message, _Kind.ERROR)
        return Finished(request.record, (reply,), request.trace.span)

    def _error_reply(self, request: Request, timeline: Timeline, code: str, message: str, kind: _Kind) -> Outgoing:
        response = RerankResponse(
            request_id=request.request_id or "",
            status="error",
            model=self._model,
            engine=self._engine,
            timings_ms=timeline.timings_ms(),
            error=ErrorInfo(code=code, message=message[:MAX_ERROR_MESSAGE_CHARS]),
        )
        return self._reply(request, timeline, encode(response, request.content_type), kind)

    def _reply(self, request: Request, timeline: Timeline, value: bytes, kind: _Kind) -> Outgoing:
        to_default = kind is _Kind.REDIRECTED
        trace_headers, span = request.trace.outgoing()
        return Outgoing(
            topic=self._reply_topic if to_default else request.reply_topic,
            key=(request.request_id or "").encode("utf-8", "replace"),
            value=value,
            headers=((CONTENT_TYPE_HEADER, request.content_type.encode()), *trace_headers),
            partition=None if to_default else request.reply_partition,
            if_refused=None if to_default else partial(self._instead, request, timeline, len(value), kind),
            span=span,
        )

    def _instead(
        self, request: Request, timeline: Timeline, num_bytes: int, kind: _Kind, refused: Refused
    ) -> Outgoing | None:
        """Return the error reply that replaces a refused reply, None without a replacement.

        A result that is too large is replaced at the request's own address. Any other refusal is reported to the
        default topic.
        """
        if kind is _Kind.RESULT and isinstance(refused, TooLarge):
            message = f"the reply has {num_bytes} bytes, more than the broker accepts; ask for a smaller top_n"
            replacement = self._error_reply(request, timeline, "reply_too_large", message, _Kind.SECOND_ERROR)
        elif request.reply_topic != self._reply_topic or request.reply_partition is not None:
            replacement = self._error_reply(request, timeline, "reply_topic_refused", str(refused), _Kind.REDIRECTED)
        else:
            return None
        if kind is not _Kind.SECOND_ERROR:  # only the first of several replacements is counted
            self._metrics.replies_replaced.inc()
        return replacement
