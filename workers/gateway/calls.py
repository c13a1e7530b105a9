"""A rerank call and its answer as plain data, the same for every dialect.

Decides how a reply becomes an answer with one score per document, and makes the answer in the given order if there
is no reply. Knows nothing of HTTP, JSON or Kafka.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from protocols.events import Candidate, Query, RerankResponse, WarningInfo, WordSimilarities
from workers.gateway.errors import ApiError, Unanswered

DocumentKind = Literal["image_id", "uri", "text"]
OnFailure = Literal["first_stage", "error"]

#: The logit of an image without tokens: lower than every logit of a joint encoder.
MISSING_LOGIT = -30.0


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a call: an image by id or address, or a text. `given` is the document's JSON value."""

    kind: DocumentKind
    value: str
    score: float | None = None
    given: Any = None


@dataclass(frozen=True, slots=True)
class RerankCall:
    """One request for a ranking."""

    query: Query
    documents: Sequence[Document]
    top_n: int | None = None  # None: all
    on_failure: OnFailure | None = None  # None: the gateway's setting
    timeout_s: float | None = None  # None: the gateway's setting
    priority: int = 0
    explain: bool = False
    return_documents: bool = False
    raw_scores: bool = False
    model_name: str | None = None  # repeated in the answer

    def num_results(self) -> int:
        return len(self.documents) if self.top_n is None else min(self.top_n, len(self.documents))


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document with its score; `index` is its position in the call."""

    index: int
    relevance_score: float
    logit: float
    is_missing: bool = False
    explanation: Sequence[WordSimilarities] | None = None


@dataclass(frozen=True, slots=True)
class RerankAnswer:
    """The ranking of a call's documents, best first; at least as many as the call's `num_results`.

    `degraded` is the code of the reason why the documents are in the given order, None for a ranking.
    """

    request_id: str
    results: Sequence[RankedDocument]
    missing: Sequence[Any] = ()  # the given values of the documents without tokens
    degraded: str | None = None
    degraded_message: str | None = None
    warnings: Sequence[WarningInfo] = ()
    model: str | None = None
    engine: str | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    trace_id: str | None = None


def candidates_of(documents: Sequence[Document], ids_by_uri: Mapping[str, str]) -> tuple[list[Candidate], list[int]]:
    """Return the candidates to rank and, for each, the index of its document.

    An address without an indexed image gives no candidate. Raises `ApiError` if documents are of different kinds.
    """
    candidates: list[Candidate] = []
    indexes: list[int] = []
    are_texts = {document.kind == "text" for document in documents}
    if len(are_texts) > 1:
        raise ApiError(422, "mixed_documents", "documents must be all images or all texts")
    for index, document in enumerate(documents):
        if document.kind == "text":
            candidate = Candidate(text=document.value)
        else:
            image_id = document.value if document.kind == "image_id" else ids_by_uri.get(document.value)
            if image_id is None:
                continue
            candidate = Candidate(image_id=image_id)
        if document.score is not None:
            candidate["score"] = document.score
        candidates.append(candidate)
        indexes.append(index)
    return candidates, indexes


def ranked_answer(
    call: RerankCall,
    candidates: Sequence[Candidate],
    indexes: Sequence[int],
    response: RerankResponse,
    *,
    trace_id: str | None,
) -> RerankAnswer:
    """Return the answer for a reply with a ranking; documents without tokens come last.

    `candidates` are the request's, `indexes` the indexes of their documents. Raises `ApiError` if the query image lacks
    tokens, `ValueError` if the reply does not fit the request.
    """
    without_tokens = set(response.missing)
    if call.query.image_id is not None and call.query.image_id in without_tokens:
        raise ApiError(404, "image_not_found", f"there are no tokens of the query's image {call.query.image_id!r}")
    results: list[RankedDocument] = []
    waiting = dict.fromkeys(range(len(call.documents)))  # documents without a result, in order
    for result in response.results:
        if result.index >= len(indexes) or indexes[result.index] not in waiting:
            raise ValueError(f"the reply ranks candidate {result.index} of {len(indexes)} twice or beyond the last")
        index = indexes[result.index]
        del waiting[index]
        results.append(RankedDocument(index, result.relevance_score, result.logit, explanation=result.explanation))
    for candidate, index in zip(candidates, indexes, strict=True):
        if candidate.get("image_id") not in without_tokens:
            waiting.pop(index, None)
    lowest = min((result.logit for result in results), default=0.0)
    missing = list(waiting)
    results += [RankedDocument(index, 0.0, min(MISSING_LOGIT, lowest - 1.0), is_missing=True) for index in missing]
    if len(results) < call.num_results():
        raise ValueError(f"the reply ranks {len(response.results)} of {len(candidates)} candidates")
    return RerankAnswer(
        request_id=response.request_id,
        results=results,
        missing=[call.documents[index].given for index in missing],
        warnings=response.warnings,
        model=response.model,
        engine=response.engine,
        timings_ms=response.timings_ms,
        trace_id=trace_id,
    )


def given_order(call: RerankCall, request_id: str, why: Unanswered, *, trace_id: str | None) -> RerankAnswer:
    """Return the degraded answer: the documents in the given order, with scores that fall from 1 in equal steps."""
    num_documents = len(call.documents)
    scores = [(num_documents - index) / num_documents for index in range(num_documents)]
    return RerankAnswer(
        request_id=request_id,
        # The logit is the score scaled to [-1, 1].
        results=[RankedDocument(index, score, 2 * score - 1) for index, score in enumerate(scores)],
        degraded=why.code,
        degraded_message=why.message,
        trace_id=trace_id,
    )


def missing_answer(call: RerankCall, request_id: str, *, trace_id: str | None) -> RerankAnswer:
    """Return the answer to a call without candidates: every document is missing, or there are no documents."""
    return RerankAnswer(
        request_id=request_id,
        results=[RankedDocument(index, 0.0, MISSING_LOGIT, is_missing=True) for index in range(len(call.documents))],
        missing=[document.given for document in call.documents],
        trace_id=trace_id,
    )
