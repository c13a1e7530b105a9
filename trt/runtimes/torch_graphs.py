"""Pairs scored by CUDA graphs in torch: work of one size, recorded once and replayed from then on.

Below some hundred pairs a forward pass takes longer to launch, kernel by kernel, than to compute. A graph holds for one
text length and one number of pairs on the same memory: texts keep their length, pairs are filled up to the next of a
few numbers. Knows no model and no slab; recording is given, so that everything else can be tried without a GPU.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trt.runtimes.static_shapes import Buckets

log = logging.getLogger(__name__)


class Replay(Protocol):
    """Recorded work."""

    def __call__(self) -> Tensor:
        """Do it again on whatever its memory holds now; the result stays until the next time."""


#: Runs work and records it. Raises `RuntimeError` for work that cannot be recorded.
Record = Callable[[Callable[[], Tensor]], Replay]
#: `(P, T, d)` texts, `(P,)` slots and `(P,)` scores of the first stage, or None -> `(P,)` logits.
Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """What a graph holds for."""

    num_pairs: int
    text_tokens: int
    has_scores: bool


def pair_buckets(max_pairs: int) -> Buckets:
    """Numbers of pairs to fill up to: powers of two from 16 and their halfway points, so at most a third is filling."""
    sizes = {size for power in range(4, max_pairs.bit_length() + 1) for size in (1 << power, 3 << (power - 1))}
    return Buckets((*sorted(size for size in sizes if size < max_pairs), max_pairs))


class GraphedScoring:
    """Scores groups of pairs of one text length. Used from one thread."""

    def __init__(
        self,
        score: Score,
        record: Record,
        *,
        buckets: Buckets,
        max_text_tokens: int,
        token_dim: int,
        device: torch.device,
        record_at: int,
    ) -> None:
        """A size is recorded when it is met the `record_at`th time: one that never comes back is not worth it."""
        self._score = score
        self._record = record
        self._buckets = buckets
        self._record_at = record_at
        most = buckets.largest
        self._texts = torch.zeros(most * max_text_tokens * token_dim, device=device)
        self._slots = torch.zeros(most, dtype=torch.int32, device=device)
        self._scores = torch.zeros(most, device=device)
        self._num_met: Counter[Size] = Counter()
        self._recorded: dict[Size, Replay | None] = {}  # None: it cannot be

    @property
    def num_recorded(self) -> int:
        return sum(replay is not None for replay in self._recorded.values())

    def __call__(self, states: Tensor, rows: Tensor, slots: Tensor, scores: Tensor | None) -> Tensor:
        """(P,) logits of the texts `states[rows]` against `slots`; they stay until the next call.

        All T tokens of each (Q, T, d) text count. At most as many pairs as the largest bucket.
        """
        num_pairs, (text_tokens, dim) = len(rows), states.shape[1:]
        size = Size(self._buckets.smallest_for(num_pairs), text_tokens, scores is not None)
        texts = self._texts[: size.num_pairs * text_tokens * dim].view(size.num_pairs, text_tokens, dim)
        torch.index_select(states, 0, rows, out=texts[:num_pairs])
        # Filling keeps what was there: texts and slots of earlier calls, which are as good as any.
        self._slots[:num_pairs] = slots
        filled_slots = self._slots[: size.num_pairs]
        filled_scores = None
        if scores is not None:
            self._scores[:num_pairs] = scores
            filled_scores = self._scores[: size.num_pairs]
        replay = self._replay_of(size, lambda: self._score(texts, filled_slots, filled_scores))
        return replay()[:num_pairs]

    def _replay_of(self, size: Size, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """How to do work of this size: its graph, or the work itself."""
        self._num_met[size] += 1
        if size not in self._recorded and self._num_met[size] >= self._record_at:
            try:
                self._recorded[size] = self._record(work)
            except RuntimeError as error:
                log.warning("%s runs without a CUDA graph: %s", size, str(error).splitlines()[0])
                self._recorded[size] = None
        return self._recorded.get(size) or work


class CudaRecorder:
    """Records on a CUDA device; all graphs share one pool of memory, because none runs beside another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self._device):
            # Once on a stream of its own: libraries set themselves up at their first run, which a graph cannot hold.
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads fill the slab meanwhile: only what this one calls is forbidden to wait.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
