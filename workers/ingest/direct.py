"""Encodes and stores images without the topic `images.new`, for programs that fill a collection themselves.

For jobs on Ray Data or Spark, with one engine in each of their workers:

    def encode_batch(batch):                       # in an actor that has made `engine` and `images`
        files = list(zip(batch["image_id"], batch["bytes"], strict=True))
        for outcome in encode_and_store(engine, images, files, limits):
            if isinstance(outcome, ImageIndexed):  # publish: the index and the rerank workers follow this topic
                producer.send("images.indexed", encode(outcome), key=outcome.image_id.encode())
            else:
                failed.append(outcome)             # (image_id, error)

A value written here replaces the results of all earlier events. Every later event of `images.new` for the image
replaces the value.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edje.images import ImageError, ImageLimits, decode_image
from protocols.events import ImageIndexed
from protocols.source_position import SourcePosition
from trt.contract import ImageEncoder
from workers.errors import Poison
from workers.ingest.image_store import ImageStore, ToWrite


def encode_and_store(
    engine: ImageEncoder,
    images: ImageStore,
    files: Sequence[tuple[str, bytes]],
    limits: ImageLimits,
    *,
    clock: Callable[[], float] = time.time,
) -> Iterator[ImageIndexed | tuple[str, Poison]]:
    """Yield for each image the event to publish, or the id and the error.

    Blocks until the store has the tokens. If a later event has stored the image meanwhile, yields nothing. `clock`
    returns seconds since 1970.
    """
    position = SourcePosition(0, round(clock() * 1000))
    decoded: list[tuple[str, bytes, NDArray[np.uint8]]] = []
    for image_id, data in files:
        try:
            pixels = decode_image(data, engine.info.image_size, limits, engine.info.resample)
        except ImageError as error:
            yield image_id, Poison(error.code, str(error))
        else:
            decoded.append((image_id, hashlib.sha256(data).digest(), pixels))
    for start in range(0, len(decoded), engine.info.max_images):
        batch = decoded[start : start + engine.info.max_images]
        tokens, embeddings = engine.encode_images(np.stack([pixels for _, _, pixels in batch]))
        items = [
            ToWrite(image_id, position, sha256, tokens[number], embeddings[number], None, is_dropped=lambda: False)
            for number, (image_id, sha256, _) in enumerate(batch)
        ]
        for item, outcome in zip(items, images.write(items).outcomes, strict=True):
            if isinstance(outcome, Poison):
                yield item.image_id, outcome
            elif outcome == "written":
                yield ImageIndexed(
                    image_id=item.image_id,
                    model=images.layout.model_digest,
                    num_tokens=images.layout.num_tokens,
                    dtype=images.layout.storage,
                    num_bytes=images.layout.blob_bytes,
                    content_sha256=item.sha256.hex(),
                    embedding=None if item.embedding is None else item.embedding.tolist(),
                )
