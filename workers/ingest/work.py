"""One image event in work, and the bounds of all work.

Plain data; decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protocols.source_position import SourcePosition
from workers.errors import Misconfigured
from workers.ingest.addresses import ImageAddress
from workers.ports import Interval, Record, SpanIds
from workers.telemetry.tracer import MessageTrace


@dataclass(frozen=True, slots=True)
class IngestLimits:
    """The bounds of all work at one time."""

    max_image_bytes: int  # reserved for each image that is being fetched, because its size is unknown
    max_inflight_images: int  # images that wait for a fetch are not counted
    max_inflight_bytes: int

    def __post_init__(self) -> None:
        if self.max_inflight_bytes < self.max_image_bytes:
            raise Misconfigured("max_inflight_bytes must be at least max_image_bytes")


@dataclass(slots=True, eq=False)
class ImageWork:
    """One event that has no outcome yet."""

    record: Record
    trace: MessageTrace
    taken_at: float
    image_id: str
    address: ImageAddress | None = None
    metadata: Mapping[str, str] | None = None
    data: bytes = b""
    sha256: bytes = b""
    is_stored: bool = False  # a valid blob of the same content is in the store
    pixels: NDArray[np.uint8] | None = None  # (3, size, size)
    thumbnail: bytes | None = None
    tokens: NDArray[np.float32] | None = None  # (m, d)
    embedding: NDArray[np.float32] | None = None  # (e,)
    num_attempts: int = 1
    stages: dict[str, Interval] = field(default_factory=dict)
    batches: list[SpanIds] = field(default_factory=list)  # the spans of its batches, if it is sampled
    num_bytes: int = 0  # the bytes counted for this image in the job's total
    is_dropped: bool = False

    @property
    def position(self) -> SourcePosition:
        """The position that the store keeps with the image's values."""
        return SourcePosition(self.record.offset, self.record.timestamp_ms)

    def held_bytes(self) -> int:
        """Return the bytes that this image keeps in memory now."""
        num_pixel_bytes = 0 if self.pixels is None else self.pixels.nbytes
        return self.record.num_bytes() + len(self.data) + num_pixel_bytes
