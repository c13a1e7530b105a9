"""The rerank job with every thread under the test's control: fetches land and batches run when the test calls for it.

The engine's logits are small whole numbers computed from the text and from the tokens that are in the slot at that
moment. So ties are common, and a slot that is overwritten too early gives a wrong score.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from edje.calibration import Calibration, sigmoid
from edje.text import EncodedText
from protocols.blob import BlobLayout, blob_key, encode_blob
from protocols.encoding import CONTENT_TYPE_HEADER, MSGPACK, content_type_of, decode
from protocols.events import RerankResponse
from protocols.topics import Topics
from trt.contract import EngineInfo, QueryStates, check_pairs, check_texts
from trt.slab.host import HostSlab
from trt.slab.layout import SlotLayout
from workers.dead_letters import DeadLetters
from workers.landing import Landing
from workers.metrics import Metrics
from workers.ports import Finished, Headers, Interval, Outgoing, Partition, Record
from workers.rerank.admission import AdmissionLimits
from workers.rerank.batching import MicroBatcher
from workers.rerank.explaining import Words
from workers.rerank.fetching import Read
from workers.rerank.invalidation import Invalidation
from workers.rerank.job import RerankBounds, RerankJob
from workers.rerank.loading import SlabLoader, StartFetch
from workers.rerank.replies import Replies
from workers.rerank.request import Piece
from workers.rerank.scoring import BatchScorer
from workers.rerank.spans import RerankSpans
from workers.rerank.texts import EncodeBatch, TextEncoder
from workers.store.memory import MemoryStore
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.tracer import Tracer

TOPICS = Topics("")
PARTITION = Partition(TOPICS.rerank_requests, 0)
LAYOUT = BlobLayout(model_digest="m1", num_tokens=2, token_dim=4, storage="fp16")
START, WALL_START = 1000.0, 1_800_000_000.0
MAX_TEXT_TOKENS, VOCAB_SIZE = 40, 128
NAN_IMAGE = 2000  # the number of an image that the engine cannot score
UNKNOWN_LETTER = "\N{DOG FACE}"
BAD_TEXT = "a text on which the tokenizer fails"


def encode_text(text: str) -> Sequence[int]:
    return [1, *(ord(letter) % 100 + 3 for letter in text[: MAX_TEXT_TOKENS - 2]), 2]


def encode_texts(texts: Sequence[str]) -> list[EncodedText]:
    """Tokenise into one piece per character."""
    if BAD_TEXT in texts:
        raise ZeroDivisionError("a bug of the tokenizer")
    return [
        EncodedText(
            ids=tuple(encode_text(text)),
            num_unknown=text[: MAX_TEXT_TOKENS - 2].count(UNKNOWN_LETTER),
            is_cut=len(text) > MAX_TEXT_TOKENS - 2,
        )
        for text in texts
    ]


def logit_of(ids: Sequence[int], image: float) -> float:
    return float("nan") if image == NAN_IMAGE else (image * 7 + sum(ids) * 13) % 11 - 5


def blob_of(number: int, layout: BlobLayout = LAYOUT) -> bytes:
    """The tokens of an image that the engine sees as this number, which is its content's SHA-256 too."""
    tokens = np.full((layout.num_tokens, layout.token_dim), number, np.float32)
    return encode_blob(layout, tokens, number.to_bytes(32))


