"""Where the time of a request went: one account, from which its reply, the metrics and the spans are made.

Pure. The stages follow each other without gaps, each up to the last of the request's pieces, so that they add up to
the total.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.ports import Interval, Record
from workers.rerank.state import ActiveRequest
from workers.telemetry.names import BATCH_WAIT, FETCH, INBOX, QUEUE, SCORE, TOTAL


@dataclass(frozen=True, slots=True)
class Timeline:
    """The stages in order, the last one up to the reply, and all of it."""

    stages: dict[str, Interval]
    total: Interval

    def timings_ms(self) -> dict[str, float]:
        """As replies carry it."""
        timings = {stage: _ms(interval) for stage, interval in self.stages.items()}
        timings[TOTAL] = _ms(self.total)
        return timings


def timeline_of(active: ActiveRequest, now: float) -> Timeline:
    """The account of a request that is answered now, as far as it came."""
    starts = [
        (QUEUE, active.accepted_at),
        (FETCH, active.started_at),
        (BATCH_WAIT, active.fetched_at if active.num_unready_pieces == 0 else None),
        (SCORE, active.scoring_at if active.num_open_pieces == 0 else None),
    ]
    stages, stage, began_at = {}, INBOX, active.record.polled_at(active.accepted_at)
    polled_at = began_at
    for following, at in starts:
        if at is None:
            continue
        # Of several pieces one may be scored before another has its tokens: a stage never ends before it begins.
        at = max(at, began_at)
        stages[stage] = Interval(began_at, at)
        stage, began_at = following, at
    # What other threads have done since may lie behind `now`, which is the beginning of the loop's turn.
    ended_at = max(began_at, now, active.scored_at)
    if active.plan.pieces:
        stages[stage] = Interval(began_at, ended_at)
    return Timeline(stages, Interval(polled_at, ended_at))


def timeline_of_refused(record: Record, now: float) -> Timeline:
    """The account of a record that was answered when it was taken."""
    waited = Interval(record.polled_at(now), now)
    return Timeline({INBOX: waited}, waited)


def _ms(interval: Interval) -> float:
    return round(interval.seconds * 1000, 3)
