"""Publishes and removes images over Kafka, and reports their state and thumbnails.

An image is indexed when the index has it, failed when its dead letter has arrived, and pending before. Every replica
follows the dead letters, so that it knows the failed uploads of other replicas too. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from protocols.dead_letters import DeadLetter
from protocols.encoding import CONTENT_TYPE_HEADER, JSON, MSGPACK, encode
from protocols.events import ImageNew
from protocols.thumbnail import thumbnail_key, thumbnail_of
from workers.errors import Misconfigured, Refused, Transient, WorkerError
from workers.gateway.bodies import ImageState
from workers.gateway.errors import ApiError, Unanswered
from workers.gateway.searching import IndexSearch
from workers.ports import Follower, Gap, Headers, Outbox, Outgoing, TokenStore

V = TypeVar("V")

log = structlog.get_logger(__name__)

#: Most published images, and most failures, to remember for `GET /v1/images/{id}`.
MAX_REMEMBERED = 10_000
#: Bytes of an event in addition to the image: ids, headers and framing.
EVENT_OVERHEAD_BYTES = 4_096
#: Formats of thumbnails by their first bytes; other values are not served.
_MEDIA_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


class Images:
    """The images of one replica."""

    def __init__(
        self,
        *,
        topic: str,
        index: IndexSearch | None,
        store: TokenStore,
        max_message_bytes: int,
        timeout_s: float,
    ) -> None:
        self._topic = topic
        self._index = index
        self._store = store
        self._timeout_s = timeout_s
        self.max_image_bytes = max(1, max_message_bytes - EVENT_OVERHEAD_BYTES)
        self._store_threads = ThreadPoolExecutor(2, thread_name_prefix="thumbnails")
        self._pending: OrderedDict[str, None] = OrderedDict()
        self._failures: OrderedDict[str, tuple[str, str]] = OrderedDict()
        #: Outbox and follower are set when Kafka is connected; until then nothing can be published.
        self.outbox: Outbox | None = None
        self.dead_letters: Follower | None = None

    async def publish(self, image: ImageNew, trace_headers: Headers) -> None:
        """Publish an image. Raises `ApiError`."""
        content_type = JSON if image.data is None else MSGPACK  # JSON would enlarge the bytes by a third
        if image.data is not None and len(image.data) > self.max_image_bytes:
            raise too_large(self.max_image_bytes)
        headers = ((CONTENT_TYPE_HEADER, content_type.encode()), *trace_headers)
        await self._send(Outgoing(self._topic, image.image_id.encode(), encode(image, content_type), headers))
        self._failures.pop(image.image_id, None)
        _remember(self._pending, image.image_id, None)

    async def remove(self, image_id: str, trace_headers: Headers) -> None:
        """Publish the removal of an image, whether or not it is known. Raises `ApiError`."""
        await self._send(Outgoing(self._topic, image_id.encode(), None, trace_headers))
        self._pending.pop(image_id, None)
        self._failures.pop(image_id, None)

    async def state_of(self, image_id: str) -> ImageState:
        """Return the state of an image. Raises `ApiError`, also for an image that is not known."""
        if image_id in self._failures:
            code, message = self._failures[image_id]
            return ImageState(image_id=image_id, status="failed", error=code, message=message)
        if self._index is not None:
            try:
                found = await self._index.find(image_id)
            except Unanswered as why:
                raise why.error() from why
            if found is not None:
                self._pending.pop(image_id, None)
                return ImageState(image_id=image_id, status="indexed", metadata=dict(found.metadata))
        if image_id in self._pending:
            return ImageState(image_id=image_id, status="pending")
        raise ApiError(
            404,
            "image_not_found",
            "this image is not indexed and was not published through this replica recently",
        )

    async def thumbnail(self, image_id: str) -> tuple[bytes, str]:
        """Return the file of an image's thumbnail and its media type. Raises `ApiError`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                [value] = await loop.run_in_executor(
                    self._store_threads, self._store.get_many, [thumbnail_key(image_id)]
                )
        except TimeoutError:
            raise ApiError(504, "store_timeout", "the token store did not answer in time") from None
        except (Transient, Misconfigured) as error:
            log.warning("the token store did not answer", error=str(error))
            raise ApiError(503, "store_away", "the token store is not available at the moment") from error
        file = thumbnail_of(value) or b""
        media_type = next((kind for start, kind in _MEDIA_TYPES.items() if file.startswith(start)), None)
        if media_type is None:
            raise ApiError(
                404,
                "thumbnail_not_found",
                "this image has no thumbnail (INGEST_THUMBNAILS)",
            )
        return file, media_type

    def receive_dead_letters(self) -> None:
        """Note the images whose dead letters have arrived."""
        assert self.dead_letters is not None
        while (taken := self.dead_letters.take()) is not None:
            if isinstance(taken, Gap):
                continue
            image_id = (taken.key or b"").decode("utf-8", "replace")
            try:
                letter = DeadLetter.from_message(taken.key, taken.value, taken.headers)
            except ValueError as error:
                log.warning("a dead letter cannot be read", offset=taken.offset, error=str(error))
                continue
            self._pending.pop(image_id, None)
            _remember(self._failures, image_id, (letter.error_code, letter.message))

    def close(self) -> None:
        """End the threads."""
        self._store_threads.shutdown(wait=False, cancel_futures=True)

    async def _send(self, message: Outgoing) -> None:
        if self.outbox is None:
            raise Unanswered(503, "kafka_away", "Kafka is not connected yet").error()
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.wrap_future(self.outbox.send(message))
        except TimeoutError:
            raise Unanswered(503, "kafka_away", "Kafka did not accept the event in time").error() from None
        except Refused as error:
            if error.code == "too_large":
                raise too_large(self.max_image_bytes) from error
            raise Unanswered(503, "kafka_refused", "Kafka does not accept the event").error() from error
        except WorkerError as error:
            log.warning("event not sent", topic=message.topic, error=str(error))
            raise Unanswered(503, "kafka_away", "Kafka does not accept events at the moment").error() from error


def image_id_of(content: bytes | str) -> str:
    """Return the id of an image without a given id: the first half of the SHA-256 of its bytes or address."""
    data = content if isinstance(content, bytes) else content.encode()
    return hashlib.sha256(data).hexdigest()[:32]


def too_large(max_image_bytes: int) -> ApiError:
    return ApiError(
        413,
        "image_too_large",
        f"an image may have {max_image_bytes} bytes here; make it smaller (models see a few hundred pixels) or publish "
        "its address",
    )


def _remember(table: OrderedDict[str, V], key: str, value: V) -> None:
    table.pop(key, None)
    table[key] = value
    while len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
