"""The ingest job with an engine, a store and web servers that the tests control."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edje.images import ImageLimits
from protocols.blob import BlobLayout, blob_key, decode_blobs, encode_blob
from protocols.dead_letters import DeadLetter
from protocols.encoding import MSGPACK, decode, encode
from protocols.events import ImageIndexed, ImageNew
from protocols.source_position import SourcePosition, is_removal_marker, position_of, with_position
from protocols.thumbnail import thumbnail_key, thumbnail_of
from protocols.topics import Topics
from tracing_harness import Recorded
from trt.contract import EngineBroken, EngineInfo
from workers.dead_letters import DeadLetters
from workers.errors import Misconfigured, Poison, TooLarge, TopicRefused, Transient
from workers.ingest.addresses import ImageAddress
from workers.ingest.image_store import ImageStore
from workers.ingest.job import IngestJob
from workers.ingest.outcomes import IngestOutcomes
from workers.ingest.scheduling import FetchQueue, ImageBatcher
from workers.ingest.spans import IngestSpans
from workers.ingest.stages import IngestStages
from workers.ingest.work import IngestLimits
from workers.metrics import Metrics
from workers.ports import Finished, Partition, Record
from workers.retrying import Retry
from workers.store.memory import MemoryStore
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.trace_context import trace_id_of

PARTITION = Partition("images.new", 0)
LAYOUT = BlobLayout(model_digest="m1", num_tokens=2, token_dim=4, storage="fp16")
TRACEPARENT = ("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01")
GIVE_UP_S = 20.0
LOOK_AGAIN_S = 0.02  # for what happens without a wake


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


class Engine:
    """Tokens all equal to the picture's shade; not finite for shade 255."""

    def __init__(self) -> None:
        self.info = EngineInfo("constant", "m1", "e1", 2, 4, "fp16", 8, 64, 4, 0, 0)
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def warm_up(self) -> None:
        """Always warm."""

    def encode_images(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (3, 8, 8)
        self.batches.append(len(pixels))
        self.entered.set()
        assert self.gate.wait(GIVE_UP_S)
        if self.error is not None:
            raise self.error
        shades = pixels[:, 0, 0, 0].astype(np.float32)
        shades[shades == 255] = np.nan
        return np.broadcast_to(shades[:, None, None], (len(pixels), 2, 4)), shades[:, None].repeat(3, axis=1)


class Store(MemoryStore):
    """Counts its calls; can be away for some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.times_away = 0
        self.gate = threading.Event()  # for reading
        self.gate.set()
        self.write_gate = threading.Event()
        self.write_gate.set()

    def get_many(self, keys: Any) -> list[bytes | None]:
        self._note("get", len(keys))
        assert self.gate.wait(GIVE_UP_S)
        return super().get_many(keys)

    def put_many(self, values: Any, *, lifetime_s: float | None = None) -> list[bool]:
        self._note("put", len(values))
        assert self.write_gate.wait(GIVE_UP_S)
        return super().put_many(values, lifetime_s=lifetime_s)

    def _note(self, call: str, num_keys: int) -> None:
        self.calls.append((call, num_keys))
        if self.times_away:
            self.times_away -= 1
            raise Transient("away")

    def shade(self, image_id: str) -> float | None:
        """What the stored tokens say the picture's shade is."""
        tokens, scales = np.zeros((1, LAYOUT.token_bytes), np.uint8), np.zeros((1, 0), np.uint8)
        errors = decode_blobs(LAYOUT, super().get_many([blob_key("m1", image_id)]), tokens, scales, [0])
        return None if errors[0] is not None else float(tokens.view(np.float16)[0, 0])


class Web:
    """Addresses and what they give, in turn; the last answer stays."""

    def __init__(self) -> None:
        self.pages: dict[str, list[bytes | Exception]] = {}
        self.gates: dict[str, threading.Event] = {}
        self.num_open = 0
        self.most_open = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(16)

    def start(self, address: ImageAddress) -> Future[bytes]:
        return self._threads.submit(self.fetch, str(address.url or f"file://{address.path}"))

    def fetch(self, uri: str) -> bytes:
        with self._lock:
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        try:
            if uri in self.gates:
                assert self.gates[uri].wait(GIVE_UP_S)
            answers = self.pages[uri]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, Exception):
                raise answer
            return answer
        finally:
            with self._lock:
                self.num_open -= 1

    def close(self) -> None:
        for gate in self.gates.values():
            gate.set()
        self._threads.shutdown()


