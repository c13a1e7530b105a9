"""Micro-batches as the engine sees them, and what comes back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np
import pytest

from rerank_harness import PARTITION, Engine, HandExecutor, encode_text, image_request, logit_of, request
from trt.contract import EngineBroken, LimitExceeded
from workers.ports import Record
from workers.rerank.admission import AdmissionLimits, PieceLayout, admit
from workers.rerank.scoring import MAX_BATCHES, BatchScorer, batch_arrays, first_stage_scores
from workers.rerank.state import ActiveRequest, Piece, ReadyPiece
from workers.telemetry.tracer import Tracer

LIMITS = AdmissionLimits("m1", 1000, 100, 100, 0.0, "replies", (), reads_first_stage=False)
READS_SCORES = replace(LIMITS, reads_first_stage=True)


def active(sent: dict, limits: AdmissionLimits = LIMITS) -> ActiveRequest:
    from protocols.events import RerankRequest

    plan = admit(RerankRequest.model_validate(sent), limits, encode_text, now=0.0, wall_now=0.0)
    record, trace = Record(PARTITION, 0, None, b"", (), 0), Tracer.off().begin(())
    return ActiveRequest.of(record, trace, plan, 0.0, num_tokens=0)


def ready(owner: ActiveRequest, pairs: list[int], slots: list[int]) -> ReadyPiece:
    return ReadyPiece(Piece(owner, PieceLayout(pairs, 8)), pairs, slots, len(pairs), 10)


def scorer_of(engine: Engine, clock=lambda: 0.0) -> tuple[BatchScorer, HandExecutor, list[None]]:
    executor, woken = HandExecutor(), []
    return BatchScorer(engine, executor, lambda: woken.append(None), clock), executor, woken


def test_a_text_is_given_to_the_engine_once_however_many_pieces_ask_for_it():
    first, second = active(request("abcd")), active(request("xy", text="a cat"))

    texts, queries, slots = batch_arrays(
        [ready(first, [0, 1], [5, 6]), ready(second, [0, 1], [7, 8]), ready(first, [3], [9])]
    )

    assert texts == [encode_text("a dog"), encode_text("a cat")]
    assert queries.tolist() == [0, 0, 1, 1, 0]
    assert slots.tolist() == [5, 6, 7, 8, 9]
    assert queries.dtype == slots.dtype == np.int32


def test_only_the_texts_of_the_pairs_in_the_batch_are_given_to_the_engine():
    owner = active(image_request("a", ["one", "two", "three", "four"]))

    texts, queries, slots = batch_arrays([ready(owner, [3, 1], [5, 5]), ready(owner, [2], [5])])

    assert texts == [encode_text("four"), encode_text("two"), encode_text("three")]
    assert queries.tolist() == [0, 1, 2]
    assert slots.tolist() == [5, 5, 5]


def with_scores(sent: dict, *scores: float | None) -> dict:
    candidates = [{**each, "score": score} for each, score in zip(sent["candidates"], scores, strict=True)]
    return {**sent, "candidates": candidates}


def test_each_pair_of_a_batch_has_its_own_first_stage_score():
    first = active(with_scores(request("abcd"), 0.0, 0.25, 0.5, 0.75), READS_SCORES)
    second = active(with_scores(image_request("a", ["x", "y"]), None, 0.125), READS_SCORES)

    scores = first_stage_scores([ready(first, [0, 3], [5, 6]), ready(second, [1, 0], [7, 7]), ready(first, [1], [9])])

    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [0, 0.75, 0.125, np.nan, 0.25])


def test_an_engine_that_does_not_read_the_first_stage_is_given_nothing_of_it():
    engine = Engine(num_slots=10, max_pairs=8)
    scorer, executor, _ = scorer_of(engine)
    scorer.submit([ready(active(with_scores(request("ab"), 0.5, 0.25)), [0, 1], [0, 1])])
    executor.run_next()

    assert engine.first_stage == [None]


def test_logits_come_back_in_the_order_of_the_pieces():
    engine = Engine(num_slots=10, max_pairs=8)
    engine.slab.tokens.view(np.float16)[:] = np.arange(10)[:, None]
    times = iter([1.0, 1.125, 1.25])
    scorer, executor, woken = scorer_of(engine, lambda: next(times))
    pieces = [ready(active(request("ab")), [0, 1], [4, 2]), ready(active(request("a", text="cat")), [0], [9])]
    scorer.submit(pieces)

    assert scorer.turn() == []
    executor.run_next()

    (batch,) = scorer.turn()
    dog, cat = encode_text("a dog"), encode_text("cat")
    assert batch.logits.tolist() == [logit_of(dog, 4), logit_of(dog, 2), logit_of(cat, 9)]
    assert (batch.pieces, batch.num_tokens, batch.interval.seconds) == (pieces, 30, 0.25)
    assert batch.encoding.seconds == batch.scoring.seconds == 0.125
    assert len(woken) == 1
    assert scorer.turn() == []


def test_no_more_batches_are_taken_than_keep_the_engine_busy():
    scorer, executor, _ = scorer_of(Engine(num_slots=10, max_pairs=8))
    for number in range(MAX_BATCHES):
        assert scorer.has_room()
        scorer.submit([ready(active(request("a")), [0], [number])])

    assert not scorer.has_room()
    executor.run_next()
    scorer.turn()
    assert scorer.has_room()


@pytest.mark.parametrize("error", [EngineBroken("out of memory"), LimitExceeded("too many"), ValueError("a bug")])
def test_what_the_engine_raises_is_raised_by_the_turn(error):
    engine = Engine(num_slots=10, max_pairs=8)
    engine.error = error
    scorer, executor, woken = scorer_of(engine)
    scorer.submit([ready(active(request("a")), [0], [0])])
    executor.run_next()

    assert len(woken) == 1
    with pytest.raises(type(error)):
        scorer.turn()


def test_batches_run_on_a_thread_of_their_own_and_wake_the_loop():
    woken = Event()
    scorer = BatchScorer(Engine(10, 8), ThreadPoolExecutor(1), woken.set, lambda: 0.0)
    scorer.submit([ready(active(request("a")), [0], [0])])

    assert woken.wait(20)
    scorer.close()
    assert len(scorer.turn()) == 1
