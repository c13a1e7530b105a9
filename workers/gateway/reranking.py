"""Answers rerank calls: checks a call, sends its request, and returns the ranking or the given order.

Decides which failures lead to a degraded answer and which to an error. Knows nothing of HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from protocols.events import RerankRequest, RerankResponse
from workers.gateway.calls import (
    OnFailure,
    RerankAnswer,
    RerankCall,
    candidates_of,
    given_order,
    missing_answer,
    ranked_answer,
)
from workers.gateway.errors import ApiError, Unanswered
from workers.gateway.limits import PairBudget
from workers.gateway.requests import RerankRequests
from workers.metrics import Metrics
from workers.telemetry import names
from workers.telemetry.tracer import MessageTrace

log = structlog.get_logger(__name__)

#: Error codes of replies that the caller can correct, with the answer's status; other codes are the service's faults.
CALLERS_FAULTS = {
    "invalid_event": 422,
    "undecodable": 422,
    "too_many_candidates": 422,
    "text_too_long": 422,
    "score_too_large": 422,
    "model_not_served": 404,
}

#: Returns the ids of the images at these addresses. Raises `Unanswered` if the index cannot be searched.
ResolveUris = Callable[[Sequence[str]], Awaitable[Mapping[str, str]]]


@dataclass(frozen=True, slots=True)
class RerankRules:
    """The settings of the gateway that apply to rerank calls."""

    reply_topic: str
    reply_partition: int
    on_failure: OnFailure
    timeout_s: float
    max_timeout_s: float
    deadline_margin_s: float
    max_documents: int

    def timeout_of(self, call: RerankCall) -> float:
        return min(call.timeout_s or self.timeout_s, self.max_timeout_s)

    def deadline(self, timeout_s: float, now: datetime) -> datetime:
        """Return the deadline of a request: earlier than the caller's timeout, so that the reply arrives in time."""
        return now + timedelta(seconds=timeout_s - min(self.deadline_margin_s, timeout_s / 2))


class Reranking:
    """Answers the rerank calls of one replica."""

    def __init__(
        self,
        requests: RerankRequests,
        rules: RerankRules,
        budget: PairBudget,
        *,
        resolve_uris: ResolveUris,
        metrics: Metrics,
        clock: Callable[[], float],
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._requests = requests
        self._rules = rules
        self._budget = budget
        self._resolve_uris = resolve_uris
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock

    async def rerank(self, call: RerankCall, *, request_id: str | None, trace: MessageTrace) -> RerankAnswer:
        """Return the ranking of a call. Raises `ApiError`.

        If no ranking arrives, the call or the settings decide between the given order and an error.
        """
        request_id = request_id or uuid.uuid4().hex
        give_up_at = self._clock() + self._rules.timeout_of(call)
        self._budget.take(len(call.documents))
        self._metrics.gateway_pairs.set(self._budget.num_pairs)
        try:
            return await self._ranked(call, request_id, give_up_at, trace)
        except Unanswered as why:
            if (call.on_failure or self._rules.on_failure) == "error":
                raise why.error() from None
            self._metrics.gateway_degraded[why.code].inc()
            log.info("degraded answer", request_id=request_id, trace_id=trace.trace_id, code=why.code, error=str(why))
            return given_order(call, request_id, why, trace_id=trace.trace_id)
        finally:
            self._budget.give_back(len(call.documents), self._clock())
            self._metrics.gateway_pairs.set(self._budget.num_pairs)

    async def _ranked(self, call: RerankCall, request_id: str, give_up_at: float, trace: MessageTrace) -> RerankAnswer:
        uris = list(dict.fromkeys(document.value for document in call.documents if document.kind == "uri"))
        ids_by_uri: Mapping[str, str] = await self._resolve_uris(uris) if uris else {}
        candidates, indexes = candidates_of(call.documents, ids_by_uri)
        if not candidates:
            return missing_answer(call, request_id, trace_id=trace.trace_id)
        timeout_s = max(0.001, give_up_at - self._clock())
        trace_headers, span = trace.outgoing()
        request = RerankRequest(
            request_id=request_id,
            query=call.query,
            candidates=candidates,
            top_n=call.top_n,
            deadline=self._rules.deadline(timeout_s, self._wall_clock()),
            priority=call.priority,
            reply_topic=self._rules.reply_topic,
            reply_partition=self._rules.reply_partition,
            explain=call.explain,
        )
        started_at = self._clock()
        reply = await self._requests.ask(request, timeout_s=timeout_s, trace_headers=trace_headers, span=span)
        self._metrics.gateway_seconds[names.RERANK].observe(self._clock() - started_at, trace.exemplar())
        _check(reply.response)
        try:
            return ranked_answer(call, candidates, indexes, reply.response, trace_id=trace.trace_id)
        except ValueError as error:
            log.error("a reply does not fit its request", request_id=request_id, error=str(error))
            raise Unanswered(503, "invalid_reply", "the reply of the rerank worker does not fit the request") from error


def _check(response: RerankResponse) -> None:
    """Raise `ApiError` or `Unanswered` for a reply without a ranking."""
    if response.status == "expired":
        raise Unanswered(504, "expired", "the deadline passed before the request was scored")
    if response.status == "error":
        assert response.error is not None  # the event model requires it
        status = CALLERS_FAULTS.get(response.error.code)
        if status is not None:
            raise ApiError(status, response.error.code, response.error.message)
        raise Unanswered(503, response.error.code, response.error.message)


async def without_index(uris: Sequence[str]) -> Mapping[str, str]:
    """Raise `ApiError`: the `ResolveUris` of a gateway without an index."""
    raise ApiError(422, "no_index", "this gateway has no index to look up the address of an image: send image ids")
