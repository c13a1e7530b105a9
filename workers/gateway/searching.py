"""Answers searches: embeds the query, finds candidates in the index and ranks them.

The index and the first stage are blocking code and run on threads; every wait has a timeout. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol, TypeVar

import structlog

from protocols.events import Query
from workers.errors import Misconfigured, Transient
from workers.gateway.bodies import SearchAnswerBody, SearchBody, SearchResult
from workers.gateway.calls import Document, RankedDocument, RerankAnswer, RerankCall
from workers.gateway.dialects import options_of
from workers.gateway.errors import ApiError, Unanswered
from workers.gateway.reranking import Reranking
from workers.index.port import ImageIndex, IndexedImage, Neighbour, Vector
from workers.metrics import Metrics
from workers.telemetry import names
from workers.telemetry.tracer import MessageTrace

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: Most query vectors to remember: popular queries are repeated, and so are those typed on the page.
MAX_REMEMBERED_QUERIES = 10_000


class TextEmbedder(Protocol):
    """The part of a first stage that a search needs."""

    def of_text(self, text: str) -> Vector: ...


class IndexSearch:
    """Calls the index from asyncio: each call runs on a thread and has a timeout."""

    def __init__(self, index: ImageIndex, embedder: TextEmbedder, *, num_threads: int, timeout_s: float) -> None:
        self._index = index
        self._embedder = embedder
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="index")
        self._embedding = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._vectors: OrderedDict[str, Vector] = OrderedDict()

    async def vector_of(self, text: str) -> Vector:
        """Return the vector of a query. Raises `Unanswered`."""
        if text in self._vectors:
            self._vectors.move_to_end(text)
            return self._vectors[text]
        vector = await self._on_thread(self._embedding, lambda: self._embedder.of_text(text))
        self._vectors[text] = vector
        if len(self._vectors) > MAX_REMEMBERED_QUERIES:
            self._vectors.popitem(last=False)
        return vector

    async def nearest(self, vector: Vector, limit: int, matching: Mapping[str, Sequence[str]]) -> list[Neighbour]:
        """See `ImageIndex.nearest`. Raises `Unanswered`."""
        return await self._on_thread(self._threads, lambda: self._index.nearest(vector, limit, matching))

    async def find(self, image_id: str) -> IndexedImage | None:
        """Return one image. Raises `Unanswered`."""
        return (await self._on_thread(self._threads, lambda: self._index.find([image_id])))[0]

    async def ids_of_uris(self, uris: Sequence[str]) -> Mapping[str, str]:
        """Return the image ids of addresses, as in the metadata `uri`. Raises `Unanswered`."""
        found = await self._on_thread(self._threads, lambda: self._index.ids_of("uri", uris))
        return {uri: image_id for uri, image_id in zip(uris, found, strict=True) if image_id is not None}

    async def count(self) -> int:
        """See `ImageIndex.count`. Raises `Unanswered`."""
        return await self._on_thread(self._threads, self._index.count)

    def close(self) -> None:
        """End the threads and the connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._embedding.shutdown(wait=False, cancel_futures=True)
        self._index.close()

    async def _on_thread(self, threads: Executor, call: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.get_running_loop().run_in_executor(threads, call)
        except TimeoutError:
            raise Unanswered(504, "index_timeout", "the index of images did not answer in time") from None
        except (Transient, Misconfigured) as error:
            # The details of a database error are for its operator, in the log.
            log.warning("the index did not answer", error=str(error), kind=type(error).__name__)
            raise Unanswered(503, "index_away", "the index of images is not available at the moment") from error


class Searching:
    """Answers the searches of one replica."""

    def __init__(
        self, index: IndexSearch, reranking: Reranking, *, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._index = index
        self._reranking = reranking
        self._metrics = metrics
        self._clock = clock

    async def search(self, body: SearchBody, *, request_id: str | None, trace: MessageTrace) -> SearchAnswerBody:
        """Return both orders of a search. Raises `ApiError`, also if the index does not answer."""
        timings_ms: dict[str, float] = {}
        matching = {key: [value] if isinstance(value, str) else value for key, value in body.filter.items()}
        num_candidates = max(body.candidates, body.top_n)
        try:
            started_at = self._clock()
            vector = await self._index.vector_of(body.query)
            timings_ms[names.EMBED] = self._lap(names.EMBED, started_at, trace)
            started_at = self._clock()
            found = await self._index.nearest(vector, num_candidates, matching)
            timings_ms[names.SEARCH_INDEX] = self._lap(names.SEARCH_INDEX, started_at, trace)
        except Unanswered as why:
            raise why.error() from why
        call = RerankCall(
            query=Query(text=body.query),
            documents=[Document("image_id", each.image_id, each.score, each.image_id) for each in found],
            **options_of(body),
        )
        answer = await self._reranking.rerank(call, request_id=request_id, trace=trace)
        return search_answer(body, found, answer, timings_ms)

    def _lap(self, stage: str, started_at: float, trace: MessageTrace) -> float:
        seconds = self._clock() - started_at
        self._metrics.gateway_seconds[stage].observe(seconds, trace.exemplar())
        return round(seconds * 1000, 3)


def search_answer(
    body: SearchBody, found: Sequence[Neighbour], answer: RerankAnswer, timings_ms: Mapping[str, float]
) -> SearchAnswerBody:
    """Return the answer of a search: the ranking, and the first images in the index's order with their ranks."""
    is_degraded = answer.degraded is not None
    ranks = {result.index: rank for rank, result in enumerate(answer.results, start=1)}
    ranked = {result.index: result for result in answer.results}

    def result_of(index: int, result: RankedDocument, rank: int) -> SearchResult:
        neighbour = found[index]
        return SearchResult(
            image_id=neighbour.image_id,
            metadata=dict(neighbour.metadata),
            rank=rank,
            rank_before=index + 1,
            relevance_score=None if is_degraded else result.relevance_score,
            first_stage_score=round(neighbour.score, 6),
            is_missing=result.is_missing,
            explanation=None if result.explanation is None else list(result.explanation),
        )

    results = [
        result_of(result.index, result, rank) for rank, result in enumerate(answer.results[: body.top_n], start=1)
    ]
    return SearchAnswerBody(
        id=answer.request_id,
        query=body.query,
        num_candidates=len(found),
        results=results,
        first_stage=[result_of(index, ranked[index], ranks[index]) for index in range(min(body.top_n, len(found)))],
        degraded=answer.degraded,
        degraded_message=answer.degraded_message,
        warnings=list(answer.warnings),
        model=answer.model,
        engine=answer.engine,
        timings_ms={**timings_ms, **answer.timings_ms},
        trace_id=answer.trace_id,
    )


def no_index(*_: object) -> ApiError:
    """Return the error of a gateway without an index."""
    return ApiError(404, "no_search", "this gateway has no index: it runs with GATEWAY_SEARCH=false")
