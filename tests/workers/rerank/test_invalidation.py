"""Images that change while a worker has their tokens: later requests see the new ones, those in work keep the old."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from protocols.source_position import SourcePosition, removal_marker
from rerank_harness import LAYOUT, TOPICS, Rig, content_of, encode_text, expected, image_request, logit_of, request
from workers.bus.memory import MemoryBroker, MemoryFollower
from workers.ports import Outgoing
from workers.rerank.invalidation import MAX_EVENTS_PER_TURN


class Indexed:
    """A rig that follows images.indexed, and the ingest worker's side of it."""

    def __init__(self, **options: Any) -> None:
        self.rig = Rig(**options)
        self.broker = MemoryBroker()
        self.follower = MemoryFollower(self.broker, TOPICS.images_indexed)
        self.rig.invalidation.follow(self.follower)

    def publish(self, image: str, value: bytes | None) -> None:
        self.broker.append(Outgoing(TOPICS.images_indexed, image.encode(), value))

    def index(self, image: str, number: int, **fields: Any) -> None:
        """Store an image, and then publish its event."""
        self.rig.put({image: number})
        event = {
            "image_id": image,
            "model": LAYOUT.model_digest,
            "num_tokens": 2,
            "dtype": "fp16",
            "num_bytes": 100,
            "content_sha256": f"{number:064x}",
        }
        self.publish(image, json.dumps(event | fields).encode())

    def ask(self, images: list[str], request_id: str = "r") -> dict[str, Any]:
        self.rig.finished.clear()
        self.rig.send(request(images, request_id=request_id))
        self.rig.run()
        return content_of(self.rig.reply())


def test_an_image_that_is_indexed_again_is_fetched_again():
    indexed = Indexed()
    indexed.index("a", 1)
    indexed.index("b", 2)
    assert indexed.ask(["a", "b"]) == expected(request(["a", "b"]), {"a": 1, "b": 2})

    indexed.index("a", 3)

    assert indexed.ask(["a", "b"]) == expected(request(["a", "b"]), {"a": 3, "b": 2})
    assert indexed.rig.fetches.asked.count("vt:m1:a") == 2
    assert indexed.rig.fetches.asked.count("vt:m1:b") == 1
    assert indexed.rig.metric("edje_slab_invalidations_total") == 1
    assert indexed.rig.is_idle()


def test_a_removed_image_is_missing():
    indexed = Indexed()
    indexed.index("a", 1)
    indexed.ask(["a"])

    indexed.rig.put_blobs({"a": removal_marker(SourcePosition(5, 5))})
    indexed.publish("a", None)

    assert indexed.ask(["a"]) == {"status": "partial", "missing": ["a"], "results": []}


@pytest.mark.parametrize(
    ("fields", "is_dropped"),
    [({}, True), ({"skipped": True}, False), ({"model": "m2"}, False), ({"num_tokens": "many"}, True)],
)
def test_only_events_that_may_change_the_tokens_of_this_model_drop_a_slot(fields, is_dropped):
    indexed = Indexed()
    indexed.index("a", 1)
    indexed.ask(["a"])

    indexed.index("a", 1, **fields)
    indexed.ask(["a"])

    assert indexed.rig.fetches.asked.count("vt:m1:a") == 1 + is_dropped


def test_new_content_that_only_a_skipped_event_reports_drops_the_slot():
    indexed = Indexed()
    indexed.index("a", 1)
    indexed.ask(["a"])

    indexed.index("a", 3, skipped=True)  # stored by an ingest worker that ended before it published

    assert indexed.ask(["a"]) == expected(request(["a"]), {"a": 3})
    assert indexed.rig.is_idle()


def test_a_skipped_event_during_the_fetch_has_the_image_fetched_again():
    indexed = Indexed()
    indexed.index("a", 1)
    indexed.rig.send(request(["a"], request_id="before"))
    indexed.rig.turn()
    future, _ = indexed.rig.fetches.waiting.pop(0)
    old = indexed.rig.store.get_many(["vt:m1:a"])

    indexed.index("a", 3, skipped=True)
    indexed.rig.turn()
    indexed.rig.fetches.answer(future, old)
    indexed.rig.run()

    assert indexed.ask(["a"]) == expected(request(["a"]), {"a": 3})
    assert indexed.rig.is_idle()


def test_a_piece_in_work_keeps_the_tokens_it_has_and_the_next_one_fetches():
    indexed = Indexed()
    indexed.index("a", 1)
    indexed.ask(["a"])
    indexed.rig.finished.clear()
    indexed.rig.send(request(["a"], request_id="before"))
    indexed.rig.turn()  # on its way to the engine, with its slot pinned

    indexed.index("a", 3)
    indexed.rig.send(request(["a"], request_id="after"))
    indexed.rig.run()

    logits = {reply.request_id: reply.results[0].logit for reply in indexed.rig.replies()}
    text = encode_text("a dog")
    assert logits == {"before": logit_of(text, 1), "after": logit_of(text, 3)}
    assert indexed.rig.loader.slots_used() == 1
    assert indexed.rig.is_idle()