class Engine:
    """Scores by `logit_of` and records the number of pairs of each call."""

    def __init__(self, num_slots: int, max_pairs: int, *, explains: bool = False) -> None:
        self._explains = explains
        self.slab = HostSlab(SlotLayout("fp16", LAYOUT.num_tokens, LAYOUT.token_dim), num_slots)
        self.info = EngineInfo("constant", "m1", "e1", 2, 4, "fp16", 8, MAX_TEXT_TOKENS, 1, max_pairs, num_slots)
        self.calls: list[int] = []
        self.error: Exception | None = None

    def can_explain(self) -> bool:
        return self._explains

    def token_similarities(
        self, texts: Sequence[Sequence[int]], pair_query: np.ndarray, pair_slot: np.ndarray
    ) -> list[np.ndarray]:
        """A thousandth of the text id, and a tenth of the image's number, in the second visual token."""
        images = self.slab.tokens.view(np.float16)[pair_slot, 0].astype(float)
        return [
            np.stack((np.array(texts[q]) / 1000, np.full(len(texts[q]), v / 10)), axis=1).astype(np.float32)
            for q, v in zip(pair_query, images, strict=True)
        ]

    def warm_up(self) -> None:
        """Always warm."""

    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> QueryStates:
        check_texts(self.info, text_ids, VOCAB_SIZE)
        return QueryStates(list(text_ids))

    def score_pairs(
        self,
        queries: QueryStates,
        pair_query: np.ndarray,
        pair_slot: np.ndarray,
    ) -> np.ndarray:
        texts: Any = queries
        check_pairs(self.info, pair_query, pair_slot, len(texts))
        self.calls.append(len(pair_query))
        if self.error is not None:
            raise self.error
        images = self.slab.tokens.view(np.float16)[pair_slot, 0].astype(float)
        return np.array([logit_of(texts[q], v) for q, v in zip(pair_query, images, strict=True)], np.float32)


def words_of(text: str) -> list[tuple[str, list[int]]]:
    """The words of a text, and the positions of their pieces: one piece per character, [CLS] first."""
    words, position = [], 1
    for word in text[: MAX_TEXT_TOKENS - 2].split(" "):
        words.append((word, list(range(position, position + len(word)))))
        position += len(word) + 1
    return [(word, pieces) for word, pieces in words if word]


class InlineExecutor(Executor):
    """Runs each call at once, on the caller's thread."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        hand = HandExecutor()
        future = hand.submit(function, *args, **kwargs)
        hand.run_next()
        return future


class HandExecutor(Executor):
    """Runs submitted calls one by one, when the test calls `run_next`."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: function(*args, **kwargs)))
        return future

    def run_next(self) -> None:
        future, call = self.waiting.popleft()
        try:
            result = call()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)