@dataclass
class Bench:
    """A job with its surroundings: records in, outcomes out."""

    job: IngestJob
    engine: Engine
    store: Store
    web: Web
    metrics: Metrics
    woken: threading.Event
    retried: list[str]
    num_records: int = 0
    finished: list[Finished] = field(default_factory=list)

    def send(
        self,
        event: ImageNew | bytes,
        *,
        partition: Partition = PARTITION,
        msgpack: bool = False,
        offset: int | None = None,
    ) -> Record:
        value = event if isinstance(event, bytes) else encode(event, MSGPACK if msgpack else "application/json")
        headers = (("content-type", MSGPACK.encode()), TRACEPARENT) if msgpack else (TRACEPARENT,)
        return self.accept(partition, b"key", value, headers, offset)

    def remove(self, image_id: str, *, partition: Partition = PARTITION, offset: int | None = None) -> Record:
        return self.accept(partition, image_id.encode(), None, (TRACEPARENT,), offset)

    def accept(
        self, partition: Partition, key: bytes | None, value: bytes | None, headers: Any, offset: int | None = None
    ) -> Record:
        offset = self.num_records if offset is None else offset
        record = Record(partition, offset, key, value, headers, 1_000 + offset)
        self.num_records = max(self.num_records, offset) + 1
        self.job.accept(record, time.monotonic())
        return record

    def turn(self) -> None:
        self.finished += self.job.turn(time.monotonic())

    def until(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + GIVE_UP_S
        self.turn()
        while not happened():
            assert time.monotonic() < end, "it does not happen"
            wait = self.job.wants_turn_in_s(time.monotonic())
            self.woken.wait(LOOK_AGAIN_S if wait is None else min(wait, LOOK_AGAIN_S))
            self.woken.clear()
            self.turn()

    def until_idle(self) -> list[Finished]:
        self.until(lambda: self.job.num_active() == 0)
        return self.finished

    def num_timed(self, stage: str) -> float:
        return self.metrics.registry.get_sample_value("edje_image_seconds_count", {"stage": stage}) or 0.0

    def indexed(self) -> dict[str, ImageIndexed]:
        messages = [message for done in self.finished for message in done.messages]
        events = [
            decode(ImageIndexed, message.value)
            for message in messages
            if message.topic == "images.indexed" and message.value is not None
        ]
        return {event.image_id: event for event in events}

    def tombstones(self) -> list[bytes | None]:
        messages = [message for done in self.finished for message in done.messages]
        return [message.key for message in messages if message.topic == "images.indexed" and message.value is None]

    def dead_letters(self) -> list[DeadLetter]:
        messages = [message for done in self.finished for message in done.messages if message.topic == "images.new.dlq"]
        return [DeadLetter.from_message(message.key, message.value, message.headers) for message in messages]


LIMITS = IngestLimits(max_image_bytes=1000, max_inflight_images=100, max_inflight_bytes=100_000)


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def build(
        limits: IngestLimits = LIMITS,
        *,
        layout: BlobLayout = LAYOUT,
        max_wait_s: float = 0.01,
        embedding: bool = False,
        thumbnails: bool = False,
        max_fetches: int = 8,
        retry_for_s: float = 600.0,
        recorded: Recorded | None = None,
        store: Store | None = None,
    ) -> Bench:
        engine, web, metrics, woken = Engine(), Web(), Metrics(), threading.Event()
        store = store or Store()
        retried: list[str] = []
        tracer = (recorded or Recorded()).tracer(time.monotonic)
        spans = IngestSpans(tracer, BusSpans(tracer, topic="images.new", group_id="g"))

        def retry(kind: str) -> Retry:
            return Retry(on_retry=lambda: retried.append(kind))

        stages = IngestStages(
            engine=engine,
            images=ImageStore(
                store, layout, reads=retry("store_read"), writes=retry("store_write"), clock=time.monotonic
            ),
            fetcher=web,
            image_limits=ImageLimits(max_bytes=limits.max_image_bytes, max_pixels=10_000),
            decode_threads=2,
            makes_thumbnails=thumbnails,
            wake=woken.set,
            clock=time.monotonic,
        )
        outcomes = IngestOutcomes(
            topics=Topics(),
            layout=layout,
            dead_letters=DeadLetters(Topics().dead_letter, 2_000, metrics),
            publish_embedding=embedding,
            max_event_bytes=10_000,
            metrics=metrics,
            spans=spans,
        )
        job = IngestJob(
            stages=stages,
            fetches=FetchQueue(max_fetches=max_fetches, retry_for_s=retry_for_s, uniform=lambda low, high: 0.0),
            batcher=ImageBatcher(max_images=engine.info.max_images, max_wait_s=max_wait_s),
            outcomes=outcomes,
            limits=limits,
            metrics=metrics,
            spans=spans,
        )
        benches.append(Bench(job, engine, store, web, metrics, woken, retried))
        return benches[-1]

    yield build
    for bench in benches:
        bench.engine.gate.set()
        bench.store.gate.set()
        bench.store.write_gate.set()
        bench.web.close()
        bench.job.close()


def inline(image_id: str, shade: int) -> ImageNew:
    return ImageNew(image_id=image_id, data=picture(shade))


def at(image_id: str, uri: str) -> ImageNew:
    return ImageNew(image_id=image_id, uri=uri)


# --- the good way ---


@pytest.mark.parametrize("msgpack", [False, True])
def test_an_image_is_stored_and_announced(make, msgpack):
    bench = make()
    record = bench.send(inline("img", 7), msgpack=msgpack)

    (finished,) = bench.until_idle()

    assert finished.record is record
    (message,) = finished.messages
    assert (message.topic, message.key) == ("images.indexed", b"img")
    assert dict(message.headers)["content-type"] == b"application/json"
    assert trace_id_of(message.headers) == "a" * 32
    assert dict(message.headers)["traceparent"] != TRACEPARENT[1]
    event = bench.indexed()["img"]
    assert (event.model, event.num_tokens, event.dtype, event.num_bytes) == ("m1", 2, "fp16", LAYOUT.blob_bytes)
    assert event.content_sha256 == hashlib.sha256(picture(7)).hexdigest()
    assert set(event.timings_ms) == {"look_up", "decode", "encode", "store"}
    assert event.embedding is None
    assert not event.skipped
    assert bench.store.shade("img") == 7.0


def test_an_image_is_fetched_from_its_address(make):
    bench = make()
    bench.web.pages["https://h/a.png"] = [picture(9)]
    bench.send(at("img", "https://h/a.png"))

    bench.until_idle()

    assert bench.store.shade("img") == 9.0
    assert set(bench.indexed()["img"].timings_ms) == {"fetch", "look_up", "decode", "encode", "store"}


def test_the_embedding_is_published_where_it_is_wanted(make):
    bench = make(embedding=True)
    bench.send(inline("img", 7))

    bench.until_idle()

    assert bench.indexed()["img"].embedding == [7.0, 7.0, 7.0]


def test_many_images_share_batches_look_ups_and_writes(make):
    bench = make(max_wait_s=GIVE_UP_S)
    for number in range(10):
        bench.send(inline(f"img-{number}", number))

    bench.until_idle()

    assert {bench.store.shade(f"img-{number}") for number in range(10)} == set(map(float, range(10)))
    assert sum(bench.engine.batches) == 10
    assert max(bench.engine.batches) <= 4
    assert len(bench.engine.batches) <= 5
    assert [size for call, size in bench.store.calls if call == "put"] == bench.engine.batches


def test_images_are_decoded_while_the_model_runs(make):
    bench = make()
    bench.engine.gate.clear()
    for number in range(13):
        bench.send(inline(f"img-{number}", number))

    bench.until(lambda: bench.num_timed("decode") == 13)
    assert bench.num_timed("encode") == 0

    bench.engine.gate.set()
    bench.until_idle()
    assert len(bench.indexed()) == 13


# --- the same content again ---


def test_metadata_goes_on_into_the_indexed_event(make):
    bench = make()
    bench.send(ImageNew(image_id="img", data=picture(7), metadata={"album": "summer"}))

    bench.until_idle()

    assert bench.indexed()["img"].metadata == {"album": "summer"}


def test_a_blob_carries_the_position_of_its_event(make):
    bench = make()
    record = bench.send(inline("img", 7), offset=41)

    bench.until_idle()

    (blob,) = bench.store.get_many([blob_key("m1", "img")])
    assert position_of(blob) == (41, record.timestamp_ms)


def test_the_same_content_is_not_encoded_again(make):
    bench = make()
    bench.send(inline("img", 7))
    bench.until_idle()
    bench.send(inline("img", 7))

    bench.until_idle()

    assert bench.indexed()["img"].skipped
    assert bench.engine.batches == [1]
    assert len(bench.finished) == 2


def test_the_embedding_is_published_for_an_image_that_is_stored_already(make):
    bench = make()
    bench.send(inline("img", 7))
    bench.until_idle()
    later = make(embedding=True, store=bench.store)
    num_writes = len([call for call, _ in bench.store.calls if call == "put"])
    later.send(inline("img", 7))

    later.until_idle()

    event = later.indexed()["img"]
    assert event.skipped
    assert event.embedding == [7.0, 7.0, 7.0]
    assert later.engine.batches == [1]
    assert len([call for call, _ in bench.store.calls if call == "put" and _]) == num_writes  # nothing to write


def test_the_same_content_again_moves_the_blob_to_the_later_event(make):
    bench = make()
    bench.send(inline("img", 7), offset=3)
    bench.until_idle()
    bench.send(inline("img", 7), offset=9)

    bench.until_idle()

    (blob,) = bench.store.get_many([blob_key("m1", "img")])
    assert position_of(blob).offset == 9
    assert bench.store.shade("img") == 7.0
    assert bench.engine.batches == [1]


def test_other_content_under_the_same_id_replaces_it(make):
    bench = make()
    bench.send(inline("img", 7))
    bench.until_idle()
    bench.send(inline("img", 8))

    bench.until_idle()

    assert bench.store.shade("img") == 8.0
    assert not bench.indexed()["img"].skipped


def test_images_that_wait_for_the_store_share_look_ups_of_bounded_size(make):
    bench = make()
    bench.store.gate.clear()
    for number in range(80):
        bench.send(inline(f"img-{number}", number))
    bench.until(lambda: bench.store.calls != [] and bench.store.calls[0][1] + len(bench.job._to_look_up) == 80)

    bench.store.gate.set()
    bench.until_idle()

    sizes = [size for call, size in bench.store.calls if call == "get"]
    assert sum(sizes) == 80
    assert max(sizes) <= 64
    assert len(sizes) <= 3


def blob_of(shade: int, **other: Any) -> bytes:
    """What ingesting a picture stores; in another layout, where one is named."""
    tokens = np.full((2, 4), shade, np.float32)
    return encode_blob(replace(LAYOUT, **other), tokens, hashlib.sha256(picture(shade)).digest())


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\x88garbage",
        blob_of(7)[:-1] + b"\x01",  # a flipped byte behind the head
        blob_of(7)[:-1],
        blob_of(7, storage="int8"),
        blob_of(7, model_digest="m0"),
    ],
    ids=["empty", "garbage", "flipped byte", "truncated", "other storage type", "other model"],
)
def test_a_blob_that_is_of_no_use_is_replaced_when_its_image_is_published_again(make, stored):
    bench = make()
    bench.store.put_many({blob_key("m1", "img"): stored})
    bench.send(inline("img", 7))

    bench.until_idle()

    (blob,) = bench.store.get_many([blob_key("m1", "img")])
    assert with_position(blob, SourcePosition()) == blob_of(7)
    assert not bench.indexed()["img"].skipped