def test_a_fetch_from_before_the_change_is_not_kept():
    indexed = Indexed()
    indexed.index("a", 1)
    indexed.rig.turn()
    indexed.rig.send(request(["a"], request_id="before"))
    indexed.rig.turn()
    future, _ = indexed.rig.fetches.waiting[0]
    old = indexed.rig.store.get_many(["vt:m1:a"])

    indexed.index("a", 3)
    indexed.rig.turn()
    indexed.rig.send(request(["a"], request_id="after"))
    indexed.rig.turn()
    indexed.rig.fetches.waiting.pop(0)
    indexed.rig.fetches.answer(future, old)  # after the second fetch has begun
    indexed.rig.run()

    logits = {reply.request_id: reply.results[0].logit for reply in indexed.rig.replies()}
    text = encode_text("a dog")
    assert logits == {"before": logit_of(text, 1), "after": logit_of(text, 3)}
    assert indexed.ask(["a"])["results"][0][2] == logit_of(text, 3)
    assert indexed.rig.is_idle()


def test_a_request_between_the_old_fetch_and_the_new_one_waits_for_the_new_one():
    indexed = Indexed()
    indexed.index("a", 1)
    indexed.rig.send(request(["a"], request_id="before"))
    indexed.rig.turn()
    indexed.index("a", 3)
    indexed.rig.turn()
    indexed.rig.send(request(["a"], request_id="after"))
    indexed.rig.turn()
    indexed.rig.fetches.land(0)
    indexed.rig.turn()

    indexed.rig.send(request(["a"], request_id="between"))
    indexed.rig.turn()
    indexed.rig.now += 1  # no batch waits any longer
    indexed.rig.turn()
    while indexed.rig.executor.waiting:
        indexed.rig.executor.run_next()
        indexed.rig.turn()
    assert [reply.request_id for reply in indexed.rig.replies()] == ["before"]
    indexed.rig.run()

    text = encode_text("a dog")
    logits = {reply.request_id: reply.results[0].logit for reply in indexed.rig.replies()}
    assert (logits["after"], logits["between"]) == (logit_of(text, 3), logit_of(text, 3))
    assert len(indexed.rig.fetches.asked) == 2


def test_after_a_gap_every_image_is_fetched_again():
    indexed = Indexed()
    for number, image in enumerate("abc"):
        indexed.index(image, number)
    indexed.ask(["a", "b", "c"])

    with capture_logs() as lines:
        indexed.index("a", 7)
        indexed.follower.lose(0)
        found = indexed.ask(["a", "b", "c"])

    assert found == expected(request(["a", "b", "c"]), {"a": 7, "b": 1, "c": 2})
    assert len(indexed.rig.fetches.asked) == 6
    assert [line["reason"] for line in lines if line["log_level"] == "warning"] == ["records were removed"]
    assert indexed.rig.is_idle()


def test_images_loaded_before_the_follower_began_are_fetched_again():
    rig = Rig()
    rig.put({"a": 1})
    rig.send(request(["a"]))
    rig.run()

    rig.invalidation.follow(MemoryFollower(MemoryBroker(), TOPICS.images_indexed))

    assert rig.loader.slots_used() == 0


def test_a_long_run_of_events_takes_several_turns():
    indexed = Indexed()
    for number in range(MAX_EVENTS_PER_TURN + 10):
        indexed.index(f"i{number}", 1)

    indexed.rig.job.turn(indexed.rig.now)
    assert indexed.rig.job.wants_turn_in_s(indexed.rig.now) == 0.0
    indexed.rig.job.turn(indexed.rig.now)

    assert indexed.rig.job.wants_turn_in_s(indexed.rig.now) is None
    assert indexed.follower.take() is None


def test_an_error_of_the_follower_ends_the_worker():
    class Broken:
        def take(self) -> None:
            raise RuntimeError("the thread has died")

        def close(self, timeout_s: float) -> None: ...

    rig = Rig()
    rig.invalidation.follow(Broken())

    with pytest.raises(RuntimeError, match="has died"):
        rig.turn()


IMAGES = [f"i{number}" for number in range(5)]
STEPS = st.one_of(
    st.tuples(st.just("index"), st.sampled_from(IMAGES), st.integers(1, 10)),
    st.tuples(st.just("ask"), st.lists(st.sampled_from(IMAGES), min_size=1, max_size=4, unique=True), st.booleans()),
    st.tuples(st.just("gap"), st.none(), st.none()),
    st.tuples(st.just("step"), st.integers(0, 9), st.sampled_from("fe")),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=40), num_slots=st.integers(4, 8))
def test_a_request_never_sees_tokens_that_were_replaced_before_it_came(steps, num_slots):
    """Every logit is one of the contents that the image had since the request was sent."""
    indexed = Indexed(num_slots=num_slots, piece_pairs=4)
    rig = indexed.rig
    for image in IMAGES:
        indexed.index(image, 1)
    contents: dict[str, list[int]] = {image: [1] for image in IMAGES}  # of each image, in order
    since: dict[str, dict[str, int]] = {}  # by request: the content of each image when it was sent
    for number, (what, first, second) in enumerate(steps):
        if what == "index":
            indexed.index(first, second)
            contents[first].append(second)
        if what == "gap":
            indexed.follower.lose(0)
        if what == "ask":
            name = f"r{number}"
            since[name] = {image: len(contents[image]) - 1 for image in first}
            rig.turn()  # what was published before is applied before
            rig.send(image_request(first[0], ["a dog"], name) if second else request(first, request_id=name))
        if what == "step":
            if second == "f" and rig.fetches.waiting:
                rig.fetches.land(first % len(rig.fetches.waiting))
            if second == "e" and rig.executor.waiting:
                rig.executor.run_next()
        rig.turn()
    rig.run()

    text = encode_text("a dog")
    for reply in rig.replies():
        images = list(since[reply.request_id])
        for result in reply.results:
            image = images[result.index]
            possible = contents[image][since[reply.request_id][image] :]
            assert result.logit in {logit_of(text, content) for content in possible}
    assert rig.is_idle()
