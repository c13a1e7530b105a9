"""A stretch of time in the loop's clock: what a stage took, and when."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """From `started_at` to `ended_at`, in seconds."""

    started_at: float
    ended_at: float

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at