class HandFetches:
    """Reads the store when the test calls `land`, in any order."""

    def __init__(self, store: MemoryStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self.waiting: list[tuple[Future[Read], Sequence[str]]] = []
        self.started_at: dict[int, float] = {}  # by future
        self.asked: list[str] = []

    def start(self, keys: Sequence[str]) -> Future[Read]:
        future: Future[Read] = Future()
        self.waiting.append((future, keys))
        self.started_at[id(future)] = self._clock()
        self.asked.extend(keys)
        return future

    def land(self, number: int = 0) -> None:
        future, keys = self.waiting.pop(number)
        self.answer(future, self._store.get_many(keys))

    def answer(self, future: Future[Read], blobs: Sequence[bytes | None]) -> None:
        """End a fetch with these blobs."""
        interval = Interval(self.started_at[id(future)], self._clock())
        future.set_result(Read(blobs, interval, num_attempts=1))


class Rig:
    """A job with its ports and its clock."""

    def __init__(
        self,
        *,
        num_slots: int = 64,
        piece_pairs: int = 4,
        max_batch_pairs: int = 8,
        max_inflight_pairs: int = 1000,
        max_inflight_bytes: int = 64 << 20,
        max_request_bytes: int = 32 << 20,
        max_fetches: int = 4,
        max_candidates: int = 2000,
        max_message_bytes: int = 1 << 20,
        deadline_tolerance_s: float = 0.0,
        allowed_reply_topics: tuple[str, ...] = ("mine.*",),
        engine: Any = None,
        layout: BlobLayout = LAYOUT,
        encode_batch: EncodeBatch = encode_texts,
        words: Words = words_of,
        text_executor: Executor | None = None,
        executor: Executor | None = None,
        store: MemoryStore | None = None,
        start_fetch: StartFetch | None = None,
        metrics: Metrics | None = None,
        tokenizer_cache_size: int = 100,
        calibration: Calibration | None = None,
        make_tracer: Callable[[Rig], Tracer] = lambda rig: Tracer.off(rig.metrics.bad_traceparents.inc),
    ) -> None:
        self.now = START
        self.store = store or MemoryStore()
        self.metrics = metrics or Metrics()
        self.engine = engine or Engine(num_slots, max_batch_pairs)
        self.executor: Any = executor or HandExecutor()
        self.text_executor = text_executor or InlineExecutor()
        self.fetches = HandFetches(self.store, lambda: self.now)
        tracer = make_tracer(self)
        spans = RerankSpans(tracer, BusSpans(tracer, topic=PARTITION.topic, group_id="g"), "e1")
        self.num_slots = num_slots
        self.landing = Landing(lambda: None)
        self.loader = SlabLoader(
            slab=self.engine.slab,
            layout=layout,
            num_slots=num_slots,
            start_fetch=start_fetch or self.fetches.start,
            landing=self.landing,
            metrics=self.metrics,
            spans=spans,
        )
        self.invalidation = Invalidation(self.loader, model_digest=layout.model_digest, metrics=self.metrics)
        self.job = RerankJob(
            limits=AdmissionLimits(
                model_digest=layout.model_digest,
                max_request_bytes=max_request_bytes,
                max_candidates=max_candidates,
                max_text_chars=100,
                deadline_tolerance_s=deadline_tolerance_s,
                reply_topic=TOPICS.rerank_responses,
                allowed_reply_topics=allowed_reply_topics,
                reads_first_stage=()
                if calibration is None
                else [direction for direction, each in calibration.by_direction() if each.first_stage_gain > 0],
            ),
            bounds=RerankBounds(
                max_inflight_pairs=max_inflight_pairs,
                max_inflight_bytes=max_inflight_bytes,
                max_fetches=max_fetches,
                max_ready_pairs=2 * max_batch_pairs,
                piece_pairs=piece_pairs,
            ),
            num_visual_tokens=layout.num_tokens,
            landing=self.landing,
            texts=TextEncoder(
                encode_batch,
                executor=self.text_executor,
                landing=self.landing,
                cache_size=tokenizer_cache_size,
            ),
            loader=self.loader,
            invalidation=self.invalidation,
            batcher=MicroBatcher[Piece](max_tokens=10_000, max_pairs=max_batch_pairs, max_wait_s=0.002),
            scorer=BatchScorer(self.engine, executor=self.executor, landing=self.landing, clock=lambda: self.now),
            replies=Replies(
                reply_topic=TOPICS.rerank_responses,
                dead_letters=DeadLetters(TOPICS.dead_letter, max_message_bytes, self.metrics),
                model_digest=layout.model_digest,
                engine_digest="e1",
                calibration=calibration,
                metrics=self.metrics,
                spans=spans,
            ),
            metrics=self.metrics,
            spans=spans,
            words=words,
            wall_clock=lambda: WALL_START + self.now - START,
        )
        self.finished: list[Finished] = []
        self._num_sent = 0

    def put(self, images: Mapping[str, int]) -> None:
        """Store images by name, each seen by the engine as its number."""
        self.put_blobs({name: blob_of(number) for name, number in images.items()})

    def put_blobs(self, blobs: Mapping[str, bytes]) -> None:
        self.store.put_many({blob_key("m1", name): blob for name, blob in blobs.items()})

    def send(
        self,
        request: Mapping[str, Any] | bytes | None,
        headers: Headers = (),
        partition: Partition = PARTITION,
        key: bytes | None = b"key",
    ) -> Record:
        """Pass the job a message, encoded as JSON unless it is bytes or None."""
        value = request if isinstance(request, bytes | None) else json.dumps(request).encode()
        record = Record(partition, self._num_sent, key, value, headers, 0)
        self._num_sent += 1
        self.job.accept(record, self.now)
        return record

    def turn(self) -> None:
        """Turn the job, and again while it asks for another turn at once."""
        for _ in range(10_000):
            self.finished.extend(self.job.turn(self.now))
            if self.job.wants_turn_in_s(self.now) != 0.0:
                return
        raise AssertionError("the job asks to be turned for ever")

    def run(self) -> None:
        """Turn the job until nothing is in work. It is turned only when something has happened or it asked for it."""
        self.turn()
        texts = self.text_executor if isinstance(self.text_executor, HandExecutor) else HandExecutor()
        while (
            self.job.num_active()
            or self.executor.waiting
            or texts.waiting
            or (self.fetches.waiting and not self.store.away)
        ):
            if texts.waiting:
                texts.run_next()
            elif self.fetches.waiting and not self.store.away:
                self.fetches.land()
            elif self.executor.waiting:
                self.executor.run_next()
            else:
                self.let_time_pass()
            self.turn()

    def let_time_pass(self) -> None:
        wait_s = self.job.wants_turn_in_s(self.now)
        assert wait_s is not None, "requests are in work and nothing would ever move them"
        self.now += wait_s + 1e-6

    def messages(self, topic: str) -> list[Outgoing]:
        return [message for done in self.finished for message in done.messages if message.topic == topic]

    def replies(self, topic: str = TOPICS.rerank_responses) -> list[RerankResponse]:
        return [response_of(message) for message in self.messages(topic)]

    def reply(self, topic: str = TOPICS.rerank_responses) -> RerankResponse:
        """Return the only reply."""
        (reply,) = self.replies(topic)
        return reply

    def dead_letters(self) -> list[Outgoing]:
        return self.messages(TOPICS.dead_letter(TOPICS.rerank_requests))

    def is_idle(self) -> bool:
        """Whether no request, pair or pin is left."""
        return (
            self.job.num_active() == 0
            and self.job.num_inflight_pairs() == 0
            and self.loader._table.num_available() == self.num_slots
        )

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def response_of(message: Outgoing) -> RerankResponse:
    return decode(RerankResponse, message.value, content_type_of(message.headers))


def header(message: Outgoing, name: str) -> str:
    (value,) = [value for given, value in message.headers if given == name]
    return value.decode()


def request(images: Iterable[str], request_id: str = "r1", text: str = "a dog", **others: Any) -> dict[str, Any]:
    candidates = [{"image_id": image} for image in images]
    return {"request_id": request_id, "query": {"text": text}, "candidates": candidates, **others}


def image_request(image: str, texts: Iterable[str], request_id: str = "r1", **others: Any) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "query": {"image_id": image},
        "candidates": [{"text": t} for t in texts],
        **others,
    }


