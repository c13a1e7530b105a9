"""Computes the times of a request's stages, from which its reply, the metrics and the spans are made.

Pure. The stages follow each other without gaps and add up to the total; a stage ends when the last piece has passed it.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.ports import Interval
from workers.rerank.request import Request
from workers.telemetry.names import BATCH_WAIT, FETCH, INBOX, QUEUE, SCORE, TOTAL


@dataclass(frozen=True, slots=True)
class Timeline:
    """The intervals of the stages in order, and the total interval."""

    stages: dict[str, Interval]
    total: Interval

    def timings_ms(self) -> dict[str, float]:
        """Return the durations in milliseconds, as replies carry them."""
        timings = {stage: _ms(interval) for stage, interval in self.stages.items()}
        timings[TOTAL] = _ms(self.total)
        return timings


def timeline_of(request: Request, now: float) -> Timeline:
    """Return the stages that a request has reached, answered at `now`."""
    has_work = request.num_pairs > 0
    starts = [
        (QUEUE, request.accepted_at if has_work else None),
        (FETCH, request.started_at),
        (BATCH_WAIT, request.fetched_at if request.num_unready_pieces == 0 else None),
        (SCORE, request.scoring_at if request.num_open_pieces == 0 else None),
    ]
    polled_at = request.record.polled_at(request.accepted_at)
    stages, stage, began_at = {}, INBOX, polled_at
    for following, at in starts:
        if at is None:
            continue
        # One piece may be scored before another has its tokens; `max` keeps a stage from ending before it begins.
        at = max(at, began_at)
        stages[stage] = Interval(began_at, at)
        stage, began_at = following, at
    # Results of other threads may be later than `now`, the start of the turn.
    ended_at = max(began_at, now, request.scored_at)
    stages[stage] = Interval(began_at, ended_at)
    return Timeline(stages, Interval(polled_at, ended_at))


def _ms(interval: Interval) -> float:
    return round(interval.seconds * 1000, 3)
