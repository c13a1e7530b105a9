"""What the rerank job remembers of a request and of its pieces while they are in work.

Plain data with the few questions that are asked of it; the job moves it along.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from workers.ports import Interval, Record, SpanIds
from workers.rerank.admission import Admitted, PieceLayout
from workers.rerank.fairness import Rank
from workers.telemetry.tracer import MessageTrace


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request between its admission and its reply."""

    record: Record
    trace: MessageTrace
    plan: Admitted
    accepted_at: float
    logits: NDArray[np.float32]  # by pair
    scored: NDArray[np.bool_]  # by pair
    num_open_pieces: int
    num_unready_pieces: int  # that wait for tokens
    num_open_tokens: int  # of the pieces that are not through
    is_closed: bool = False  # answered or dropped: whatever of it is still on its way is ignored
    started_at: float | None = None  # when its first piece left the queue
    fetched_at: float | None = None  # when its last piece had its tokens
    scoring_at: float | None = None  # when its last micro-batch started on the engine
    scored_at: float = 0.0  # when the engine was through with it
    batches: list[SpanIds] = field(default_factory=list)  # the spans of its micro-batches, where it is recorded

    @classmethod
    def of(cls, record: Record, trace: MessageTrace, plan: Admitted, now: float, *, num_tokens: int) -> ActiveRequest:
        return cls(
            record=replace(record, value=b""),  # nobody reads it again, and it may be a megabyte
            trace=trace,
            plan=plan,
            accepted_at=now,
            logits=np.zeros(plan.num_pairs, np.float32),
            scored=np.zeros(plan.num_pairs, np.bool_),
            num_open_pieces=len(plan.pieces),
            num_unready_pieces=len(plan.pieces),
            num_open_tokens=num_tokens,
        )

    def is_late(self, now: float) -> bool:
        return self.plan.deadline is not None and now >= self.plan.deadline


class Deadlines:
    """The open requests that have a deadline, the nearest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ActiveRequest]] = []
        self._sweep_at = 1024

    def push(self, deadline: float, request: ActiveRequest) -> None:
        heapq.heappush(self._heap, (deadline, id(request), request))
        if len(self._heap) >= self._sweep_at:  # answered requests with far deadlines would pile up otherwise
            self._heap = [entry for entry in self._heap if not entry[2].is_closed]
            heapq.heapify(self._heap)
            self._sweep_at = max(1024, 2 * len(self._heap))

    def passed(self, now: float) -> list[ActiveRequest]:
        """Remove and return the open requests whose deadline is now or lies before."""
        late = []
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if not request.is_closed:
                late.append(request)
        return late

    def next(self) -> float | None:
        """The nearest deadline of an open request."""
        while self._heap and self._heap[0][2].is_closed:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None


@dataclass(slots=True, eq=False)
class Piece:
    """Some pairs of one request, on their way through fetch, slab, batch and engine together."""

    request: ActiveRequest
    layout: PieceLayout
    rank: Rank | None = None
    images: Sequence[str] = ()
    slots: list[int | None] = field(default_factory=list)  # one per image; None where it is not to be had
    num_fetches: int = 0  # still out
    read_at: float = 0.0  # when the store had answered the last of them; 0 where nothing was asked of it

    def present(self) -> tuple[list[int], list[int]]:
        """The pairs whose image is in the slab, and the slot of each."""
        if len(self.images) == 1 and len(self.layout.pairs) > 1:  # an image query: one slot for all its texts
            slot = self.slots[0]
            return ([], []) if slot is None else (list(self.layout.pairs), [slot] * len(self.layout.pairs))
        if None not in self.slots:
            return list(self.layout.pairs), self.slots  # type: ignore[return-value]  # just seen
        both = [(pair, slot) for pair, slot in zip(self.layout.pairs, self.slots, strict=True) if slot is not None]
        return [pair for pair, _ in both], [slot for _, slot in both]


@dataclass(frozen=True, slots=True)
class Read:
    """What the store answered to one fetch, and when; an interval with all its attempts."""

    blobs: list[bytes | None]
    interval: Interval
    num_attempts: int


@dataclass(slots=True, eq=False)
class Fetch:
    """Blobs that were asked of the store together, and the pieces that wait for them."""

    images: list[str]
    slots: list[int]
    waiting: list[Piece] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReadyPiece:
    """A piece whose images are all in the slab or known to be missing; what the batcher groups."""

    piece: Piece
    pairs: list[int]
    slots: list[int]
    num_pairs: int
    tokens_per_pair: int
