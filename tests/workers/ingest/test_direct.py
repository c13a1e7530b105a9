"""Direct writers: images are encoded and stored as the worker does it, without `images.new`."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from edje.images import ImageLimits
from protocols.blob import BlobLayout, blob_key, content_sha256_of
from protocols.events import ImageIndexed
from protocols.source_position import SourcePosition, position_of, removal_marker
from trt.contract import EngineInfo
from workers.ingest.direct import encode_and_store
from workers.ingest.image_store import ImageStore
from workers.retrying import Retry
from workers.store.memory import MemoryStore

LAYOUT = BlobLayout(model_digest="m1", num_tokens=2, token_dim=4, storage="fp16")
LIMITS = ImageLimits(max_bytes=10_000, max_pixels=10_000)


class Engine:
    """Tokens all equal to the picture's shade; not finite for shade 255."""

    def __init__(self) -> None:
        self.info = EngineInfo("constant", "m1", "e1", 2, 4, "fp16", 8, 64, 4, 0, 0)
        self.batches: list[int] = []

    def encode_images(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.batches.append(len(pixels))
        shades = pixels[:, 0, 0, 0].astype(np.float32)
        shades[shades == 255] = np.nan
        return np.broadcast_to(shades[:, None, None], (len(pixels), 2, 4)), shades[:, None].repeat(3, axis=1)


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def run(store: MemoryStore, files, now=1_000.0):
    images = ImageStore(store, LAYOUT, reads=Retry(), writes=Retry(), clock=lambda: 0.0)
    engine = Engine()
    return list(encode_and_store(engine, images, files, LIMITS, clock=lambda: now)), engine


def test_images_are_stored_in_batches_and_their_events_returned(store):
    outcomes, engine = run(store, [(f"i{n}", picture(n)) for n in range(10)])

    assert [event.image_id for event in outcomes] == [f"i{n}" for n in range(10)]
    assert engine.batches == [4, 4, 2]
    assert outcomes[3].embedding == [3.0, 3.0, 3.0]
    (blob,) = store.get_many([blob_key("m1", "i3")])
    assert content_sha256_of(LAYOUT, blob) == hashlib.sha256(picture(3)).digest()
    assert position_of(blob) == (0, 1_000_000)


def test_a_broken_image_and_unusable_tokens_are_errors_of_their_image_alone(store):
    outcomes, _ = run(store, [("broken", b"no image"), ("infinite", picture(255)), ("good", picture(5))])

    errors = {outcome[0]: outcome[1].code for outcome in outcomes if not isinstance(outcome, ImageIndexed)}
    assert errors == {"broken": "not_an_image", "infinite": "tokens_unusable"}
    assert [outcome.image_id for outcome in outcomes if isinstance(outcome, ImageIndexed)] == ["good"]


def test_an_image_that_was_removed_or_stored_later_is_left_as_it_is(store):
    store.put_many({blob_key("m1", "gone"): removal_marker(SourcePosition(7, 2_000_000))})

    outcomes, _ = run(store, [("gone", picture(5))], now=1_000.0)
    later, _ = run(store, [("gone", picture(5))], now=3_000.0)

    assert outcomes == []
    assert [event.image_id for event in later] == ["gone"]
