"""Groups decoded images into batches for the engine.

Decides what goes together and when; knows nothing of Kafka, pixels or the clock.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class ImageBatcher(Generic[T]):
    """Images in the order they became ready."""

    def __init__(self, *, max_images: int, max_wait_s: float) -> None:
        self._max_images = max_images
        self._max_wait_s = max_wait_s
        self._waiting: deque[tuple[float, T]] = deque()

    def add(self, image: T, now: float) -> None:
        self._waiting.append((now, image))

    def take(self, now: float, *, more_is_coming: bool) -> list[T]:
        """Return the next batch, or an empty list while it pays to wait.

        A batch leaves when it is full, when its oldest image has waited long enough, or at once when nothing that
        could join it is on its way.
        """
        if more_is_coming and len(self._waiting) < self._max_images and self.wants_turn_in_s(now) != 0.0:
            return []
        return [self._waiting.popleft()[1] for _ in range(min(len(self._waiting), self._max_images))]

    def wants_turn_in_s(self, now: float) -> float | None:
        """Seconds until the oldest image has waited long enough, None when nothing waits."""
        if not self._waiting:
            return None
        return max(0.0, self._waiting[0][0] + self._max_wait_s - now)
