"""The rerank job: the reply to each request, and that no slot and no count is left over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.calibration import Calibration, DirectionCalibration, sigmoid
from edje.first_stage_scores import standardise
from protocols.encoding import CANCEL_HEADER
from rerank_harness import (
    BAD_TEXT,
    NAN_IMAGE,
    PARTITION,
    START,
    TOPICS,
    WALL_START,
    Engine,
    HandExecutor,
    Rig,
    content_of,
    expected,
    image_request,
    request,
)
from trt.contract import EngineBroken
from workers.errors import Misconfigured, Poison
from workers.ports import Partition

IMAGES = {f"i{number}": number for number in range(40)}
OTHER = Partition(PARTITION.topic, 1)


def rig_with_images(**settings: Any) -> Rig:
    rig = Rig(**settings)
    rig.put(IMAGES)
    return rig


def at(seconds: float) -> str:
    """A deadline so many seconds after the start."""
    return datetime.fromtimestamp(WALL_START + seconds, UTC).isoformat()


def run_and_read(rig: Rig, sent: dict[str, Any]) -> dict[str, Any]:
    rig.send(sent)
    rig.run()
    return content_of(rig.reply())


def test_images_are_ranked_for_a_text():
    rig = rig_with_images()
    sent = request(["i3", "i9", "i4", "i1", "i7", "i8"])

    assert run_and_read(rig, sent) == expected(sent, IMAGES)
    assert rig.is_idle()


def test_texts_of_different_lengths_are_ranked_for_an_image():
    rig = rig_with_images()
    sent = image_request("i5", ["a dog", "", "a much longer text about a cat that sleeps", "x", "a dog and a cat here"])

    assert run_and_read(rig, sent) == expected(sent, IMAGES)
    assert rig.fetches.asked == ["vt:m1:i5"]
    assert rig.is_idle()


def test_texts_with_names_are_named_in_the_results():
    rig = rig_with_images()
    sent = image_request("i5", [])
    sent["candidates"] = [{"text": "a dog", "id": "first"}, {"text": "a cat"}]
    rig.send(sent)
    rig.run()

    assert {result.index: result.id for result in rig.reply().results} == {0: "first", 1: None}


def test_only_the_best_are_returned_where_the_request_says_how_many():
    sent = request(list(IMAGES), top_n=3)

    assert run_and_read(rig_with_images(), sent) == expected(sent, IMAGES)


def test_ties_keep_the_order_of_the_candidates():
    rig = Rig()
    images = {"b": 5, "a": 16, "c": 27, "d": 4}  # the first three are the same to the engine
    rig.put(images)
    sent = request(["b", "a", "c", "d"])

    assert [index for index, _, _ in run_and_read(rig, sent)["results"] if index != 3] == [0, 1, 2]


def test_missing_images_are_named_and_the_rest_is_ranked():
    sent = request(["i1", "none", "i2", "gone", "none"])

    found = run_and_read(rig_with_images(), sent)

    assert found == expected(sent, IMAGES)
    assert (found["status"], found["missing"]) == ("partial", ["none", "gone"])


def test_a_reply_without_any_image_names_them_all_as_missing():
    rig = Rig(piece_pairs=2)
    names = [f"none{number}" for number in range(30)]
    sent = request(names)

    assert run_and_read(rig, sent) == {"status": "partial", "missing": names, "results": []}
    assert rig.now == START  # no time had to pass: what has ended makes room for the next at once
    assert rig.is_idle()


def test_a_query_image_that_is_missing_leaves_nothing_to_rank():
    sent = image_request("none", ["a dog", "a cat", "a much longer text about some other cat"])

    assert run_and_read(Rig(), sent) == {"status": "partial", "missing": ["none"], "results": []}


def test_duplicates_are_each_listed_and_scored_once():
    rig = rig_with_images()
    sent = request(["i1", "i2", "i1", "i1", "i2"])

    assert run_and_read(rig, sent) == expected(sent, IMAGES)
    assert sum(rig.engine.calls) == 2


def test_equal_texts_are_each_listed_and_scored_once():
    rig = rig_with_images()
    sent = image_request("i1", ["a dog", "a cat", "a dog"])

    assert run_and_read(rig, sent) == expected(sent, IMAGES)
    assert sum(rig.engine.calls) == 2


def with_scores(sent: dict[str, Any], scores: Mapping[int, float]) -> dict[str, Any]:
    """The request with first-stage scores for the candidates of these numbers."""
    candidates = [
        {**each, "score": scores[number]} if number in scores else each
        for number, each in enumerate(sent["candidates"])
    ]
    return {**sent, "candidates": candidates}


CALIBRATION = Calibration(
    text_to_image=DirectionCalibration(temperature=2.0, offset=-1.0, first_stage_gain=0.0),
    image_to_text=DirectionCalibration(temperature=0.5, offset=1.0, first_stage_gain=0.0),
)
_WITH_GAIN = DirectionCalibration(temperature=1.0, offset=0.0, first_stage_gain=1.0)
WITH_FIRST_STAGE = Calibration(text_to_image=_WITH_GAIN, image_to_text=_WITH_GAIN)

SCORES = {number: (number * 7) % 41 / 8 for number in range(40)}


def logits_by_candidate(rig: Rig, sent: dict[str, Any]) -> dict[int, float]:
    return {index: logit for index, _, logit in run_and_read(rig, sent)["results"]}


@pytest.mark.parametrize(
    "sent",
    [
        request([*list(IMAGES)[:9], "none", *list(IMAGES)[9:]]),
        image_request("i5", [f"a {'very ' * (number % 5)}big dog {number}"[-38:] for number in range(40)]),
    ],
    ids=["images", "texts of different lengths"],
)
def test_the_standardised_first_stage_score_joins_each_candidates_logit(sent):
    plain = logits_by_candidate(rig_with_images(piece_pairs=3), sent)
    candidates = sent["candidates"]
    scores = {number: SCORES[number % 40] for number in range(len(candidates))}

    rig = rig_with_images(piece_pairs=3, calibration=WITH_FIRST_STAGE)
    rig.send(with_scores(sent, scores))
    rig.run()

    standard = standardise([scores[number] for number in range(len(candidates))]).values
    for result in rig.reply().results:
        assert result.logit == plain[result.index]
        assert result.relevance_score == pytest.approx(
            sigmoid(np.float64(result.logit + standard[result.index])), abs=1e-5
        )
    assert len(rig.reply().results) == len(plain)
    assert rig.reply().warnings == []


def test_a_first_stage_score_changes_the_order_only_with_a_gain():
    images = {f"c{number}": 0 for number in range(4)}  # equal logits
    sent = request(list(images))
    rising = with_scores(sent, {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.9})

    def order(sent: dict[str, Any], **options: Any) -> list[int]:
        rig = Rig(**options)
        rig.put(images)
        rig.send(sent)
        rig.run()
        return [result.index for result in rig.reply().results]

    assert order(rising) == [0, 1, 2, 3]
    assert order(sent, calibration=WITH_FIRST_STAGE) == [0, 1, 2, 3]
    assert order(rising, calibration=WITH_FIRST_STAGE) == [3, 1, 2, 0]


def test_requests_with_scores_and_without_share_a_batch():
    rig = rig_with_images(calibration=WITH_FIRST_STAGE)
    rig.send(request(["i1", "i2"], request_id="without"))
    rig.send(with_scores(request(["i1", "i2"], request_id="with"), {0: 0.25, 1: 0.5}))
    rig.run()

    assert rig.engine.calls == [4]
    second = -np.log(2)
    for request_id, scores in (("without", [0, second]), ("with", [second, 0])):
        (reply,) = [each for each in rig.replies() if each.request_id == request_id]
        for result in reply.results:
            assert result.relevance_score == pytest.approx(
                sigmoid(np.float64(result.logit + scores[result.index])), abs=1e-5
            )


@pytest.mark.parametrize(
    ("scores", "code"),
    [
        ({}, "first_stage_scores_missing"),
        ({0: 0.5, 1: 0.25}, "first_stage_scores_incomplete"),
        ({0: 0.5, 1: 0.5, 2: 0.5}, "first_stage_scores_equal"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "first_stage_scores_ascending"),
    ],
)
def test_scores_that_give_no_order_cause_a_warning_only_with_a_gain(scores, code):
    sent = with_scores(request(["i1", "i2", "i3"]), scores)

    for calibration, codes in ((WITH_FIRST_STAGE, [code]), (CALIBRATION, [])):
        rig = rig_with_images(calibration=calibration)
        rig.send(sent)
        rig.run()

        assert [warning.code for warning in rig.reply().warnings] == codes
        assert rig.metric("edje_reply_warnings_total", code=code) == len(codes)
        assert rig.reply().status == "ok"


@pytest.mark.parametrize("scale", [1e300, -1e9, 1e-300])
def test_scores_of_any_scale_are_ranked_by_their_order(scale):
    rig = rig_with_images(calibration=WITH_FIRST_STAGE)
    rig.send(with_scores(request(["i1", "i1x", "i2"]), {0: 1 * scale, 1: 3 * scale, 2: 2 * scale}))
    rig.run()

    assert np.isfinite([result.logit for result in rig.reply().results]).all()
    assert rig.is_idle()


@pytest.mark.parametrize(
    ("sent", "calibration"),
    [(request(["i1", "i2"]), CALIBRATION.text_to_image), (image_request("i1", ["a", "b"]), CALIBRATION.image_to_text)],
    ids=["text-to-image", "image-to-text"],
)
def test_a_relevance_score_is_calibrated_for_the_direction_of_its_query(sent, calibration):
    rig = rig_with_images(calibration=CALIBRATION)
    rig.send(sent)
    rig.run()

    for result in rig.reply().results:
        expected = 1 / (1 + np.exp(-(result.logit / calibration.temperature + calibration.offset)))
        assert result.relevance_score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sent", [request([]), image_request("i1", [])], ids=["text", "image"])
def test_a_request_without_candidates_is_answered_at_once(sent):
    rig = rig_with_images()
    rig.send(sent)
    rig.turn()

    assert content_of(rig.reply()) == {"status": "ok", "missing": [], "results": []}
    assert rig.fetches.asked == []
    assert rig.is_idle()


def test_a_reply_goes_to_the_topic_that_the_request_names_where_that_is_allowed():
    rig = rig_with_images()
    rig.send(request(["i1"], reply_topic="mine.a"))
    rig.run()

    assert rig.reply("mine.a").status == "ok"
    assert rig.replies() == []


def test_a_higher_priority_goes_first():
    rig = rig_with_images(max_fetches=1, max_batch_pairs=4)
    for number, priority in enumerate((0, 5, 9, 1)):
        rig.send(request([f"i{number}"], request_id=f"p{priority}", priority=priority))
    rig.run()

    assert [reply.request_id for reply in rig.replies()] == ["p9", "p5", "p1", "p0"]


def test_a_large_request_does_not_hold_up_a_small_one_that_came_later():
    rig = Rig(num_slots=1100, piece_pairs=32, max_batch_pairs=64, max_inflight_pairs=2000)
    large = {f"l{number}": number for number in range(1000)}
    rig.put(large | IMAGES)
    rig.send(request(list(large), request_id="large"))
    rig.turn()
    rig.send(request([f"i{number}" for number in range(10)], request_id="small"))
    rig.run()

    assert [reply.request_id for reply in rig.replies()] == ["small", "large"]
    assert sum(rig.engine.calls[:-1]) > 600  # the small one was answered long before the large one's pairs were through


def test_a_large_request_is_answered_though_small_ones_keep_coming():
    rig = rig_with_images(piece_pairs=2, max_batch_pairs=2, max_fetches=1)
    rig.send(request([f"i{number}" for number in range(10)], request_id="large"))
    for number in range(300):
        rig.send(request(["i30"], request_id=f"small{number}"))
        rig.send(request(["i31"], request_id=f"other{number}"))
        rig.send(request(["i32"], request_id=f"third{number}"))
        rig.turn()
        if rig.fetches.waiting:
            rig.fetches.land()
        if rig.executor.waiting:
            rig.executor.run_next()

    assert rig.job.num_active() > 100  # never caught up with the small ones
    assert "large" in {reply.request_id for reply in rig.replies()}


def test_a_request_that_is_late_on_arrival_costs_no_fetch():
    rig = rig_with_images()
    rig.send(request(["i1"], deadline=at(-0.001)))
    rig.turn()

    assert (rig.reply().status, rig.reply().results) == ("expired", [])
    assert rig.fetches.asked == []
    assert rig.is_idle()


def test_the_tolerance_is_added_to_the_deadline():
    rig = rig_with_images(deadline_tolerance_s=0.5)
    rig.send(request(["i1"], request_id="just", deadline=at(-0.4)))
    rig.send(request(["i1"], request_id="late", deadline=at(-0.6)))
    rig.run()

    assert {reply.request_id: reply.status for reply in rig.replies()} == {"just": "ok", "late": "expired"}


def test_a_request_that_is_late_in_the_queue_is_not_fetched():
    rig = rig_with_images(max_fetches=1)
    rig.send(request(["i1"], request_id="first"))
    rig.turn()
    rig.send(request(["i2"], request_id="late", deadline=at(1)))
    rig.turn()
    rig.now += 2
    rig.turn()

    assert rig.reply().status == "expired"
    rig.run()
    assert rig.fetches.asked == ["vt:m1:i1"]
    assert rig.is_idle()


def test_a_deadline_passes_while_the_store_is_away():
    rig = rig_with_images()
    rig.store.away = True
    rig.send(request(["i1", "i2"], deadline=at(1)))
    rig.run()

    assert rig.reply().status == "expired"
    assert rig.now == pytest.approx(START + 1)  # asked to be turned exactly then
    rig.store.away = False
    rig.run()
    assert len(rig.replies()) == 1
    assert rig.engine.calls == []
    assert rig.is_idle()


def test_a_request_that_is_late_before_the_engine_is_not_scored():
    rig = rig_with_images()
    rig.send(request(["i1", "i2"], deadline=at(1)))
    rig.turn()
    rig.now += 2
    rig.fetches.land()
    rig.turn()

    assert rig.reply().status == "expired"
    assert rig.engine.calls == []
    assert rig.is_idle()


def test_a_request_that_expires_while_it_waits_for_a_fuller_batch_makes_room_at_once():
    rig = rig_with_images(num_slots=4)
    rig.send(request(["i0", "i1", "i2", "i3"], request_id="late", deadline=at(0.001)))
    rig.turn()
    rig.send(request(["i4", "i5", "i6", "i7"]))  # for which no slot is left
    rig.fetches.land()
    rig.run()

    assert {reply.request_id: reply.status for reply in rig.replies()} == {"late": "expired", "r1": "ok"}
    assert rig.engine.calls == [4]
    assert rig.now < START + 0.003
    assert rig.is_idle()


def test_a_request_that_expires_while_it_is_scored_is_answered_once():
    rig = rig_with_images()
    rig.send(request(["i1", "i2"], deadline=at(1)))
    rig.turn()
    rig.fetches.land()
    rig.turn()
    rig.now += 2
    rig.turn()
    rig.run()

    assert rig.reply().status == "expired"
    assert rig.engine.calls == [2]
    assert rig.is_idle()


def test_requests_that_expire_while_the_store_is_away_do_not_pile_up():
    rig = Rig(piece_pairs=1, max_fetches=1)
    rig.store.away = True
    rig.send(request(["a"], request_id="patient"))
    rig.turn()
    for number in range(4000):
        rig.send(request(["a", "b"], request_id=str(number), deadline=at(number + 0.5)))
        rig.now += 1
        rig.turn()

    assert len(rig.replies()) == 4000
    assert len(rig.job._queue) < 2100
    assert len(rig.job._deadlines._heap) < 1100


def test_far_deadlines_of_answered_requests_do_not_pile_up():
    rig = rig_with_images()
    for number in range(3000):
        rig.send(request([], request_id=str(number), deadline=at(86_400)))
    rig.turn()

    assert len(rig.job._deadlines._heap) <= 1024
    assert rig.job.wants_turn_in_s(rig.now) is None


def test_a_worker_has_room_until_its_bound_of_bytes_is_reached_and_again_below_it():
    rig = rig_with_images(max_inflight_bytes=250_000)
    for number in range(3):
        assert rig.job.has_room()
        rig.send(request(["i1"], request_id=str(number), padding="x" * 100_000))

    assert not rig.job.has_room()
    rig.run()
    assert rig.job.has_room()


def test_a_store_that_comes_back_has_lost_nothing():
    rig = rig_with_images(max_fetches=2)
    rig.store.away = True
    sent = [request([f"i{number}", f"i{number + 20}"], request_id=str(number)) for number in range(20)]
    for each in sent:
        rig.send(each)
        rig.turn()
    assert rig.replies() == []

    rig.store.away = False
    rig.run()

    assert {reply.request_id: content_of(reply) for reply in rig.replies()} == {
        each["request_id"]: expected(each, IMAGES) for each in sent
    }


@pytest.mark.parametrize("stage", ["read", "encoded", "fetched", "decoded", "answered", "expired"])
def test_an_unexpected_error_of_one_request_is_its_outcome_and_the_work_goes_on(stage, monkeypatch):
    rig = rig_with_images()
    bug = ZeroDivisionError("a bug")

    def fail(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()  # for the first call alone
        raise bug

    sent = request(["i1", "i2"], deadline=at(0.5) if stage == "expired" else at(100))
    if stage == "read":
        monkeypatch.setattr("workers.rerank.job.read_request", fail)
    if stage == "encoded":
        sent["query"]["text"] = BAD_TEXT
    record = rig.send(sent, key=b"r1")
    rig.turn()
    if stage == "fetched":
        rig.fetches.waiting.pop(0)[0].set_exception(bug)
    if stage == "decoded":
        monkeypatch.setattr("workers.rerank.loading.decode_blobs", fail)
    if stage == "answered":
        monkeypatch.setattr("workers.rerank.replies.encode_response", fail)
    if stage == "expired":
        monkeypatch.setattr("workers.rerank.job.Replies.expired", fail)
        rig.now += 1
    rig.run()
    rig.send(request(["i1", "i2"], request_id="r2"))
    rig.run()

    replies = {reply.request_id: reply for reply in rig.replies()}
    (letter,) = rig.dead_letters()
    assert (replies["r1"].status, replies["r1"].error.code) == ("error", "internal_error")
    assert (letter.value, letter.key) == (record.value, b"r1")
    assert replies["r2"].status == "ok"
    assert rig.metric("edje_dead_letters_total", code="internal_error") == 1
    assert rig.is_idle()


def test_a_failed_fetch_concerns_every_request_that_waits_for_it_and_no_other():
    rig = rig_with_images()
    rig.send(request(["i1"]))
    rig.send(request(["i1", "i2"], request_id="r2"))
    rig.send(request(["i3"], request_id="r3"))
    rig.turn()
    rig.fetches.waiting.pop(0)[0].set_exception(ZeroDivisionError("a bug"))
    rig.run()
    rig.send(request(["i1"], request_id="r4"))
    rig.run()

    assert {reply.request_id: reply.status for reply in rig.replies()} == {
        "r1": "error",
        "r2": "error",
        "r3": "ok",
        "r4": "ok",
    }
    assert rig.is_idle()


def test_a_record_that_the_loop_refuses_is_answered_with_the_error():
    rig = rig_with_images()
    record = rig.send(request(["i1"]))
    rig.job.refuse(record, Poison("worker_died", "the process died"), rig.now)
    never_accepted = replace(record, offset=7, value=json.dumps(request(["i1"], "r2", reply_topic="mine.a")).encode())
    rig.job.refuse(never_accepted, Poison("worker_died", "the process died"), rig.now)
    rig.run()

    assert (rig.reply().request_id, rig.reply().error.code) == ("r1", "worker_died")
    assert (rig.reply("mine.a").request_id, rig.reply("mine.a").error.code) == ("r2", "worker_died")
    assert len(rig.dead_letters()) == 2
    assert rig.is_idle()


def test_a_store_that_refuses_this_worker_ends_it():
    rig = Rig()
    rig.send(request(["i1"]))
    rig.turn()
    rig.fetches.waiting[0][0].set_exception(Misconfigured("wrong password"))

    with pytest.raises(Misconfigured, match="password"):
        rig.turn()


def test_a_broken_engine_ends_the_worker():
    rig = rig_with_images()
    rig.engine.error = EngineBroken("out of memory")
    rig.send(request(["i1"]))

    with pytest.raises(EngineBroken):
        rig.run()


def test_a_score_that_is_not_finite_is_an_error_and_never_a_rank():
    rig = rig_with_images()
    rig.put({"nan": NAN_IMAGE})
    rig.send(request(["i1", "nan"]))
    rig.send(request(["i1", "i2"], request_id="r2"))
    rig.run()

    replies = {reply.request_id: reply for reply in rig.replies()}
    assert (replies["r1"].status, replies["r1"].error.code) == ("error", "score_not_finite")
    assert replies["r2"].status == "ok"
    assert rig.is_idle()


def test_a_worker_has_room_until_its_bound_of_pairs_is_reached_and_again_below_it():
    rig = rig_with_images(max_inflight_pairs=6)
    rig.send(request(["i1", "i2", "i3"]))
    assert rig.job.has_room()

    rig.send(request(["i4", "i5", "i6"], request_id="r2"))
    assert not rig.job.has_room()
    assert rig.job.num_inflight_pairs() == 6

    rig.run()
    assert rig.job.has_room()


@pytest.mark.parametrize("stage", ["queued", "fetching", "ready", "scoring", "finished"])
def test_dropped_requests_leave_nothing_behind_and_produce_nothing(stage):
    rig = rig_with_images(max_fetches=1 if stage == "queued" else 4)
    rig.send(request(["i30"], request_id="kept"))
    if stage == "queued":
        rig.turn()
    rig.send(request([f"i{number}" for number in range(6)], request_id="gone"), partition=OTHER)
    if stage != "finished":
        rig.turn()
    if stage in ("ready", "scoring"):
        while rig.fetches.waiting:
            rig.fetches.land()
    if stage == "scoring":
        rig.turn()
    if stage == "finished":
        rig.send(request([], request_id="answered"), partition=OTHER)
        rig.send(b"poison", partition=OTHER)

    rig.job.drop({OTHER})
    assert rig.job.num_active() == 1
    assert rig.job.num_inflight_pairs() == 1
    rig.run()

    assert [reply.request_id for reply in rig.replies()] == ["kept"]
    assert rig.dead_letters() == []
    assert rig.is_idle()


def test_a_dropped_request_may_come_again_while_its_former_pieces_are_still_out():
    rig = rig_with_images()
    record = rig.send(request(["i1", "i2", "none"]))
    rig.turn()
    rig.job.drop({PARTITION})
    rig.job.accept(record, rig.now)
    rig.run()

    assert content_of(rig.reply()) == expected(request(["i1", "i2", "none"]), IMAGES)
    assert rig.is_idle()


def test_the_stages_of_a_request_add_up_to_its_total():
    rig = rig_with_images(max_fetches=1)
    rig.send(request(["i9"], request_id="before"))
    rig.turn()
    rig.send(request(["i1", "i2"]))
    rig.turn()
    rig.now += 0.010
    rig.fetches.land()
    rig.turn()
    rig.now += 0.020
    rig.fetches.land()
    rig.turn()
    rig.now += 0.005
    rig.run()

    timings = rig.replies()[-1].timings_ms
    assert timings == pytest.approx(
        {"inbox": 0, "queue": 10, "fetch": 20, "batch_wait": 5, "score": 0, "total": 35}, abs=0.01
    )


def test_replies_are_counted_by_status_and_pairs_of_rankings_are_counted():
    rig = rig_with_images()
    rig.send(request(["i1", "i2"]))
    rig.send(request(["i1", "none"], request_id="r2"))
    rig.send(request(["i1"], request_id="r3", deadline=at(-1)))
    rig.send(b"{}", key=None)
    rig.run()

    assert {
        status: rig.metric("edje_replies_total", status=status) for status in ("ok", "partial", "expired", "error")
    } == {"ok": 1, "partial": 1, "expired": 1, "error": 0}
    assert rig.metric("edje_dead_letters_total", code="invalid_event") == 1
    assert rig.metric("edje_pairs_total") == 4


# --- any requests in any order -----------------------------------------------------------------------

names = st.sampled_from([f"i{number}" for number in range(10)] + ["none1", "none2", "corrupt"])
texts = st.text("ab ", max_size=20)
priorities = st.sampled_from([0, 1, 9])
top_ns = st.none() | st.integers(1, 5)
deadlines = st.none() | st.integers(-1, 3)
text_requests = st.builds(
    lambda images, text, top_n, priority, deadline: (request(images, text=text), top_n, priority, deadline),
    st.lists(names, max_size=9),
    texts.map(lambda text: text + "."),
    top_ns,
    priorities,
    deadlines,
)
image_requests = st.builds(
    lambda image, texts, top_n, priority, deadline: (image_request(image, texts), top_n, priority, deadline),
    names,
    st.lists(texts, max_size=9),
    top_ns,
    priorities,
    deadlines,
)


def complete(number: int, drawn: tuple[dict[str, Any], int | None, int, int | None]) -> dict[str, Any]:
    sent, top_n, priority, deadline = drawn
    sent = {**sent, "request_id": str(number), "priority": priority, "explain": number % 3 == 0}
    if top_n is not None:
        sent["top_n"] = top_n
    if deadline is not None:
        sent["deadline"] = at(deadline + 0.5)
    return sent


@settings(max_examples=200, deadline=None)
@given(
    drawn=st.lists(text_requests | image_requests, max_size=8),
    piece_pairs=st.integers(1, 4),
    spare_slots=st.integers(0, 3),
    max_fetches=st.integers(1, 3),
    dropped=st.none() | st.integers(0, 20),
    explains=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from("aaaffffeeetxx"), st.integers(0, 9)), max_size=40),
)
def test_every_request_is_answered_once_and_rightly_in_any_order_of_events(
    drawn, piece_pairs, spare_slots, max_fetches, dropped, explains, steps
):
    num_slots, max_batch_pairs = piece_pairs + spare_slots, max(piece_pairs, 4)
    encoding = HandExecutor()
    rig = Rig(
        num_slots=num_slots,
        piece_pairs=piece_pairs,
        max_batch_pairs=max_batch_pairs,
        max_fetches=max_fetches,
        engine=Engine(num_slots, max_batch_pairs, explains=explains),
        text_executor=encoding,
        tokenizer_cache_size=3,
    )
    images = {f"i{number}": number for number in range(10)}
    rig.put(images)
    rig.put_blobs({"corrupt": b"not a blob"})
    requests = [complete(number, each) for number, each in enumerate(drawn)]
    waiting = list(requests)

    def send_next() -> None:
        sent = waiting.pop(0)
        rig.send(sent, partition=OTHER if int(sent["request_id"]) % 2 else PARTITION)

    gone: set[str] = set()
    for number, (step, which) in enumerate(steps):
        if step == "a" and waiting:
            send_next()
        if step == "f" and rig.fetches.waiting:
            rig.fetches.land(which % len(rig.fetches.waiting))
        if step == "e" and rig.executor.waiting:
            rig.executor.run_next()
        if step == "x" and encoding.waiting:
            encoding.run_next()
        if step == "t":
            rig.now += which / 10
        if number == dropped:
            rig.job.drop({OTHER})
            accepted = {sent["request_id"] for sent in requests if sent not in waiting}
            gone = {name for name in accepted if int(name) % 2} - {reply.request_id for reply in rig.replies()}
        rig.turn()
    while waiting:
        send_next()
    rig.run()

    replies = {reply.request_id: reply for reply in rig.replies()}
    assert len(replies) == len(rig.replies()) == len(requests) - len(gone)
    for sent in requests:
        if sent["request_id"] in gone:
            assert sent["request_id"] not in replies
            continue
        reply = replies[sent["request_id"]]
        if reply.status == "expired":
            assert sent["deadline"] <= at(rig.now - START)
        else:
            assert content_of(reply) == expected(sent, images)
            is_explained = explains and sent["explain"]
            assert is_explained or all(result.explanation is None for result in reply.results)
    assert rig.is_idle()


# --- with the real engine ---------------------------------------------------------------------------------------------

#: How far a logit may move with what shares its batch: float32 rounding; untrained logits spread over about 1.
BATCH_TOLERANCE = 1e-5


#: Every kind of encoder; each reads the first stage's score, which changes nothing where none is given.
ENCODERS = ("tiny", "tiny-late", "tiny-minimal", "tiny-maxsim")
ONE = request([f"i{number}" for number in range(11)], text="a dog runs on a beach")
OTHERS = (
    request([f"i{number}" for number in range(5, 25)], "r2", "a dog on a sofa"),
    request([f"i{number}" for number in range(3, 13)], "r3", "two cats asleep in the sun"),
    image_request("i2", ["a cat runs in the snow", "a dog", "birds over a lake at dawn"], "r4"),
)


class RealEngine:
    """An untrained model behind the job, with forty images in the store."""

    def __init__(self, folder: Path, variant: str) -> None:
        torch = pytest.importorskip("torch")
        from edje.init import write_untrained
        from edje.model.variants import VARIANTS
        from edje.model.weights import load_checkpoint
        from edje.text import Tokenizer
        from protocols.blob import BlobLayout, blob_key, encode_blob
        from trt.runtimes.torch_device import TorchDevice
        from trt.runtimes.torch_engine import TorchEngine
        from trt.slab.layout import SlotLayout
        from trt.slab.torch_slab import SharedSlab

        config = VARIANTS[variant]
        digest = write_untrained(config, folder, seed=1)
        loaded = load_checkpoint(folder)
        self.layout = BlobLayout(digest, config.adapter.num_tokens, config.joint.dim, "int8")
        slab = SharedSlab(SlotLayout("int8", self.layout.num_tokens, self.layout.token_dim), 64)
        self.engine = TorchEngine(
            loaded, slab=slab, max_pairs=32, max_images=1, device=TorchDevice(torch.device("cpu")), dtype=torch.float32
        )
        tokenizer = Tokenizer.load(folder)
        self.encode_batch, self.words = tokenizer.encode_batch, tokenizer.words
        random = np.random.default_rng(0)
        tokens = random.standard_normal((40, self.layout.num_tokens, self.layout.token_dim)).astype(np.float32)
        self.blobs = {
            blob_key(digest, f"i{number}"): encode_blob(self.layout, each, bytes(32))
            for number, each in enumerate(tokens)
        }

    def logits(self, sent: dict[str, Any], *others: dict[str, Any]) -> np.ndarray:
        """Of the candidates of a request, which others have come before."""
        rig = Rig(
            engine=self.engine,
            layout=self.layout,
            encode_batch=self.encode_batch,
            num_slots=64,
            piece_pairs=4,
            max_batch_pairs=32,
            max_fetches=64,
        )
        rig.store.put_many(self.blobs)
        for each in (*others, sent):
            rig.send(each)
        rig.turn()
        while rig.fetches.waiting:
            rig.fetches.land()
        rig.run()
        (reply,) = [reply for reply in rig.replies() if reply.request_id == sent["request_id"]]
        return np.array([result.logit for result in sorted(reply.results, key=lambda result: result.index)])


@pytest.mark.parametrize("variant", ENCODERS)
def test_the_logits_of_a_request_do_not_depend_on_the_others_in_its_batches(tmp_path, variant):
    real = RealEngine(tmp_path / "checkpoint", variant)

    alone, amid = real.logits(ONE), real.logits(ONE, *OTHERS)

    assert np.ptp(alone) > 100 * BATCH_TOLERANCE
    np.testing.assert_allclose(amid, alone, rtol=0, atol=BATCH_TOLERANCE)


def test_replies_go_to_the_response_topic_by_default():
    rig = rig_with_images()
    rig.send(request(["i1"]))
    rig.run()

    (message,) = rig.messages(TOPICS.rerank_responses)
    assert message.key == b"r1"


WITHDRAWN = ((CANCEL_HEADER, b"1"),)


def test_a_withdrawn_request_that_has_not_started_is_not_scored():
    rig = Rig()
    rig.put({"a": 1})
    rig.send(request(["a"], "r1"), key=b"r1")
    rig.send(None, WITHDRAWN, key=b"r1")

    rig.run()

    assert rig.reply().status == "expired"
    assert rig.dead_letters() == []
    assert rig.is_idle()


def test_a_withdrawal_of_an_unknown_or_answered_request_changes_nothing():
    rig = Rig()
    rig.put({"a": 1})
    rig.send(request(["a"], "r1"), key=b"r1")
    rig.run()

    rig.send(None, WITHDRAWN, key=b"r1")
    rig.send(None, WITHDRAWN, key=b"other")
    rig.send(None, WITHDRAWN, key=None)
    rig.run()

    assert rig.reply().status == "ok"
    assert rig.is_idle()


@pytest.mark.parametrize("variant", ENCODERS)
def test_a_model_with_a_late_interaction_explains_its_best_results(tmp_path, variant):
    real = RealEngine(tmp_path / "checkpoint", variant)
    rig = Rig(
        engine=real.engine,
        layout=real.layout,
        encode_batch=real.encode_batch,
        words=real.words,
        num_slots=64,
        piece_pairs=16,
        max_batch_pairs=32,
    )
    rig.store.put_many(real.blobs)
    rig.send({**ONE, "explain": True})
    rig.run()

    reply = rig.reply()
    if not real.engine.can_explain():
        assert [warning.code for warning in reply.warnings] == ["explanation_unavailable"]
        return
    assert [word.word for word in reply.results[0].explanation] == ["a", "dog", "runs", "on", "a", "beach"]
    for result in reply.results[:10]:
        for word in result.explanation:
            assert len(word.similarities) == real.layout.num_tokens
            assert max(map(abs, word.similarities)) <= 1
    assert reply.results[0].explanation != reply.results[1].explanation