def test_a_later_event_of_an_image_does_not_wait_for_an_earlier_one_and_wins(make):
    bench = make()
    bench.web.gates["https://h/slow"] = threading.Event()
    bench.web.pages["https://h/slow"] = [picture(1)]
    bench.send(at("img", "https://h/slow"))
    bench.send(inline("img", 2))
    bench.until(lambda: "img" in bench.indexed())

    bench.web.gates["https://h/slow"].set()
    bench.until_idle()

    assert bench.store.shade("img") == 2.0
    assert [(done.record.offset, len(done.messages)) for done in bench.finished] == [(1, 1), (0, 0)]
    assert bench.engine.batches == [1]  # the earlier one was not even encoded
    assert bench.metrics.events["superseded"]._value.get() == 1


def test_of_two_events_of_one_image_in_a_batch_the_later_one_wins(make):
    bench = make(max_wait_s=GIVE_UP_S)
    for shade in (1, 2, 3):
        bench.send(inline("img", shade))
    bench.send(inline("other", 4))

    bench.until_idle()

    assert bench.store.shade("img") == 3.0
    assert bench.store.shade("other") == 4.0
    assert len(bench.finished) == 4


@pytest.mark.parametrize("event", ["image", "removal"])
def test_an_event_that_a_later_one_has_superseded_publishes_nothing(make, event):
    bench = make()
    bench.send(inline("img", 2), offset=20)
    bench.until_idle()
    bench.finished.clear()

    bench.send(inline("img", 1), offset=10) if event == "image" else bench.remove("img", offset=10)
    bench.until_idle()

    assert bench.store.shade("img") == 2.0
    assert [done.messages for done in bench.finished] == [()]