def expected(sent: Mapping[str, Any], images: Mapping[str, int]) -> dict[str, Any]:
    """The expected fields of the reply to a request, computed directly."""
    text, image = sent["query"].get("text"), sent["query"].get("image_id")
    logits, missing = {}, []
    for index, candidate in enumerate(sent["candidates"]):
        name = candidate.get("image_id", image)
        if name in images:
            logits[index] = logit_of(encode_text(candidate.get("text", text)), images[name])
        elif name not in missing:
            missing.append(name)
    order = sorted(logits, key=lambda index: (-logits[index], index))[: sent.get("top_n")]
    return {
        "status": "partial" if missing else "ok",
        "missing": missing,
        "results": [(index, sent["candidates"][index].get("image_id"), logits[index]) for index in order],
    }


def content_of(reply: RerankResponse) -> dict[str, Any]:
    """Return the fields of a reply that `expected` computes."""
    for result in reply.results:
        assert abs(result.relevance_score - float(sigmoid(np.float32([result.logit]))[0])) < 1e-6
    return {
        "status": reply.status,
        "missing": reply.missing,
        "results": [(result.index, result.id, result.logit) for result in reply.results],
    }


MSGPACK_HEADER: Headers = ((CONTENT_TYPE_HEADER, MSGPACK.encode()),)
