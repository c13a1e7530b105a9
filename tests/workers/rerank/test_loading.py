"""The loader: images into slots, each fetched once, and what cannot be had left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from protocols.blob import BlobLayout
from rerank_harness import LAYOUT, Rig, blob_of, content_of, expected, image_request, request


def test_two_requests_that_miss_the_same_image_share_one_fetch():
    rig = Rig()
    rig.put({"a": 1, "b": 2, "c": 3})
    first, second = request(["a", "b"]), request(["b", "c"], request_id="r2")
    rig.send(first)
    rig.send(second)
    rig.run()

    assert sorted(rig.fetches.asked) == ["vt:m1:a", "vt:m1:b", "vt:m1:c"]
    assert [content_of(reply) for reply in rig.replies()] == [
        expected(sent, {"a": 1, "b": 2, "c": 3}) for sent in (first, second)
    ]


def test_a_piece_waits_for_every_fetch_that_brings_one_of_its_images():
    rig = Rig()
    rig.put({"a": 1, "b": 2, "c": 3})
    for images, name in ((["a"], "r1"), (["b"], "r2"), (["a", "b", "c"], "r3")):
        rig.send(request(images, request_id=name))
    rig.turn()
    rig.fetches.land(2)
    rig.fetches.land(0)
    rig.run()

    assert sorted(rig.fetches.asked) == ["vt:m1:a", "vt:m1:b", "vt:m1:c"]
    assert {reply.request_id: len(reply.results) for reply in rig.replies()} == {"r1": 1, "r2": 1, "r3": 3}
    assert rig.is_idle()


def test_an_image_that_lies_in_the_slab_is_not_fetched_again():
    rig = Rig()
    rig.put({"a": 1, "b": 2})
    rig.send(request(["a"]))
    rig.run()
    rig.send(request(["a", "b"], request_id="r2"))
    rig.run()

    assert rig.fetches.asked == ["vt:m1:a", "vt:m1:b"]
    assert (rig.metric("edje_slab_hits_total"), rig.metric("edje_slab_misses_total")) == (1, 2)
    assert rig.metric("edje_store_read_bytes_total") == 2 * LAYOUT.blob_bytes


def test_a_request_that_waits_for_the_fetch_of_a_missing_image_misses_it_too():
    rig = Rig()
    rig.put({"a": 1})
    rig.send(request(["a", "none"]))
    rig.send(request(["none"], request_id="r2"))
    rig.run()

    assert {reply.request_id: reply.missing for reply in rig.replies()} == {"r1": ["none"], "r2": ["none"]}
    assert rig.is_idle()


def test_a_missing_image_is_asked_for_again_by_the_next_request():
    rig = Rig()
    rig.send(request(["late"]))
    rig.run()
    rig.put({"late": 1})
    rig.send(request(["late"], request_id="r2"))
    rig.run()

    assert [reply.status for reply in rig.replies()] == ["partial", "ok"]


def flipped(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])


def laid_out(**changes: object) -> BlobLayout:
    return replace(LAYOUT, **changes)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (flipped(blob_of(1)), "corrupt"),
        (blob_of(1)[:-1], "truncated"),
        (b"", "truncated"),
        (b"nonsense", "undecodable"),
        (blob_of(1, laid_out(model_digest="m2")), "model_mismatch"),
        (blob_of(1, laid_out(storage="int8")), "storage_mismatch"),
        (blob_of(1, laid_out(num_tokens=3)), "shape_mismatch"),
        (None, "missing"),
    ],
)
def test_a_blob_that_cannot_be_used_is_missing_and_counted_and_logged_once(blob, reason):
    rig = Rig()
    rig.put({"good": 1})
    if blob is not None:
        rig.put_blobs({"bad": blob})
    sent = request(["bad", "good"])

    with capture_logs() as logs:
        rig.send(sent)
        rig.send(request(["bad"], request_id="r2"))
        rig.run()

    assert content_of(next(reply for reply in rig.replies() if reply.request_id == "r1")) == expected(sent, {"good": 1})
    assert rig.metric("edje_bad_blobs_total", reason=reason) == 1
    warnings = [line for line in logs if line["log_level"] == "warning"]
    assert [line["image_id"] for line in warnings] == ([] if reason == "missing" else ["bad"])
    assert rig.is_idle()


def test_many_bad_blobs_of_one_fetch_are_one_line_in_the_log():
    rig = Rig()
    rig.put_blobs({f"bad{number}": b"nonsense" for number in range(4)})

    with capture_logs() as logs:
        rig.send(request([f"bad{number}" for number in range(4)]))
        rig.run()

    (line,) = logs
    assert line["reasons"] == {"undecodable": 4}
    assert rig.metric("edje_bad_blobs_total", reason="undecodable") == 4


def test_a_slab_smaller_than_what_is_asked_for_at_once_still_answers():
    rig = Rig(num_slots=4, piece_pairs=4, max_fetches=8)
    images = {f"i{number}": number for number in range(40)}
    rig.put(images)
    requests = [request(list(images)[start : start + 20], request_id=str(start)) for start in range(0, 40, 5)]
    for sent in requests:
        rig.send(sent)
    rig.run()

    assert {reply.request_id: content_of(reply) for reply in rig.replies()} == {
        sent["request_id"]: expected(sent, images) for sent in requests
    }
    assert rig.is_idle()


def test_all_texts_of_an_image_query_share_one_slot():
    rig = Rig(num_slots=4)
    rig.put({"a": 1})
    rig.send(image_request("a", [f"text {number}" for number in range(12)]))
    rig.run()

    assert len(rig.reply().results) == 12
    assert rig.loader.slots_used() == 1


def test_images_that_give_way_to_others_are_counted():
    rig = Rig(num_slots=4)
    rig.put({f"i{number}": number for number in range(10)})
    for number in range(10):
        rig.send(request([f"i{number}"], request_id=str(number)))
        rig.run()

    assert (rig.loader.slots_used(), rig.loader.slots_evicted()) == (4, 6)