# --- removal ---


def test_a_null_value_removes_the_image_and_publishes_a_tombstone(make):
    bench = make(thumbnails=True)
    bench.send(inline("img", 7))
    bench.send(inline("other", 8))
    bench.until_idle()
    record = bench.remove("img")

    bench.until_idle()

    (message,) = next(done for done in bench.finished if done.record is record).messages
    assert (message.topic, message.key, message.value) == ("images.indexed", b"img", None)
    assert "content-type" not in dict(message.headers)
    assert trace_id_of(message.headers) == "a" * 32
    blob, thumbnail = bench.store.get_many([blob_key("m1", "img"), thumbnail_key("img")])
    assert is_removal_marker(blob)
    assert thumbnail_of(thumbnail) is None
    assert bench.store.shade("other") == 8.0
    assert bench.metrics.events["removed"]._value.get() == 1


def test_an_image_that_was_never_stored_can_be_removed(make):
    bench = make()
    bench.remove("img")

    bench.until_idle()

    assert bench.tombstones() == [b"img"]


def test_an_image_in_work_is_not_stored_after_its_removal(make):
    bench = make()
    bench.web.gates["https://h/slow"] = threading.Event()
    bench.web.pages["https://h/slow"] = [picture(1)]
    bench.send(at("img", "https://h/slow"))
    bench.remove("img")
    bench.until(lambda: bench.tombstones() == [b"img"])

    bench.web.gates["https://h/slow"].set()
    bench.until_idle()

    assert bench.store.shade("img") is None
    assert bench.indexed() == {}


