"""Micro-batches as the engine sees them, their logits, and the estimate of waiting work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest

from rerank_harness import PARTITION, Engine, HandExecutor, Rig, encode_text, image_request, logit_of, request
from trt.contract import EngineBroken, LimitExceeded
from workers.landing import Landing
from workers.ports import Record
from workers.rerank.request import Piece, Request, piece_of
from workers.rerank.scoring import (
    HALF_LIFE_BUSY_S,
    HALF_LIFE_REQUESTS,
    MAX_BATCHES,
    Backlog,
    BatchScorer,
    ScoredBatch,
    batch_arrays,
)
from workers.telemetry.tracer import Tracer


def request_of(sent: dict, *, first_stage: list[float] | None = None) -> Request:
    """The request, read and with the ids of its texts."""
    record = Record(PARTITION, 0, None, b"", (), 0)
    made = Request(record, Tracer.off().begin(()), 0.0, "application/json", "replies")
    images = [candidate.get("image_id") for candidate in sent["candidates"]]
    texts = [candidate.get("text") for candidate in sent["candidates"]]
    made.texts = [sent["query"]["text"]] if "text" in sent["query"] else texts
    made.images = images if "text" in sent["query"] else [sent["query"]["image_id"]]
    made.num_pairs = len(sent["candidates"])
    made.text_ids = [encode_text(text) for text in made.texts]
    made.first_stage = None if first_stage is None else np.float32(first_stage)
    return made


def ready(owner: Request, pairs: list[int], slots: list[int]) -> Piece:
    piece = piece_of(owner, np.int32(pairs), 8, 2)
    piece.slots = np.int32(slots)
    return piece


class Scoring:
    """A scorer whose batches run when the test calls for it."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.executor, self.woken = HandExecutor(), []
        self.landing = Landing(lambda: self.woken.append(None))
        self.scorer = BatchScorer(engine, executor=self.executor, landing=self.landing, clock=clock)

    def take(self) -> list[ScoredBatch]:
        self.landing.turn()
        return self.scorer.take_scored()


def test_a_text_is_given_to_the_engine_once_however_many_pieces_ask_for_it():
    first, second = request_of(request("abcd")), request_of(request("xy", text="a cat"))

    texts, queries, slots = batch_arrays(
        [ready(first, [0, 1], [5, 6]), ready(second, [0, 1], [7, 8]), ready(first, [3], [9])]
    )

    assert texts == [encode_text("a dog"), encode_text("a cat")]
    assert queries.tolist() == [0, 0, 1, 1, 0]
    assert slots.tolist() == [5, 6, 7, 8, 9]
    assert queries.dtype == slots.dtype == np.int32


def test_only_the_texts_of_the_pairs_in_the_batch_are_given_to_the_engine():
    owner = request_of(image_request("a", ["one", "two", "three", "four"]))

    texts, queries, slots = batch_arrays([ready(owner, [3, 1], [5]), ready(owner, [2], [5])])

    assert texts == [encode_text("four"), encode_text("two"), encode_text("three")]
    assert queries.tolist() == [0, 1, 2]
    assert slots.tolist() == [5, 5, 5]


def test_logits_come_back_in_the_order_of_the_pieces():
    engine = Engine(num_slots=10, max_pairs=8)
    engine.slab.tokens.view(np.float16)[:] = np.arange(10)[:, None]
    times = iter([1.0, 1.125, 1.25])
    scoring = Scoring(engine, lambda: next(times))
    pieces = [ready(request_of(request("ab")), [0, 1], [4, 2]), ready(request_of(request("a", text="cat")), [0], [9])]
    scoring.scorer.submit(pieces)

    assert scoring.take() == []
    scoring.executor.run_next()

    (batch,) = scoring.take()
    dog, cat = encode_text("a dog"), encode_text("cat")
    assert batch.logits.tolist() == [logit_of(dog, 4), logit_of(dog, 2), logit_of(cat, 9)]
    assert (batch.pieces, batch.num_tokens, batch.interval.seconds) == (pieces, 30, 0.25)
    assert batch.encoding.seconds == batch.scoring.seconds == 0.125
    assert len(scoring.woken) == 1
    assert scoring.take() == []


