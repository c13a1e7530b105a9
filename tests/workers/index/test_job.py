"""The index job over an in-memory index: events become rows in order, and each event has one outcome."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from protocols.dead_letters import DeadLetter
from protocols.encoding import MSGPACK, encode
from protocols.events import ImageIndexed
from protocols.topics import Topics
from tracing_harness import Recorded
from workers.dead_letters import DeadLetters
from workers.errors import Misconfigured, Poison, Transient
from workers.index.job import IndexJob
from workers.index.memory import MemoryIndex
from workers.index.port import ImageRow
from workers.index.spans import IndexSpans
from workers.index.vectors import VectorModel
from workers.index.writer import MARKER_CLEANING_S, IndexWriter
from workers.metrics import Metrics
from workers.ports import Finished, Partition, Record
from workers.retrying import Retry
from workers.telemetry.bus_spans import BusSpans

PARTITION, OTHER = Partition("images.indexed", 0), Partition("images.indexed", 1)
TRACEPARENT = ("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01")
GIVE_UP_S = 20.0
SHA = "a" * 64


class FirstStage:
    """Vectors of two values: the pooled embedding's first two, normalised."""

    dim = 2

    def image_vectors(self, pooled: np.ndarray) -> np.ndarray:
        assert pooled.shape[1] == 3
        return pooled[:, :2] / np.linalg.norm(pooled[:, :2], axis=1, keepdims=True)