def test_an_image_published_after_its_removal_is_stored(make):
    bench = make()
    bench.remove("img")
    bench.send(inline("img", 3))

    bench.until_idle()

    assert bench.store.shade("img") == 3.0


@pytest.mark.parametrize("key", [None, b"", b"\xff", b"a\nb", b"x" * 300])
def test_a_null_value_without_an_image_id_as_its_key_is_a_dead_letter_with_a_null_value(make, key):
    bench = make()
    bench.accept(PARTITION, key, None, ())
    bench.send(inline("good", 5))

    bench.until_idle()

    (letter,) = bench.dead_letters()
    assert (letter.error_code, letter.value, letter.key) == ("invalid_event", None, key)
    assert bench.store.shade("good") == 5.0


def test_many_removals_are_written_together(make):
    bench = make()
    bench.store.write_gate.clear()
    for number in range(50):
        bench.remove(f"img-{number}")
    bench.until(lambda: bench.store.calls != [])
    bench.store.write_gate.set()

    bench.until_idle()

    assert len(bench.tombstones()) == 50
    assert len(bench.store.calls) <= 3


# --- thumbnails ---


def test_a_thumbnail_is_stored_beside_the_blob(make):
    bench = make(thumbnails=True)
    bench.send(inline("img", 7), offset=4)

    bench.until_idle()

    (value,) = bench.store.get_many([thumbnail_key("img")])
    assert thumbnail_of(value).startswith(b"RIFF")
    assert position_of(value).offset == 4


def test_a_missing_thumbnail_of_a_stored_image_is_made_without_the_engine(make):
    bench = make()
    bench.send(inline("img", 7))
    bench.until_idle()
    later = make(thumbnails=True, store=bench.store)
    later.send(inline("img", 7))
    later.send(inline("img", 7))

    later.until_idle()

    (value,) = bench.store.get_many([thumbnail_key("img")])
    assert thumbnail_of(value) is not None
    assert later.engine.batches == []
    assert later.indexed()["img"].skipped


# --- what cannot succeed ---


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (b"not json", "undecodable"),
        (b'{"schema_version": 2, "image_id": "a", "uri": "https://h/"}', "unsupported_version"),
        (b'{"schema_version": 1, "image_id": "a"}', "invalid_event"),
        (ImageNew(image_id="a", data=b"no image"), "not_an_image"),
        (ImageNew(image_id="a", data=picture(3)[:-30]), "image_truncated"),
        (ImageNew(image_id="a", data=b"x" * 1001), "image_too_large"),
        (inline("a", 255), "tokens_unusable"),
    ],
)
def test_a_bad_event_becomes_a_dead_letter_and_the_work_goes_on(make, event, code):
    bench = make()
    record = bench.send(event)
    bench.send(inline("good", 5))

    bench.until_idle()

    (letter,) = bench.dead_letters()
    assert letter.error_code == code
    assert (letter.topic, letter.partition, letter.offset) == ("images.new", 0, 0)
    assert (letter.value, letter.key, letter.headers) == (record.value, b"key", record.headers)
    assert letter.attempts == 1
    assert bench.store.shade("good") == 5.0
    assert bench.store.shade("a") is None
    assert bench.metrics.dead_letters[code]._value.get() == 1


def test_tokens_that_are_not_finite_refuse_their_image_alone(make):
    bench = make(max_wait_s=GIVE_UP_S)
    for number, shade in enumerate((10, 255, 20, 30)):
        bench.send(inline(f"img-{number}", shade))

    bench.until_idle()

    assert len(bench.dead_letters()) == 1
    assert set(bench.indexed()) == {"img-0", "img-2", "img-3"}
    assert bench.store.shade("img-2") == 20.0


