"""Texts of requests become ids off the loop's thread, in bounded tasks, and the latest are remembered."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from edje.text import EncodedText
from rerank_harness import BAD_TEXT, UNKNOWN_LETTER, HandExecutor, Rig, encode_texts, image_request, request
from workers.landing import Landing
from workers.ports import Partition, Record
from workers.rerank.request import Request
from workers.rerank.texts import MAX_TASK_CHARS, MAX_TASK_TEXTS, MAX_TASKS, TextEncoder
from workers.telemetry.tracer import Tracer

GIVE_UP_S = 20.0


def request_of(texts: Sequence[str], *, priority: int = 0) -> Request:
    record = Record(Partition("t", 0), 0, None, b"", (), 0)
    return Request(record, Tracer.off().begin(()), 0.0, "application/json", "replies", texts=texts, priority=priority)


class Encoding:
    """An encoder whose tasks run when the test calls for it."""

    def __init__(self, cache_size: int = 1000) -> None:
        self.executor = HandExecutor()
        self.landing = Landing(lambda: None)
        self.tasks: list[Sequence[str]] = []
        self.texts = TextEncoder(self.encode, executor=self.executor, landing=self.landing, cache_size=cache_size)

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        self.tasks.append(texts)
        return encode_texts(texts)

    def run_task(self) -> None:
        self.executor.run_next()
        self.landing.turn()

    def run(self) -> None:
        while self.executor.waiting:
            self.run_task()

    def ready(self) -> list[Request]:
        return [each for each, _ in self.texts.take_ready()]


def test_a_request_is_ready_when_all_its_texts_are_encoded_in_their_order():
    encoding = Encoding()
    texts = [f"text {number}" for number in range(3 * MAX_TASK_TEXTS)]
    asked = request_of(texts)
    encoding.texts.start(asked)
    assert encoding.ready() == []

    encoding.run()

    [(found, encoded)] = encoding.texts.take_ready()
    assert found is asked
    assert list(encoded) == encode_texts(texts)


def test_a_task_is_bounded_in_texts_and_in_characters():
    encoding = Encoding()
    encoding.texts.start(request_of([f"text {number}" for number in range(200)]))
    encoding.texts.start(request_of([f"{number}" + "x" * 2000 for number in range(50)]))
    encoding.run()

    assert all(len(task) <= MAX_TASK_TEXTS for task in encoding.tasks)
    assert all(sum(map(len, task)) <= MAX_TASK_CHARS for task in encoding.tasks)
    assert sum(map(len, encoding.tasks)) == 250


def test_no_more_tasks_are_started_than_keep_the_thread_busy():
    encoding = Encoding()
    encoding.texts.start(request_of([f"text {number}" for number in range(1000)]))

    assert len(encoding.executor.waiting) == MAX_TASKS
    encoding.run_task()
    assert len(encoding.executor.waiting) == MAX_TASKS


def test_a_query_waits_for_a_few_tasks_of_a_large_request_and_not_for_all():
    encoding = Encoding()
    encoding.texts.start(request_of([f"text {number}" for number in range(1000)]))
    query = request_of(["a dog"])
    encoding.texts.start(query)

    for _ in range(MAX_TASKS + 2):
        encoding.run_task()

    assert encoding.ready() == [query]


def test_a_remembered_text_is_ready_at_once():
    encoding = Encoding()
    encoding.texts.start(request_of(["a dog"]))
    encoding.run()
    again = request_of(["a dog"])
    encoding.texts.take_ready()

    encoding.texts.start(again)

    assert encoding.ready() == [again]
    assert encoding.tasks == [["a dog"]]


def test_the_least_recently_used_text_is_forgotten_first():
    encoding = Encoding(cache_size=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        encoding.texts.start(request_of([text]))
        encoding.run()

    assert encoding.tasks == [["a"], ["b"], ["c"], ["b"]]


@pytest.mark.parametrize("cache_size", [0, 1])
def test_a_cache_smaller_than_a_request_does_no_harm(cache_size):
    encoding = Encoding(cache_size=cache_size)
    texts = ["a", "b", "c"]
    encoding.texts.start(request_of(texts))
    encoding.run()

    assert [list(encoded) for _, encoded in encoding.texts.take_ready()] == [encode_texts(texts)]


def test_texts_of_a_closed_request_are_not_encoded():
    encoding = Encoding()
    asked = request_of([f"text {number}" for number in range(1000)])
    encoding.texts.start(asked)
    asked.is_closed = True
    encoding.run()

    assert len(encoding.tasks) == MAX_TASKS
    assert encoding.ready() == []


def test_a_failure_concerns_the_request_of_the_text_alone():
    encoding = Encoding()
    bad, good = request_of([BAD_TEXT]), request_of(["a dog"])
    encoding.texts.start(bad)
    encoding.texts.start(good)
    encoding.run()

    [(failed, error)] = encoding.texts.take_failed()
    assert (failed, type(error)) == (bad, ZeroDivisionError)
    assert encoding.ready() == [good]


class Panic(BaseException):
    """What the tokenizer's Rust code raises when it panics."""


