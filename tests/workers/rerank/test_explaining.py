"""Explanations: for the best results, how similar each word is to each visual token."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from rerank_harness import (
    NAN_IMAGE,
    WALL_START,
    Engine,
    Rig,
    content_of,
    encode_text,
    expected,
    image_request,
    request,
    words_of,
)
from workers.rerank.explaining import MAX_EXPLAINED_RESULTS

IMAGES = {f"i{number}": number for number in range(10)}


def explaining_rig(**options: Any) -> Rig:
    rig = Rig(engine=Engine(64, 8, explains=True), **options)
    rig.put(IMAGES)
    return rig


def words_and_values(text: str, image: int) -> list[tuple[str, list[float]]]:
    ids = encode_text(text)
    return [
        (word, [round(max(ids[position] for position in pieces) / 1000, 3), round(image / 10, 3)])
        for word, pieces in words_of(text)
    ]


def found_in(result: Any) -> list[tuple[str, list[float]]] | None:
    return result.explanation and [(each.word, each.similarities) for each in result.explanation]


@pytest.mark.parametrize(
    "sent", [request(["i3", "gone", "i9", "i3", "i1"]), image_request("i5", ["a dog", "a much longer text", "a dog"])]
)
def test_the_best_results_are_explained_word_by_word_and_ranked_as_without(sent):
    rig = explaining_rig()
    rig.send({**sent, "explain": True})
    rig.run()

    reply = rig.reply()
    assert content_of(reply) == expected(sent, IMAGES)
    for result in reply.results:
        candidate = sent["candidates"][result.index]
        text = sent["query"].get("text") or candidate["text"]
        image = IMAGES[candidate.get("image_id") or sent["query"]["image_id"]]
        assert found_in(result) == words_and_values(text, image)
    assert reply.warnings == []
    assert rig.is_idle()


def test_only_so_many_results_are_explained():
    rig = Rig(engine=Engine(64, 16, explains=True), piece_pairs=16, max_batch_pairs=16)
    rig.put({f"i{number}": number % 10 for number in range(40)})
    rig.send({**request([f"i{number}" for number in range(40)]), "explain": True})
    rig.run()

    explained = [result.explanation is not None for result in rig.reply().results]
    assert explained == [True] * MAX_EXPLAINED_RESULTS + [False] * (40 - MAX_EXPLAINED_RESULTS)


def test_no_more_images_are_explained_than_a_piece_may_hold_in_the_slab():
    rig = Rig(engine=Engine(3, 8, explains=True), num_slots=3, piece_pairs=3)
    rig.put(IMAGES)
    rig.send({**request(list(IMAGES)), "explain": True})
    rig.run()

    assert [result.explanation is not None for result in rig.reply().results] == [True] * 3 + [False] * 7
    assert rig.is_idle()


def test_a_request_that_does_not_ask_is_not_explained():
    rig = explaining_rig()
    rig.send(request(["i1"]))
    rig.run()

    assert rig.reply().results[0].explanation is None


def test_an_engine_without_a_late_interaction_ranks_with_a_warning():
    rig = Rig()
    rig.put(IMAGES)
    rig.send({**request(["i1", "i2"]), "explain": True})
    rig.run()

    assert content_of(rig.reply()) == expected(request(["i1", "i2"]), IMAGES)
    assert [warning.code for warning in rig.reply().warnings] == ["explanation_unavailable"]


def test_an_image_that_has_left_the_slab_is_fetched_again_for_its_explanation():
    rig = Rig(engine=Engine(4, 8, explains=True), num_slots=4, piece_pairs=2)
    rig.put(IMAGES)
    sent = request([f"i{number}" for number in range(8)], top_n=2)
    rig.send({**sent, "explain": True})
    rig.run()

    reply = rig.reply()
    assert content_of(reply) == expected(sent, IMAGES)
    assert all(result.explanation for result in reply.results)
    assert rig.is_idle()


@pytest.mark.parametrize("sent", [request(["gone"]), request([]), image_request("gone", ["a"])])
def test_nothing_to_explain_is_an_ordinary_reply(sent):
    rig = explaining_rig()
    rig.send({**sent, "explain": True})
    rig.run()

    assert rig.reply().results == []
    assert rig.is_idle()


def test_a_score_that_is_not_finite_stays_an_error_of_its_own():
    rig = explaining_rig()
    rig.put({"nan": NAN_IMAGE})
    rig.send({**request(["nan"]), "explain": True})
    rig.run()

    assert rig.reply().error.code == "score_not_finite"


def test_a_deadline_that_passes_before_the_explanation_brings_the_ranking_without_it():
    rig = explaining_rig()
    deadline = datetime.fromtimestamp(WALL_START + 1, UTC).isoformat()
    sent = request(["i1", "i2"], deadline=deadline)
    rig.send({**sent, "explain": True})
    rig.turn()
    rig.fetches.land()
    rig.turn()
    rig.executor.run_next()
    rig.turn()  # scored; the explanation is on the engine
    rig.now += 2
    rig.run()

    assert content_of(rig.reply()) == expected(sent, IMAGES)
    assert [warning.code for warning in rig.reply().warnings] == ["explanation_late"]
    assert rig.reply().results[0].explanation is None
    assert rig.is_idle()


def test_a_request_dropped_while_it_is_explained_leaves_nothing_behind():
    rig = explaining_rig()
    record = rig.send({**request(["i1"]), "explain": True})
    rig.turn()
    rig.fetches.land()
    rig.turn()
    rig.executor.run_next()
    rig.turn()
    rig.job.drop({record.partition})
    rig.run()

    assert rig.replies() == []
    assert rig.is_idle()