def test_a_dead_letter_too_large_for_the_broker_can_be_shortened(make):
    bench = make()
    bench.send(b"x" * 5_000)

    bench.turn()

    (message,) = bench.finished[0].messages
    short = message.instead(TooLarge("no"))
    assert len(short.value) < 2_000
    assert DeadLetter.from_message(short.key, short.value, short.headers).truncated
    assert message.instead(TopicRefused("gone")) is None


def test_an_address_that_may_not_be_read_is_not_tried_again(make):
    bench = make()
    bench.web.pages["file:///etc/passwd"] = [Poison("uri_not_allowed", "no")]
    bench.send(at("img", "file:///etc/passwd"))

    bench.until_idle()

    (letter,) = bench.dead_letters()
    assert (letter.error_class, letter.error_code, letter.attempts) == ("Poison", "uri_not_allowed", 1)


def test_a_server_that_fails_is_tried_again(make):
    bench = make()
    bench.web.pages["https://h/a"] = [Transient("500"), Transient("500"), picture(4)]
    bench.send(at("img", "https://h/a"))

    bench.until_idle()

    assert bench.store.shade("img") == 4.0
    assert bench.metrics.retries["image_fetch"]._value.get() == 2


def test_a_server_that_keeps_failing_becomes_a_dead_letter_with_the_number_of_attempts(make):
    bench = make(retry_for_s=0.2)
    bench.web.pages["https://h/a"] = [Transient("HTTP status 503")]
    bench.send(at("img", "https://h/a"))

    bench.until_idle()

    (letter,) = bench.dead_letters()
    assert (letter.error_class, letter.error_code) == ("Transient", "image_unavailable")
    assert letter.attempts > 1
    assert "503" in letter.message


@pytest.mark.parametrize(
    "uri", ["http://images..example.com/a.jpg", "ftp://h/a", "data:image/png;base64,AAAA", "http://[::g]/"]
)
def test_a_malformed_address_is_refused_at_once_and_the_next_image_is_indexed(make, uri):
    bench = make()
    bench.send(at("img", uri))
    bench.send(inline("good", 5))

    bench.until_idle()

    (letter,) = bench.dead_letters()
    assert letter.error_code in ("uri_invalid", "uri_not_allowed")
    assert bench.store.shade("good") == 5.0
    assert bench.job._num_in_work == 0


def test_images_on_a_host_that_is_down_do_not_take_the_room_of_others(make):
    bench = make(replace(LIMITS, max_inflight_images=5))
    bench.web.pages["https://down/a"] = [Transient("refused")]
    for number in range(200):
        assert bench.job.has_room()
        bench.send(at(f"down-{number}", "https://down/a"))
        bench.turn()
    bench.send(inline("good", 5))

    bench.until(lambda: "good" in bench.indexed())

    assert bench.job.num_active() == 200


# --- what is away or broken ---


def test_a_store_that_is_away_loses_nothing(make):
    bench = make()
    bench.store.times_away = 2
    bench.send(inline("img", 7))
    bench.until(lambda: "put" in [call for call, _ in bench.store.calls] or bench.job.num_active() == 0)
    bench.store.times_away = 2
    bench.send(inline("later", 8))

    bench.until_idle()

    assert bench.store.shade("img") == 7.0
    assert bench.store.shade("later") == 8.0
    assert bench.dead_letters() == []
    assert len(bench.retried) == 4
    assert set(bench.retried) <= {"store_read", "store_write"}


def test_a_broken_engine_ends_the_job(make):
    bench = make()
    bench.engine.error = EngineBroken("out of memory")
    bench.send(inline("img", 7))

    with pytest.raises(EngineBroken):
        bench.until_idle()


