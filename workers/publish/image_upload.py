"""Publishes many images and follows what becomes of them.

Bounded in what is sent and not yet acknowledged, however many images there are. Knows nothing of files and terminals.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from protocols.dead_letters import DeadLetter
from protocols.events import ImageNew
from workers.client import PUBLISH_TIMEOUT_S, Client
from workers.errors import TooLarge

#: Sent and not yet acknowledged: enough to keep the broker busy; the bytes bound what images inside events can hold.
MAX_UNCONFIRMED = 256
MAX_UNCONFIRMED_BYTES = 64 << 20
#: How long one wait for outcomes lasts at most.
POLL_S = 0.5


@dataclass(slots=True)
class Upload:
    """How far the images have come."""

    published: int = 0
    indexed: int = 0
    #: Of those indexed, the ones that were stored already.
    already_stored: int = 0
    #: Dead letters by error code, and the sentence of the first of each.
    dead: Counter[str] = field(default_factory=Counter)
    causes: dict[str, str] = field(default_factory=dict)
    #: Refused by the broker for their size: id and reason.
    too_large: list[tuple[str, str]] = field(default_factory=list)
    #: Published, and nothing heard of them within the time.
    unheard: frozenset[str] = frozenset()


def upload(
    client: Client,
    images: Iterable[ImageNew],
    *,
    wait: bool,
    patience_s: float,
    on_progress: Callable[[Upload], None],
) -> Upload:
    """Publish all, and with `wait` stay until each is indexed or dead, or nothing has been heard for `patience_s`."""
    upload = Upload()
    unconfirmed: deque[tuple[str, int, Future[None]]] = deque()
    unconfirmed_bytes = 0
    for image in images:
        num_bytes = len(image.data or b"")
        unconfirmed.append((image.image_id, num_bytes, client.publish_image(image, watch=wait)))
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
    upload.unheard = client.outstanding_images
    return upload


def _confirm(client: Client, upload: Upload, image_id: str, num_bytes: int, published: Future[None]) -> int:
    """Wait for the broker's word; returns the bytes that are in flight no more."""
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
        else:
            upload.indexed += 1
            upload.already_stored += outcome.skipped
    return bool(outcomes)
