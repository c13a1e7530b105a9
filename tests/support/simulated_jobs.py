"""The real rerank and ingest jobs as parts of a simulated world: their store, threads, web servers and engines.

Each content of an image is one number: the shade of its picture, the value of its tokens, and part of its logits. So a
reply shows which content of which image it was computed from.
"""

from __future__ import annotations

import functools
import io
from concurrent.futures import Future
from typing import Any

import numpy as np
from PIL import Image

import rerank_harness
from edje.images import ImageLimits
from protocols.topics import Topics
from rerank_harness import LAYOUT, TOPICS, encode_text
from simulated_bus import SimulatedExecutor, SimulatedRetry
from trt.contract import EngineInfo
from workers.bus.memory import MemoryFollower
from workers.dead_letters import DeadLetters
from workers.errors import Transient
from workers.ingest.addresses import ImageAddress
from workers.ingest.image_store import ImageStore
from workers.ingest.job import IngestJob
from workers.ingest.outcomes import IngestOutcomes
from workers.ingest.scheduling import FetchQueue, ImageBatcher, Unavailable
from workers.ingest.spans import IngestSpans
from workers.ingest.stages import IngestStages
from workers.ingest.work import IngestLimits
from workers.metrics import Metrics
from workers.ports import Gap, Record
from workers.rerank.fetching import BlobFetcher
from workers.store.memory import MemoryStore
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.tracer import Tracer

#: Contents are numbers below this, because a shade is a byte.
MAX_CONTENTS = 255
NUM_FETCH_THREADS = 3
MAX_IMAGE_BYTES = 1000


@functools.cache
def picture(content: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (content, content, content)).save(file, "PNG")
    return file.getvalue()


def number_of_text(text: str) -> int:
    return sum(encode_text(text)) % 97


class SimulatedStore(MemoryStore):
    """Lets other things happen around each call; calls fail at times, some after their effect."""

    def __init__(self, world: Any) -> None:
        super().__init__(clock=lambda: world.now)
        self.world = world

    def get_many(self, keys):
        self._wait()
        values = super().get_many(keys)
        self._wait()
        return values

    def put_many(self, values, *, lifetime_s=None):
        self._wait()
        written = super().put_many(values, lifetime_s=lifetime_s)
        self._wait()
        return written

    def _wait(self) -> None:
        self.world.interleave()
        if self.world.chance.random() < self.world.trouble / 2:
            raise Transient("the store does not answer")
        if self.world.chance.random() < self.world.trouble / 50:
            raise ZeroDivisionError("a fault of the client")


class SimulatedWeb:
    """Servers with every content; they answer late, in any order, and fail at times."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.waiting: list[tuple[ImageAddress, Future[bytes]]] = []

    def start(self, address: ImageAddress) -> Future[bytes]:
        self.waiting.append((address, Future()))
        return self.waiting[-1][1]

    def step(self) -> None:
        chance = self.world.chance
        while self.waiting and chance.random() < 0.5:
            address, future = self.waiting.pop(chance.randrange(len(self.waiting)))
            if chance.random() < self.world.trouble:
                future.set_exception(Unavailable("503", retry_after_s=chance.choice([None, 3.0])))
            else:
                future.set_result(picture(int(str(address.url).rsplit("/", 1)[1])))

    def close(self) -> None:
        """Nothing is held open."""


class ContentEngine(rerank_harness.Engine):
    """Logits that are the image's content plus 256 times the number of the text."""

    def __init__(self, world: Any, num_slots: int, max_pairs: int) -> None:
        super().__init__(num_slots, max_pairs)
        self.world = world

    def score_pairs(self, queries, pair_query, pair_slot):
        self.world.interleave()  # a slot that is pinned keeps its tokens meanwhile
        texts: Any = queries
        contents = self.slab.tokens.view(np.float16)[pair_slot, 0].astype(np.float32)
        return contents + 256 * np.array([sum(texts[query]) % 97 for query in pair_query], np.float32)


