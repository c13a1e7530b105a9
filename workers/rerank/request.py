"""A rerank request and its pieces, from the record to the reply.

Plain data with small queries. The modules of this package fill it in; the job advances it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edje.calibration import Direction
from protocols.events import WarningInfo, WordSimilarities
from trt.text_lengths import padded_length
from workers.ports import Record, SpanIds
from workers.rerank.ranking import Ranking
from workers.telemetry.tracer import MessageTrace


@dataclass(slots=True, eq=False)
class Request:
    """One rerank request. A *pair* is one distinct text with one distinct image; equal candidates share a pair."""

    record: Record
    trace: MessageTrace
    accepted_at: float

    # The address of the reply.
    content_type: str
    reply_topic: str
    reply_partition: int | None = None
    request_id: str | None = None  # None: not read yet, or unreadable

    # The content of the request; set by `admission`.
    direction: Direction = "text-to-image"
    texts: Sequence[str] = ()  # the text query, or each distinct text candidate
    images: Sequence[str] = ()  # each distinct image candidate, or the query's image
    candidate_ids: Sequence[str | None] = ()
    pair_of_candidate: NDArray[np.intp] | None = None  # None: candidate i is pair i
    num_pairs: int = 0
    first_stage: NDArray[np.float32] | None = None  # standardised, by pair; None: the model uses no scores
    top_n: int | None = None
    priority: int = 0
    deadline: float | None = None  # by the loop's clock
    explain: bool = False
    warnings: list[WarningInfo] = field(default_factory=list)

    # Progress; set by `job`.
    text_ids: Sequence[Sequence[int]] = ()  # parallel to `texts`
    logits: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # by pair
    scored: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))  # by pair
    ranking: Ranking | None = None
    explanations: Mapping[int, Sequence[WordSimilarities]] | None = None  # by position in the request
    num_inflight_pairs: int = 0  # this request's part of the pairs in work
    num_open_pieces: int = 0
    num_unready_pieces: int = 0  # pieces that wait for tokens
    num_open_tokens: int = 0  # tokens of the open pieces
    is_closed: bool = False  # answered or dropped: later results are ignored
    started_at: float | None = None  # when the first piece left the queue
    fetched_at: float | None = None  # when the last piece had its tokens
    scoring_at: float | None = None  # when the last micro-batch started on the engine
    scored_at: float = 0.0  # when the last micro-batch ended
    batches: list[SpanIds] = field(default_factory=list)  # spans of the micro-batches, if the request is sampled

    @property
    def num_candidates(self) -> int:
        return len(self.candidate_ids)

    def is_late(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and now >= self.deadline

    def warn(self, code: str, message: str) -> None:
        """Add a warning to the reply."""
        self.warnings.append(WarningInfo(code=code, message=message))

    def image_of_pair(self, pair: int) -> str:
        return self.images[pair if len(self.images) > 1 else 0]

    def text_of_pair(self, pair: int) -> int:
        """Return the index of the pair's text in `texts`."""
        return pair if len(self.texts) > 1 else 0

    def for_log(self) -> dict[str, object]:
        """Return the fields that every log line about this request has."""
        return {"request_id": self.request_id, "trace_id": self.trace.trace_id, "offset": self.record.offset}


@dataclass(slots=True, eq=False)
class Piece:
    """Some pairs of one request that go through fetch, slab, batch and engine together."""

    request: Request
    pairs: NDArray[np.int32]  # indexes of pairs; after loading, only those whose image is in the slab
    images: Sequence[str]  # parallel to `pairs`, or one image for all
    bucket: int  # padded length of the texts
    tokens_per_pair: int  # text and visual tokens
    num_tokens: int  # sum over the pairs
    explains: bool = False  # computes similarities instead of logits

    rank: int = 0  # the order in which pieces left the queue

    # Set by `loading`.
    slots: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))  # by image; -1: missing
    num_fetches: int = 0  # fetches in progress
    read_at: float = 0.0  # when the store answered the last fetch; 0 without a fetch

    @property
    def num_pairs(self) -> int:
        return len(self.pairs)

    def leave_out_missing(self) -> None:
        """Remove the pairs whose image is not in the slab."""
        if len(self.images) == len(self.pairs):
            self.pairs = self.pairs[self.slots >= 0]
        elif self.slots[0] < 0:
            self.pairs = self.pairs[:0]

    def pair_slots(self) -> NDArray[np.int32]:
        """Return the slot of each pair's image."""
        present = self.slots[self.slots >= 0]
        return present if len(present) == len(self.pairs) else np.repeat(present, len(self.pairs))


def cut(request: Request, *, piece_pairs: int, num_visual_tokens: int) -> list[Piece]:
    """Cut a request's pairs into pieces of one length bucket each, in the candidates' order; `text_ids` must be set."""
    if len(request.text_ids) == 1:
        by_bucket = {padded_length(len(request.text_ids[0])): np.arange(request.num_pairs, dtype=np.int32)}
    else:
        buckets = np.fromiter((padded_length(len(ids)) for ids in request.text_ids), np.int32, len(request.text_ids))
        by_bucket = {int(bucket): np.flatnonzero(buckets == bucket).astype(np.int32) for bucket in np.unique(buckets)}
    return [
        piece_of(request, pairs[start : start + piece_pairs], bucket, num_visual_tokens)
        for bucket, pairs in by_bucket.items()
        for start in range(0, len(pairs), piece_pairs)
    ]


def piece_of(
    request: Request, pairs: NDArray[np.int32], bucket: int, num_visual_tokens: int, *, explains: bool = False
) -> Piece:
    """Return the piece of these pairs."""
    images = request.images if len(request.images) <= 1 else [request.images[pair] for pair in pairs.tolist()]
    tokens_per_pair = bucket + num_visual_tokens
    return Piece(request, pairs, images, bucket, tokens_per_pair, len(pairs) * tokens_per_pair, explains)


class Deadlines:
    """The open requests that have a deadline, the nearest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._sweep_at = 1024

    def push(self, deadline: float, request: Request) -> None:
        heapq.heappush(self._heap, (deadline, id(request), request))
        if len(self._heap) >= self._sweep_at:  # so that answered requests with late deadlines do not accumulate
            self._heap = [entry for entry in self._heap if not entry[2].is_closed]
            heapq.heapify(self._heap)
            self._sweep_at = max(1024, 2 * len(self._heap))

    def passed(self, now: float) -> list[Request]:
        """Remove and return the open requests whose deadline has passed."""
        late = []
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if not request.is_closed:
                late.append(request)
        return late

    def next(self) -> float | None:
        """Return the nearest deadline of an open request."""
        while self._heap and self._heap[0][2].is_closed:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
