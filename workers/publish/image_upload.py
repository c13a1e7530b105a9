"""Publishes many images or removals and follows their outcomes.

The number of unacknowledged events is bounded, however many images there are. Knows nothing of files and
terminals.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from protocols.dead_letters import DeadLetter
from protocols.events import ImageIndexed, ImageNew
from workers.client import PUBLISH_TIMEOUT_S, Client
from workers.errors import TooLarge

#: Events sent and not yet acknowledged: enough to keep the broker busy. The bytes bound images inside events.
MAX_UNCONFIRMED = 256
MAX_UNCONFIRMED_BYTES = 64 << 20
#: The longest single wait for outcomes.
POLL_S = 0.5


@dataclass(slots=True)
class Upload:
    """The progress of an upload."""

    published: int = 0
    indexed: int = 0
    #: Those indexed images that were stored already.
    already_stored: int = 0
    removed: int = 0
    #: Indexed images by the digest of the model that encoded them.
    models: Counter[str] = field(default_factory=Counter)
    #: Dead letters by error code, and the first message of each code.
    dead: Counter[str] = field(default_factory=Counter)
    causes: dict[str, str] = field(default_factory=dict)
    #: Images that the broker refused for their size: id and reason.
    too_large: list[tuple[str, str]] = field(default_factory=list)
    #: Published images without an outcome in time.
    unanswered: frozenset[str] = frozenset()


def upload(
    client: Client,
    images: Iterable[ImageNew | str],
    *,
    wait: bool,
    patience_s: float,
    on_progress: Callable[[Upload], None],
) -> Upload:
    """Publish all images, and the removals of all image ids.

    With `wait`, wait until each has its outcome, or until no outcome has arrived for `patience_s`.
    """
    upload = Upload()
    unconfirmed: deque[tuple[str, int, Future[None]]] = deque()
    unconfirmed_bytes = 0
    for image in images:
        if isinstance(image, str):
            image_id, num_bytes, sent = image, 0, client.publish_removal(image, watch=wait)
        else:
            image_id, num_bytes = image.image_id, len(image.data or b"")
            sent = client.publish_image(image, watch=wait)
        unconfirmed.append((image_id, num_bytes, sent))
        unconfirmed_bytes += num_bytes
        while len(unconfirmed) > MAX_UNCONFIRMED or unconfirmed_bytes > MAX_UNCONFIRMED_BYTES:
            unconfirmed_bytes -= _confirm(client, upload, *unconfirmed.popleft())
            _note_outcomes(client, upload, 0.0)
            on_progress(upload)
    while unconfirmed:
        _confirm(client, upload, *unconfirmed.popleft())
    on_progress(upload)
    give_up_at = time.monotonic() + patience_s
    while client.outstanding_images and time.monotonic() < give_up_at:
        if _note_outcomes(client, upload, POLL_S):
            on_progress(upload)
            give_up_at = time.monotonic() + patience_s
    upload.unanswered = client.outstanding_images
    return upload


def _confirm(client: Client, upload: Upload, image_id: str, num_bytes: int, published: Future[None]) -> int:
    """Wait for the acknowledgement; returns the bytes that are no longer in flight."""
    try:
        published.result(PUBLISH_TIMEOUT_S)
        upload.published += 1
    except TooLarge as error:
        client.forget_image(image_id)
        upload.too_large.append((image_id, str(error)))
    return num_bytes


def _note_outcomes(client: Client, upload: Upload, timeout_s: float) -> bool:
    outcomes = client.image_outcomes(timeout_s)
    for outcome in outcomes:
        if isinstance(outcome, DeadLetter):
            upload.dead[outcome.error_code] += 1
            upload.causes.setdefault(outcome.error_code, outcome.message)
        elif isinstance(outcome, ImageIndexed):
            upload.indexed += 1
            upload.already_stored += outcome.skipped
            upload.models[outcome.model] += 1
        else:
            upload.removed += 1
    return bool(outcomes)