class ImageEngine:
    """Tokens that are all equal to the picture's shade."""

    info = EngineInfo("constant", "m1", "e1", 2, 4, "fp16", 8, 64, 4, 0, 0)

    def encode_images(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shades = pixels[:, 0, 0, 0].astype(np.float32)
        return np.broadcast_to(shades[:, None, None], (len(pixels), 2, 4)), shades[:, None].repeat(3, axis=1)


class NotingFollower(MemoryFollower):
    """Reports the records that it returned, and those of a gap when it returned the gap."""

    def __init__(self, world: Any) -> None:
        super().__init__(world.broker, TOPICS.images_indexed)
        self.world = world
        self.latest: dict[str, int] = {}  # the latest event of each image that was followed
        self._missed: list[list[Record]] = []
        for record in world.broker.log(TOPICS.images_indexed):
            self._note(record)

    def lose(self, number: int, reason: str = "records were removed") -> None:
        for partition, position in self._positions.items():
            if partition.number == number:
                self._missed.append(self._broker.partition_log(*partition)[position:])
        super().lose(number, reason)

    def take(self):
        taken = super().take()
        if isinstance(taken, Gap):
            for record in self._missed.pop(0):
                self._note(record)
        elif taken is not None:
            self._note(taken)
        return taken

    def _note(self, record: Record) -> None:
        image, event = (record.key or b"").decode(), self.world.event_of(record)
        self.latest[image] = max(self.latest.get(image, 0), event)


class RerankParts:
    """A rerank job and its asynchronous parts."""

    def __init__(self, world: Any) -> None:
        chance = world.chance
        engine_threads, tokenizer = SimulatedExecutor(world), SimulatedExecutor(world)
        fetches = SimulatedExecutor(world, NUM_FETCH_THREADS)
        fetcher = BlobFetcher(world.store, SimulatedRetry(), 1, world.metrics.fetch_seconds, lambda: world.now)
        fetcher._executor = fetches
        num_slots = chance.choice([8, 8, 64])
        self.rig = rerank_harness.Rig(
            engine=ContentEngine(world, num_slots, 8),
            num_slots=num_slots,
            executor=engine_threads,
            text_executor=tokenizer,
            store=world.store,
            start_fetch=fetcher.start,
            metrics=world.metrics,
            max_fetches=chance.choice([1, 2 * NUM_FETCH_THREADS]),
            max_inflight_pairs=chance.choice([12, 1000]),
            tokenizer_cache_size=2,
        )
        self.follower = NotingFollower(world)
        self.rig.invalidation.follow(self.follower)
        self.job = self.rig.job
        self.steppable = [engine_threads, tokenizer, fetches]

    def verify(self) -> None:
        assert self.rig.is_idle(), "requests, pairs or pins are left behind"
        assert self.job._num_inflight_bytes == self.job._num_inflight_tokens == 0
        assert self.rig.landing.num_pending == self.rig.loader.num_fetching == 0
        assert not self.rig.loader._fetch_of


class IngestParts:
    """An ingest job and its asynchronous parts."""

    def __init__(self, world: Any) -> None:
        chance, tracer = world.chance, Tracer.off()
        spans = IngestSpans(tracer, BusSpans(tracer, topic=TOPICS.images_new, group_id="ingest"))
        web = SimulatedWeb(world)
        self.stages = IngestStages(
            engine=ImageEngine(),  # type: ignore[arg-type]
            images=ImageStore(
                world.store,
                LAYOUT,
                reads=SimulatedRetry(),  # type: ignore[arg-type]
                writes=SimulatedRetry(),  # type: ignore[arg-type]
                clock=lambda: world.now,
            ),
            fetcher=web,
            image_limits=ImageLimits(max_bytes=MAX_IMAGE_BYTES, max_pixels=10_000),
            decode_threads=1,
            makes_thumbnails=chance.random() < 0.2,
            wake=lambda: None,
            clock=lambda: world.now,
        )
        self.stages._decoding = SimulatedExecutor(world, 2)
        self.stages._on_engine = SimulatedExecutor(world)
        self.stages._looking_up = SimulatedExecutor(world)
        self.stages._writing = SimulatedExecutor(world)
        self.job = IngestJob(
            stages=self.stages,
            fetches=FetchQueue(max_fetches=4, retry_for_s=600.0, uniform=chance.uniform),
            batcher=ImageBatcher(max_images=4, max_wait_s=0.01),
            outcomes=IngestOutcomes(
                topics=Topics(""),
                layout=LAYOUT,
                dead_letters=dead_letters(world.metrics),
                publish_embedding=chance.random() < 0.5,
                max_event_bytes=10_000,
                metrics=world.metrics,
                spans=spans,
            ),
            limits=IngestLimits(MAX_IMAGE_BYTES, chance.choice([2, 100]), 100_000),
            metrics=world.metrics,
            spans=spans,
        )
        stages = self.stages
        self.steppable = [web, stages._decoding, stages._on_engine, stages._looking_up, stages._writing]

    def verify(self) -> None:
        job = self.job
        assert (job._num_in_work, job._num_bytes, job._num_preparing, job._num_batches) == (0, 0, 0, 0)
        assert job._fetching.num_fetching() == job._fetching.num_waiting() == self.stages._landing.num_pending == 0


def dead_letters(metrics: Metrics) -> DeadLetters:
    return DeadLetters(TOPICS.dead_letter, 1 << 20, metrics)
