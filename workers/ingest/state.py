"""What the ingest job keeps of one event, and how much it may keep of all.

Plain data; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from workers.errors import Misconfigured
from workers.ports import Interval, Record, SpanIds
from workers.telemetry.tracer import MessageTrace


@dataclass(frozen=True, slots=True)
class IngestLimits:
    """How much a worker has in work at once."""

    max_image_bytes: int  # set aside while an image of unknown size is being fetched
    max_inflight_images: int
    max_inflight_bytes: int
    fetch_threads: int

    def __post_init__(self) -> None:
        if self.max_inflight_bytes < self.max_image_bytes:
            raise Misconfigured("max_inflight_bytes must hold at least one image of max_image_bytes")


@dataclass(slots=True, eq=False)
class ImageInWork:
    """One event on its way to its outcome."""

    record: Record
    trace: MessageTrace
    taken_at: float
    image_id: str
    uri: str | None
    data: bytes = b""
    sha256: bytes = b""
    pixels: NDArray[np.uint8] | None = None  # (3, size, size)
    stages: dict[str, Interval] = field(default_factory=dict)
    batches: list[SpanIds] = field(default_factory=list)  # the spans of its batches, where it is recorded
    num_bytes: int = 0  # as counted last
    is_dropped: bool = False

    def held_bytes(self) -> int:
        """What this image keeps in memory now."""
        num_pixel_bytes = 0 if self.pixels is None else self.pixels.nbytes
        return len(self.record.value or b"") + len(self.data) + num_pixel_bytes