def test_a_panic_of_the_tokenizer_is_a_failure_of_the_request():
    executor, landing = HandExecutor(), Landing(lambda: None)

    def panic(texts: Sequence[str]) -> list[EncodedText]:
        raise Panic("index out of range")

    texts = TextEncoder(panic, executor=executor, landing=landing, cache_size=10)
    texts.start(request_of(["a dog"]))
    executor.run_next()
    landing.turn()

    [(_, error)] = texts.take_failed()
    assert "index out of range" in str(error)


def test_the_loops_thread_is_free_while_texts_are_encoded():
    started, finish = threading.Event(), threading.Event()

    def slow(texts: Sequence[str]) -> list[EncodedText]:
        started.set()
        assert finish.wait(GIVE_UP_S)
        return encode_texts(texts)

    with ThreadPoolExecutor(1) as executor:
        rig = Rig(encode_batch=slow, text_executor=executor)
        rig.put({"i1": 1})
        rig.send(image_request("i1", [f"text {number}" for number in range(1000)]))
        assert started.wait(GIVE_UP_S)
        began_at = time.perf_counter()
        rig.send(request([], request_id="r2"))
        rig.turn()
        took_s = time.perf_counter() - began_at
        answered = [reply.request_id for reply in rig.replies()]
        finish.set()

    assert answered == ["r2"]
    assert took_s < 1.0


# --- what the model understands ---------------------------------------------------------------------------------------

DOG = UNKNOWN_LETTER


def codes_of(sent: dict) -> list[str]:
    rig = Rig()
    rig.put({"i1": 1})
    rig.send(sent)
    rig.run()
    reply = rig.reply()
    assert reply.status == "ok"
    for warning in reply.warnings:
        assert rig.metric("edje_reply_warnings_total", code=warning.code) == 1
    return [warning.code for warning in reply.warnings]


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("a dog", []),
        (f"{DOG} dog", []),
        (DOG * 3, ["query_not_understood"]),
        ("???", ["query_not_understood"]),
        ("   ", ["query_not_understood"]),
        ("a dog " * 10, ["query_cut"]),
        (DOG * 60, ["query_not_understood", "query_cut"]),
    ],
)
def test_a_query_of_which_nothing_is_understood_or_whose_end_is_cut_is_warned_about(text, codes):
    assert codes_of(request(["i1"], text=text)) == codes


def test_candidates_that_are_not_understood_or_cut_are_counted_in_a_warning():
    sent = image_request("i1", ["a dog", DOG, "", "a cat " * 10])

    assert codes_of(sent) == ["candidates_not_understood", "candidates_cut"]


def test_a_query_without_any_piece_is_an_error():
    def nothing(texts: Sequence[str]) -> list[EncodedText]:
        return [EncodedText(ids=(1, 2), num_unknown=0, is_cut=False) for _ in texts]

    rig = Rig(encode_batch=nothing)
    rig.put({"i1": 1})
    rig.send(request(["i1"], text="?!"))
    rig.send(image_request("i1", ["?!"], "r2"))
    rig.run()

    replies = {reply.request_id: reply for reply in rig.replies()}
    assert (replies["r1"].status, replies["r1"].error.code) == ("error", "query_empty")
    assert replies["r2"].status == "ok"
    assert rig.is_idle()