@pytest.mark.parametrize("where", ["fetch", "digest", "get_many", "decode", "put_many", "remove"])
def test_an_unexpected_error_on_any_thread_is_a_fault_of_its_image_alone(make, monkeypatch, where):
    bench = make()
    bench.web.pages["https://h/bad"] = [ZeroDivisionError("fetch") if where == "fetch" else picture(66)]
    for number in range(6):
        bench.send(inline(f"good-{number}", number))
    if where in ("get_many", "put_many", "remove"):
        method = getattr(bench.store, "get_many" if where == "get_many" else "put_many")
        bad = blob_key("m1", "bad")

        def broken(keys: Any, **options: Any) -> Any:
            if bad in keys:
                raise ZeroDivisionError(where)
            return method(keys, **options)

        monkeypatch.setattr(bench.store, method.__name__, broken)
    elif where == "digest":
        monkeypatch.setattr("workers.ingest.stages.hashlib.sha256", failing_for(picture(66), hashlib.sha256))
    elif where == "decode":
        import workers.ingest.stages as stages

        monkeypatch.setattr(stages, "open_image", failing_for(picture(66), stages.open_image))
    if where == "remove":
        bench.remove("gone-0")
        bench.remove("bad")
        bench.remove("gone-1")
    else:
        bench.send(at("bad", "https://h/bad"))

    bench.until_idle()

    (letter,) = bench.dead_letters()
    assert (letter.error_code, letter.error_class) == ("internal_error", "ZeroDivisionError")
    assert len(bench.indexed()) == 6
    assert len(bench.tombstones()) == (2 if where == "remove" else 0)
    assert (bench.job._num_bytes, bench.job._num_in_work, bench.job._num_preparing) == (0, 0, 0)


def test_an_outcome_that_cannot_be_written_is_a_fault_of_its_image_alone(make, monkeypatch):
    bench = make()
    indexed = bench.job._outcomes.indexed

    def broken(image: Any, now: float) -> Finished:
        if image.image_id == "bad":
            raise ValueError("more values than an event may hold")
        return indexed(image, now)

    monkeypatch.setattr(bench.job._outcomes, "indexed", broken)
    bench.send(inline("bad", 1))
    bench.send(inline("good", 2))

    bench.until_idle()

    assert [letter.error_code for letter in bench.dead_letters()] == ["internal_error"]
    assert set(bench.indexed()) == {"good"}


def test_the_loop_does_not_spin_while_a_due_fetch_has_no_room(make):
    bench = make(replace(LIMITS, max_inflight_bytes=1_000))
    bench.web.pages["https://h/a"] = [Transient("refused")]
    bench.web.gates["https://slow/a"] = threading.Event()
    bench.web.pages["https://slow/a"] = [picture(1)]
    bench.send(at("failing", "https://h/a"))
    bench.until(lambda: bench.metrics.retries["image_fetch"]._value.get() >= 1)
    bench.send(at("slow", "https://slow/a"))
    bench.until(lambda: bench.web.num_open == 1 and bench.job._fetching.num_fetching() == 1)

    if bench.job._fetching.num_waiting():
        assert bench.job.wants_turn_in_s(time.monotonic() + 60.0) is None