def test_no_more_batches_are_taken_than_keep_the_engine_busy():
    scoring = Scoring(Engine(num_slots=10, max_pairs=8))
    for number in range(MAX_BATCHES):
        assert scoring.scorer.has_room()
        scoring.scorer.submit([ready(request_of(request("a")), [0], [number])])

    assert not scoring.scorer.has_room()
    scoring.executor.run_next()
    scoring.take()
    assert scoring.scorer.has_room()


@pytest.mark.parametrize("error", [EngineBroken("out of memory"), LimitExceeded("too many"), ValueError("a bug")])
def test_an_exception_of_the_engine_is_raised_on_the_loops_thread(error):
    engine = Engine(num_slots=10, max_pairs=8)
    engine.error = error
    scoring = Scoring(engine)
    scoring.scorer.submit([ready(request_of(request("a")), [0], [0])])
    scoring.executor.run_next()

    assert len(scoring.woken) == 1
    with pytest.raises(type(error)):
        scoring.take()


def test_batches_run_on_a_thread_of_their_own_and_wake_the_loop():
    woken = Event()
    landing = Landing(woken.set)
    scorer = BatchScorer(Engine(10, 8), executor=ThreadPoolExecutor(1), landing=landing, clock=lambda: 0.0)
    scorer.submit([ready(request_of(request("a")), [0], [0])])

    assert woken.wait(20)
    scorer.close()
    landing.turn()
    assert len(scorer.take_scored()) == 1


# --- the backlog ------------------------------------------------------------------------------------------------------


def test_nothing_that_waits_is_no_work_whatever_the_rate():
    assert Backlog().seconds(num_tokens=0, lag_events=0) == 0.0


def test_before_anything_was_scored_no_number_is_made_up():
    backlog = Backlog()
    backlog.accepted(1000)

    assert backlog.seconds(num_tokens=1000, lag_events=5) is None


def test_work_is_counted_in_tokens_over_the_rate_of_a_busy_engine():
    backlog = Backlog()
    backlog.accepted(1000)
    backlog.scored(500, busy_s=0.5)

    assert backlog.seconds(num_tokens=2000, lag_events=0) == pytest.approx(2.0)
    assert backlog.seconds(num_tokens=2000, lag_events=3) == pytest.approx(5.0)


def test_what_waits_in_kafka_counts_as_the_mean_of_what_was_seen():
    backlog = Backlog()
    for num_tokens in (100, 300) * HALF_LIFE_REQUESTS:
        backlog.accepted(num_tokens)
    backlog.scored(1000, busy_s=1.0)

    assert backlog.seconds(num_tokens=0, lag_events=10) == pytest.approx(2.0, rel=0.01)


def test_a_rate_that_has_changed_is_followed():
    backlog = Backlog()
    backlog.accepted(1)
    for _ in range(200):
        backlog.scored(100, busy_s=0.1)
    for _ in range(int(20 * HALF_LIFE_BUSY_S)):
        backlog.scored(100, busy_s=1.0)

    assert backlog.seconds(num_tokens=100, lag_events=0) == pytest.approx(1.0, rel=0.01)


def test_the_gauge_is_absent_until_it_is_known_and_follows_the_job():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send(request(["i1"]))
    rig.turn()
    rig.metrics.backlog.value = rig.job.backlog_s(2)
    assert rig.metrics.registry.get_sample_value("edje_backlog_seconds") is None

    rig.job._backlog.scored(10, busy_s=1.0)
    rig.metrics.backlog.value = rig.job.backlog_s(2)
    known = rig.metrics.registry.get_sample_value("edje_backlog_seconds")
    rig.run()
    rig.metrics.backlog.value = rig.job.backlog_s(0)

    assert known == pytest.approx(3.0)  # one request of ten tokens in work and two like it in Kafka
    assert rig.metrics.registry.get_sample_value("edje_backlog_seconds") == 0.0


def test_what_expires_or_goes_to_another_worker_is_no_longer_work():
    rig = Rig()
    rig.store.away = True
    record = rig.send(request(["i1", "i2"]))
    rig.send(request(["i3"], deadline="2027-01-15T08:00:01Z"))
    rig.job.turn(rig.now + 2)
    rig.job.drop({record.partition})

    assert rig.job.backlog_s(0) == 0.0