class Index(MemoryIndex):
    """Counts its writes; can stand still, and refuses the image `poison`."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.times_away = 0
        self.error: Exception | None = None

    def apply(self, changes):
        self.batches.append([change.image_id for change in changes])
        self.entered.set()
        assert self.gate.wait(GIVE_UP_S)
        if self.error is not None:
            raise self.error
        if self.times_away:
            self.times_away -= 1
            raise Transient("away")
        if any(change.image_id == "poison" for change in changes):
            raise Poison("not_indexable", "cannot be held")
        return super().apply(changes)


@dataclass
class Bench:
    job: IndexJob
    index: Index
    metrics: Metrics
    woken: threading.Event
    recorded: Recorded
    retried: list[str]
    num_records: int = 0
    finished: list[Finished] = field(default_factory=list)

    def send(self, value: bytes | None, key: str = "key", partition: Partition = PARTITION, msgpack=False) -> Record:
        headers = (TRACEPARENT, *((("content-type", MSGPACK.encode()),) if msgpack else ()))
        record = Record(partition, self.num_records, key.encode(), value, headers, 1_000 + self.num_records)
        self.num_records += 1
        self.job.accept(record, time.monotonic())
        return record

    def image(self, image_id: str, *pooled: float, msgpack=False, partition=PARTITION, **fields: object) -> Record:
        event = ImageIndexed(
            **{
                "image_id": image_id,
                "model": "m1",
                "num_tokens": 2,
                "dtype": "int8",
                "num_bytes": 100,
                "content_sha256": SHA,
                "embedding": list(pooled) or None,
            }
            | fields
        )
        return self.send(encode(event, MSGPACK if msgpack else "application/json"), image_id, partition, msgpack)

    def turn(self) -> None:
        self.finished += self.job.turn(time.monotonic())

    def until(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + GIVE_UP_S
        self.turn()
        while not happened():
            assert self.woken.wait(end - time.monotonic()), "it does not happen"
            self.woken.clear()
            self.turn()

    def until_idle(self) -> list[Finished]:
        self.until(lambda: self.job.num_active() == 0)
        return self.finished

    def ids(self, *towards: float) -> list[str]:
        found = self.index.nearest(np.array(towards, np.float32), 100, {})
        return [neighbour.image_id for neighbour in found]

    def outcomes(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("edje_events_total", {"outcome": outcome}) or 0.0

    def dead_letters(self) -> list[DeadLetter]:
        messages = [message for done in self.finished for message in done.messages]
        assert {message.topic for message in messages} <= {"images.indexed.dlq"}
        return [DeadLetter.from_message(message.key, message.value, message.headers) for message in messages]


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def build(max_batch_images: int = 100, max_inflight_images: int = 1_000, **writer_options: object) -> Bench:
        index, metrics, woken, recorded = Index(), Metrics(), threading.Event(), Recorded()
        retried: list[str] = []
        tracer = recorded.tracer(time.monotonic)
        writer = IndexWriter(
            index,
            VectorModel("m1", 3, FirstStage(), None),
            Retry(on_retry=lambda: retried.append("index_write")),
            **writer_options,
        )
        job = IndexJob(
            writer=writer,
            dead_letters=DeadLetters(Topics().dead_letter, 2_000, metrics),
            max_batch_images=max_batch_images,
            max_inflight_images=max_inflight_images,
            wake=woken.set,
            metrics=metrics,
            spans=IndexSpans(tracer, BusSpans(tracer, topic="images.indexed", group_id="g")),
        )
        benches.append(Bench(job, index, metrics, woken, recorded, retried))
        return benches[-1]

    yield build
    for bench in benches:
        bench.index.gate.set()
        bench.job.close()


@pytest.mark.parametrize("msgpack", [False, True])
def test_an_indexed_image_is_a_row_with_the_vector_of_its_embedding(make, msgpack):
    bench = make()
    record = bench.image("img", 3.0, 4.0, 9.0, msgpack=msgpack, metadata={"place": "sea"})

    (finished,) = bench.until_idle()

    assert finished.record is record
    assert finished.messages == ()
    [neighbour] = bench.index.nearest(np.array([0.6, 0.8], np.float32), 1, {})
    assert neighbour.score == pytest.approx(1.0)
    assert neighbour.metadata == {"place": "sea"}
    assert bench.outcomes("ok") == 1


def test_events_that_arrive_during_a_write_make_the_next_batch(make):
    bench = make()
    bench.index.gate.clear()
    bench.image("a", 1.0, 0.0, 0.0)
    bench.turn()
    assert bench.index.entered.wait(GIVE_UP_S)
    for name in "bcd":
        bench.image(name, 1.0, 0.0, 0.0)
    bench.turn()

    bench.index.gate.set()
    bench.until_idle()

    assert bench.index.batches == [["a"], ["b", "c", "d"]]


def test_a_batch_has_a_largest_size(make):
    bench = make(max_batch_images=2)
    for name in "abcde":
        bench.image(name, 1.0, 0.0, 0.0)

    bench.until_idle()

    assert [len(batch) for batch in bench.index.batches] == [2, 2, 1]


def test_of_an_images_events_in_one_batch_the_last_is_written_and_all_are_finished(make):
    bench = make()
    bench.image("a", 1.0, 0.0, 0.0, metadata={"name": "first"})
    bench.image("b", 1.0, 0.0, 0.0)
    bench.image("a", 0.0, 1.0, 0.0, metadata={"name": "second"})

    assert len(bench.until_idle()) == 3

    assert bench.index.batches == [["b", "a"]]
    assert bench.index.find(["a"])[0].metadata == {"name": "second"}


def test_a_tombstone_removes_the_row(make):
    bench = make()
    bench.image("a", 1.0, 0.0, 0.0)
    bench.until_idle()

    bench.send(None, "a")
    bench.until_idle()

    assert bench.index.count() == 0
    assert bench.outcomes("ok") == 2


def test_a_removal_and_a_new_image_in_one_batch_end_as_they_came(make):
    bench = make()
    bench.image("a", 1.0, 0.0, 0.0)
    bench.send(None, "a")
    bench.send(None, "b")
    bench.image("b", 1.0, 0.0, 0.0)

    bench.until_idle()

    assert bench.ids(1.0, 0.0) == ["b"]


def test_an_event_of_another_model_is_skipped(make):
    bench = make()
    bench.image("a", 1.0, 2.0, model="m2")

    (finished,) = bench.until_idle()

    assert finished.messages == ()
    assert bench.outcomes("skipped") == 1
    assert bench.index.batches == []


def test_an_image_without_an_embedding_keeps_its_vector_and_gets_its_new_metadata(make):
    bench = make()
    bench.image("a", 1.0, 0.0, 0.0)
    bench.until_idle()

    bench.image("a", skipped=True, metadata={"name": "new"})
    bench.until_idle()

    assert bench.index.find(["a"])[0].metadata == {"name": "new"}
    assert bench.outcomes("skipped") == 0


def test_an_image_that_never_had_an_embedding_is_skipped_counted_and_logged_once(make, caplog):
    bench = make()
    bench.image("a", skipped=True)
    bench.until_idle()
    bench.image("b", skipped=True)
    bench.until_idle()

    assert bench.outcomes("skipped") == 2
    assert bench.metrics.registry.get_sample_value("edje_index_without_vector_total") == 2


@pytest.mark.parametrize(
    ("value", "code"),
    [(b"not json", "undecodable"), (b"", "undecodable"), (b"{}", "invalid_event")],
)
def test_a_record_that_is_no_event_is_dead_lettered(make, value, code):
    bench = make()
    bench.send(value)

    bench.until_idle()

    [letter] = bench.dead_letters()
    assert (letter.error_code, letter.value) == (code, value)
    assert bench.outcomes("dead_letter") == 1


def test_an_embedding_of_another_width_is_dead_lettered(make):
    bench = make()
    bench.image("a", 1.0, 2.0)

    bench.until_idle()

    assert [letter.error_code for letter in bench.dead_letters()] == ["embedding_mismatch"]


@pytest.mark.parametrize("key", [b"", b"\xff", b"x" * 300])
def test_a_tombstone_whose_key_is_no_image_id_is_dead_lettered(make, key):
    bench = make()
    bench.job.accept(Record(PARTITION, 0, key, None, (), 0), 0.0)

    bench.until_idle()

    [letter] = bench.dead_letters()
    assert (letter.error_code, letter.value) == ("invalid_event", None)


def test_a_row_that_the_database_cannot_hold_is_dead_lettered_alone(make):
    bench = make()
    names = ["a", "b", "poison", "c", "d"]
    for name in names:
        bench.image(name, 1.0, 0.0, 0.0)

    bench.until_idle()

    assert [letter.error_code for letter in bench.dead_letters()] == ["not_indexable"]
    assert bench.ids(1.0, 0.0) == ["a", "b", "c", "d"]
    assert bench.outcomes("ok") == 4


def test_a_database_that_is_away_is_tried_again_until_it_is_back(make):
    bench = make()
    bench.index.times_away = 3
    bench.image("a", 1.0, 0.0, 0.0)

    bench.until_idle()

    assert bench.retried == ["index_write"] * 3
    assert bench.index.count() == 1


def test_a_refused_access_ends_the_worker(make):
    bench = make()
    bench.index.error = Misconfigured("no permission")
    bench.image("a", 1.0, 0.0, 0.0)

    with pytest.raises(Misconfigured):
        bench.until_idle()


def test_a_full_job_has_no_room_until_a_write_has_ended(make):
    bench = make(max_batch_images=2, max_inflight_images=2)
    bench.index.gate.clear()
    bench.image("a", 1.0, 0.0, 0.0)
    assert bench.job.has_room()
    bench.image("b", 1.0, 0.0, 0.0)

    assert not bench.job.has_room()
    bench.index.gate.set()
    bench.until_idle()

    assert bench.job.has_room()


def test_dropped_events_have_no_outcome(make):
    bench = make()
    bench.index.gate.clear()
    bench.image("a", 1.0, 0.0, 0.0)
    bench.turn()
    assert bench.index.entered.wait(GIVE_UP_S)
    bench.image("b", 1.0, 0.0, 0.0)
    bench.image("c", 1.0, 0.0, 0.0, partition=OTHER)

    bench.job.drop({PARTITION})
    bench.index.gate.set()
    bench.until_idle()

    assert [done.record.partition for done in bench.finished] == [OTHER]


def test_an_event_that_the_loop_refuses_is_dead_lettered_once(make):
    bench = make()
    bench.index.gate.clear()
    bench.image("a", 1.0, 0.0, 0.0)
    bench.turn()
    record = bench.image("b", 1.0, 0.0, 0.0)

    bench.job.refuse(record, Poison("internal_error", "unexpected"), 0.0)
    bench.index.gate.set()
    bench.until_idle()

    assert [letter.error_code for letter in bench.dead_letters()] == ["internal_error"]
    assert len(bench.finished) == 2


def test_closing_gives_up_a_database_that_is_away(make):
    bench = make()
    bench.index.times_away = 10**9
    bench.image("a", 1.0, 0.0, 0.0)
    bench.turn()
    assert bench.index.entered.wait(GIVE_UP_S)

    bench.job.close()

    assert bench.job.num_active() == 1


def test_markers_of_removed_images_are_deleted_every_hour(make):
    now, deleted = [0.0], []

    def delete() -> int:
        deleted.append(now[0])
        return 1

    bench = make(delete_markers=delete, clock=lambda: now[0])
    for at in (1.0, MARKER_CLEANING_S, MARKER_CLEANING_S + 1):
        now[0] = at
        bench.send(None, "a")
        bench.until_idle()

    assert deleted == [MARKER_CLEANING_S]


def test_a_sampled_event_has_its_span_with_the_write_linked_to_it(make):
    bench = make()
    bench.image("a", 1.0, 0.0, 0.0)
    bench.until_idle()

    process, write = bench.recorded.one("process images.indexed"), bench.recorded.one("index write")
    assert [link.context.span_id for link in write.links] == [process.context.span_id]
    assert process.attributes["messaging.message.conversation_id"] == "a"
    assert "write" in [span.name for span in bench.recorded.under(process)]


def test_rows_are_of_the_event_that_they_come_from(make):
    bench = make()
    record = bench.image("a", 1.0, 0.0, 0.0)
    bench.until_idle()

    row = bench.index._rows["a"]
    assert isinstance(row, ImageRow)
    assert row.position == (record.offset, record.timestamp_ms)
    assert row.content_sha256 == SHA