def failing_for(bad: bytes, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(data: bytes, *args: Any, **options: Any) -> Any:
        if data == bad:
            raise ZeroDivisionError
        return function(data, *args, **options)

    return call


def test_an_engine_of_another_model_or_shape_refuses_to_start(make):
    with pytest.raises(Misconfigured, match="m2"):
        make(layout=replace(LAYOUT, model_digest="m2"))
    with pytest.raises(Misconfigured, match="num_tokens=3"):
        make(layout=replace(LAYOUT, num_tokens=3))


# --- bounds ---


def test_there_is_no_room_beyond_the_images_in_work(make):
    bench = make(replace(LIMITS, max_inflight_images=2))
    bench.engine.gate.clear()
    bench.send(inline("a", 1))
    assert bench.job.has_room()

    bench.send(inline("b", 2))

    assert not bench.job.has_room()
    bench.engine.gate.set()
    bench.until_idle()
    assert bench.job.has_room()


def test_there_is_no_room_beyond_the_bytes_in_work(make):
    bench = make(replace(LIMITS, max_inflight_bytes=1000))
    bench.engine.gate.clear()
    while bench.job.has_room():
        bench.send(inline(f"img-{bench.num_records}", bench.num_records))
    assert 1 < bench.num_records < 10

    bench.engine.gate.set()
    bench.until_idle()

    assert bench.job.has_room()
    assert bench.job._num_bytes == 0


def test_each_fetch_reserves_memory_for_the_largest_image(make):
    bench = make(replace(LIMITS, max_inflight_bytes=3_200))
    for number in range(8):
        bench.web.pages[f"https://h/{number}"] = [picture(number)]
        bench.send(at(f"img-{number}", f"https://h/{number}"))

    bench.until_idle()

    assert len(bench.indexed()) == 8
    assert bench.web.most_open <= 2  # two images of 1,000 bytes fit beside the events


def test_limits_that_can_hold_no_image_refuse_to_start():
    with pytest.raises(Misconfigured):
        replace(LIMITS, max_inflight_bytes=999)


# --- partitions that leave ---


def test_a_dropped_partition_has_no_outcomes(make):
    bench, other = make(), Partition("images.new", 1)
    bench.engine.gate.clear()
    bench.send(inline("gone", 1))
    bench.send(inline("stays", 2), partition=other)
    bench.send(b"not json")
    bench.until(lambda: bench.engine.entered.is_set())
    bench.finished.clear()

    bench.job.drop({PARTITION})

    assert bench.job.num_active() == 1
    bench.engine.gate.set()
    bench.until_idle()
    assert [done.record.partition for done in bench.finished] == [other]


def test_finished_outcomes_of_a_dropped_partition_are_dropped_too(make):
    bench = make()
    bench.send(b"not json")

    bench.job.drop({PARTITION})

    assert bench.job.turn(0.0) == []


def test_nothing_of_a_dropped_partition_is_written_any_more(make):
    bench = make()
    bench.engine.gate.clear()
    bench.send(inline("img", 1))
    bench.until(lambda: bench.engine.entered.is_set())

    bench.job.drop({PARTITION})
    bench.engine.gate.set()
    bench.until(lambda: bench.job._num_in_work == 0)

    assert bench.store.shade("img") is None
    assert bench.finished == []


def test_an_image_that_waits_for_the_store_when_its_partition_leaves_is_not_written(make):
    bench = make()
    bench.store.away = True
    bench.store.gate.clear()
    bench.send(inline("img", 1))
    bench.until(lambda: bench.store.calls != [])
    bench.store.away = False
    bench.engine.gate.clear()
    bench.store.gate.set()
    bench.until(lambda: bench.engine.entered.is_set())
    bench.store.away = True
    bench.engine.gate.set()
    bench.until(lambda: "put" in [call for call, _ in bench.store.calls])

    bench.job.drop({PARTITION})
    bench.store.away = False
    bench.until(lambda: bench.job._num_in_work == 0)

    assert bench.store.shade("img") is None


def test_a_partition_that_comes_back_is_worked_on_while_its_former_work_ends(make):
    bench = make()
    bench.engine.gate.clear()
    bench.send(inline("img", 1))
    bench.until(lambda: bench.engine.entered.is_set())
    bench.job.drop({PARTITION})
    bench.send(inline("img", 2), offset=0)
    assert bench.job.num_active() == 1

    bench.engine.gate.set()
    bench.until_idle()

    assert bench.store.shade("img") == 2.0
    assert len(bench.finished) == 1
    bench.until(lambda: bench.job._num_in_work == 0)
    assert bench.job._num_bytes == 0


def test_a_dropped_partition_leaves_nothing_in_any_queue(make):
    bench = make(max_fetches=1)
    bench.web.gates["https://h/slow"] = threading.Event()
    for uri in ("https://h/slow", "https://h/next"):
        bench.web.pages[uri] = [picture(1)]
    bench.send(at("slow", "https://h/slow"))
    bench.send(at("queued", "https://h/next"))
    bench.send(at("slow", "https://h/next"))
    bench.turn()

    bench.job.drop({PARTITION})
    bench.web.gates["https://h/slow"].set()
    bench.until(lambda: bench.job._num_in_work == 0)

    assert bench.finished == []
    assert bench.engine.batches == []
    assert bench.job._num_bytes == 0


def test_closing_ends_endless_retries(make):
    bench = make()
    bench.store.away = True
    bench.send(inline("img", 1))
    bench.until(lambda: bench.store.calls != [])

    bench.job.close()

    assert bench.store.calls  # and the threads have ended: `close` waits for them
    assert bench.finished == []


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_of_events_each_has_one_outcome_and_the_last_content_stays(make, seed):
    rng = np.random.default_rng(seed)
    bench = make(replace(LIMITS, max_inflight_images=30, max_inflight_bytes=6_000))
    last: dict[str, float | None] = {}
    for number in range(150):
        bench.until(bench.job.has_room)
        image_id, shade = f"img-{rng.integers(8)}", int(rng.integers(250))
        kind = rng.integers(5)
        if kind == 0:
            bench.send(b"not json")
            continue
        if kind == 4:
            bench.remove(image_id)
            last[image_id] = None
            continue
        last[image_id] = float(shade)
        if kind == 1:
            bench.web.pages[f"https://h/{number}"] = [picture(shade)]
            bench.send(at(image_id, f"https://h/{number}"))
        else:
            bench.send(inline(image_id, shade))

    bench.until_idle()

    assert sorted(done.record.offset for done in bench.finished) == list(range(150))
    assert {image_id: bench.store.shade(image_id) for image_id in last} == last
    assert (bench.job._num_bytes, bench.job._num_in_work, bench.job._num_preparing) == (0, 0, 0)
