"""A whole service in one seeded world: ingest and rerank workers over one in-memory broker and token store.

Images are stored, replaced and removed while requests ask for them; the store and the broker fail, the clock jumps,
partitions move, and workers crash in the middle of calls. A repeated seed repeats the run.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from protocols.blob import blob_key, content_sha256_of
from protocols.dead_letters import OFFSET_HEADER, PARTITION_HEADER
from protocols.encoding import CANCEL_HEADER, encode
from protocols.events import ImageNew, RerankResponse
from protocols.source_position import is_removal_marker
from rerank_harness import LAYOUT, START, TOPICS, WALL_START, response_of
from simulated_bus import Crash, Group, SimulatedBroker, SimulatedWorker
from simulated_jobs import (
    MAX_CONTENTS,
    IngestParts,
    RerankParts,
    SimulatedStore,
    dead_letters,
    number_of_text,
    picture,
)
from workers.metrics import Metrics
from workers.ports import Finished, Outgoing, Partition, Record
from workers.store.memory import MemoryStore
from workers.telemetry.trace_context import trace_id_of

IMAGES = tuple(f"img-{number}" for number in range(5))
TEXTS = ("a", "bb", "c d", "e f g")
#: Requests of the highest priority that may be answered before one of the lowest, while they never stop.
MAX_RUSH_REQUESTS = 100
NUM_WAITING_RUSH_REQUESTS = 24
MAX_IN_WORK = 10_000
METRICS = Metrics()  # one registry for all worlds: making one takes milliseconds


@dataclass(frozen=True, slots=True)
class Event:
    """One event of an image; a `content` of None removes it, a broken one cannot be decoded."""

    number: int  # from 1 on
    content: int | None
    is_broken: bool
    record: Record


@dataclass(slots=True)
class Asked:
    """One request."""

    images: list[str]
    texts: list[str]  # one per candidate
    deadline: float | None
    is_cancelled: bool = False


@dataclass(slots=True)
class WatchedJob:
    """A job that crashes or raises at some records, and reports what it accepts and finishes."""

    world: ServiceWorld
    parts: Any
    floors: dict[tuple[Partition, int], dict[str, int]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parts.job, name)

    def accept(self, record: Record, now: float) -> None:
        if record.value in self.world.killers:
            raise Crash
        if isinstance(self.parts, RerankParts):
            self.floors[record.partition, record.offset] = dict(self.parts.follower.latest)
        self.parts.job.accept(record, now)
        if record.value in self.world.broken:
            raise ZeroDivisionError

    def turn(self, now: float) -> list[Finished]:
        if isinstance(self.parts, RerankParts):
            self.parts.rig.now = now
        finished = self.parts.job.turn(now)
        if isinstance(self.parts, RerankParts):
            for done in finished:
                floors = self.floors.pop((done.record.partition, done.record.offset), {})
                self.world.check_replies(done, floors, now)
        return finished


class ServiceWorld:
    """The broker, the store, the clock, the workers and everything that happens to them, by one seed."""

    def __init__(self, seed: int, *, exactly_once: bool) -> None:
        self.chance = random.Random(seed)
        random.seed(seed)  # for the jitter of retries
        self.exactly_once = exactly_once
        self.metrics = METRICS
        self.now = START
        self.trouble = self.chance.choice([0.0, 0.05, 0.2])
        self.killers: set[bytes | None] = set()
        self.broken: set[bytes | None] = set()
        self.events: list[Event] = []
        self.events_of: dict[str, list[Event]] = {image: [] for image in IMAGES}
        self.num_contents = 0
        self.asked: dict[str, Asked] = {}
        self.published: Counter[tuple[str, object]] = Counter()  # outcomes: replies, indexed events, dead letters
        self._num_checked: Counter[Partition] = Counter()  # committed records that have been checked
        self._is_interleaving = False
        self._is_settling = False
        self.broker = SimulatedBroker(lambda: self.now, self._note)
        self.store = SimulatedStore(self)
        self.ingest = Group(self, TOPICS.images_new, "ingest", lambda group: self._start(group, IngestParts(self)))
        self.rerank = Group(self, TOPICS.rerank_requests, "rerank", lambda group: self._start(group, RerankParts(self)))
        self.groups = [self.ingest, self.rerank]

    def _start(self, group: Group, parts: Any) -> SimulatedWorker:
        job: Any = WatchedJob(self, parts)
        return SimulatedWorker(self, group, job, dead_letters(self.metrics).finished, parts.steppable)

    # --- what happens ---

    def run(self, num_steps: int = 100) -> None:
        """Let things happen, then let everything settle, then, in some worlds, let urgent requests never stop."""
        for _ in range(num_steps):
            self.happen()
            self.step()
        self._settle()
        if self.chance.random() < 0.3 and not self.exactly_once:  # there a reply waits for the earlier ones
            self._rush()
            self._settle()

    def _settle(self) -> None:
        self.trouble, self.broker.away, self.store.away, self._is_settling = 0.0, False, False, True
        for _ in range(4000):
            if all(group.is_quiet() for group in self.groups) and not self._has_tasks():
                return
            self.step()
        raise AssertionError("something waits for ever")

    def _has_tasks(self) -> bool:
        return any(part.waiting for group in self.groups for worker in group.workers for part in worker.steppable)

    def happen(self) -> None:
        chance = self.chance.random()
        if chance < 0.25:
            self.publish_image()
        elif chance < 0.55:
            self.publish_request()
        elif chance < 0.58:
            self.broker.away = not self.broker.away
        elif chance < 0.62:
            self.store.away = not self.store.away
        elif chance < 0.65:
            self.now += self.chance.choice([1.0, 30.0, 900.0])
        elif chance < 0.75:
            self.chance.choice(self.groups).revoke(lost=self.chance.random() < 0.4)
        elif chance < 0.78:
            group = self.chance.choice(self.groups)
            group.crash(self.chance.choice(group.workers))
        elif chance < 0.80:
            worker: Any = self.chance.choice(self.rerank.workers)
            worker.job.parts.follower.lose(self.chance.randrange(self.broker.num_partitions))

    def interleave(self) -> None:
        """Let other threads and processes go on in the middle of a call."""
        if self._is_interleaving or self.chance.random() < 0.7:
            return
        self._is_interleaving = True
        for _ in range(self.chance.choice([1, 3, 12])):
            if not self._is_settling:
                self.happen()
            self.step()
        self._is_interleaving = False

    def publish_image(self) -> None:
        image, kind = self.chance.choice(IMAGES), self.chance.random()
        number, earlier = len(self.events) + 1, self.events_of[image]
        content: int | None = None
        if kind < 0.15 or self.num_contents + 1 >= MAX_CONTENTS:
            value = None
        else:
            repeated = [event.content for event in earlier if event.content is not None and not event.is_broken]
            if kind < 0.35 and repeated:
                content = self.chance.choice(repeated)
            else:
                self.num_contents += 1
                content = self.num_contents
            if kind > 0.95:
                event = ImageNew(image_id=image, data=b"no picture %d" % number)
            elif kind > 0.6:
                uri = f"http://host-{self.chance.randrange(2)}/{content}"
                event = ImageNew(image_id=image, uri=uri, metadata={"event": str(number)})
            else:
                event = ImageNew(image_id=image, data=picture(content), metadata={"event": str(number)})
            value = encode(event)
            self._perhaps_harmful(value)
        headers = (("traceparent", b"00-%032x-%016x-01" % (number, 1)),)
        record = self.broker.append(Outgoing(TOPICS.images_new, image.encode(), value, headers))
        self.events.append(Event(number, content, kind > 0.95 and value is not None, record))
        earlier.append(self.events[-1])

    def _perhaps_harmful(self, value: bytes) -> None:
        kind = self.chance.random()
        if kind < 0.02 and not self.killers:
            self.killers.add(value)
        elif kind < 0.05:
            self.broken.add(value)

    def publish_request(self, *, priority: int | None = None, partition: int | None = None) -> str:
        chance, request_id = self.chance, f"r-{len(self.asked)}"
        is_plain = priority is not None
        if not is_plain and self.asked and chance.random() < 0.05:
            withdrawn = chance.choice(list(self.asked))
            self.asked[withdrawn].is_cancelled = True
            self.broker.append(
                Outgoing(TOPICS.rerank_requests, withdrawn.encode(), None, ((CANCEL_HEADER, b"1"),), partition)
            )
            return withdrawn
        deadline = None if is_plain or chance.random() < 0.7 else self.now + chance.choice([-1.0, 0.3, 2.0, 60.0])
        request: dict[str, Any] = {
            "request_id": request_id,
            "priority": chance.choice([0, 0, 5, 9]) if priority is None else priority,
        }
        if deadline is not None:
            request["deadline"] = datetime.fromtimestamp(WALL_START + deadline - START, UTC).isoformat()
        if not is_plain and chance.random() < 0.2:
            texts = chance.sample(TEXTS, chance.randint(1, 3))
            images = [chance.choice(IMAGES)] * len(texts)
            request |= {"query": {"image_id": images[0]}, "candidates": [{"text": text} for text in texts]}
        else:
            images = chance.sample(IMAGES, chance.randint(1, len(IMAGES)))
            texts = [chance.choice(TEXTS)] * len(images)
            request |= {"query": {"text": texts[0]}, "candidates": [{"image_id": image} for image in images]}
        value = json.dumps(request).encode()
        if not is_plain:
            self._perhaps_harmful(value)
        self.asked[request_id] = Asked(images, texts, deadline)
        self.broker.append(Outgoing(TOPICS.rerank_requests, request_id.encode(), value, (), partition))
        return request_id

    def _rush(self) -> None:
        """Publish urgent requests without an end; one that is not urgent is answered all the same."""
        number = self.chance.randrange(self.broker.num_partitions)
        urgent: list[str] = []
        patient, num_answered = "", 0
        for _ in range(4000):
            still_urgent = [request_id for request_id in urgent if not self.is_answered(request_id)]
            num_answered += len(urgent) - len(still_urgent)
            urgent = still_urgent
            while len(urgent) < NUM_WAITING_RUSH_REQUESTS:
                urgent.append(self.publish_request(priority=9, partition=number))
            patient = patient or self.publish_request(priority=0, partition=number)
            self.step()
            if self.is_answered(patient):
                return
            assert num_answered <= MAX_RUSH_REQUESTS, f"{patient} of the lowest priority waits behind {num_answered}"
        raise AssertionError(f"{patient} waits for ever")

    def step(self) -> None:
        self.now += self.chance.choice([0.0, 0.01, 0.1, 0.5])
        for group in self.groups:
            group.step()
        self.check()

    # --- what holds ---

    def event_of(self, record: Record) -> int:
        """Return the number of the image event that a record of `images.indexed` answers."""
        return int(trace_id_of(record.headers), 16)

    def _note(self, record: Record) -> None:
        topic = record.partition.topic
        if topic == TOPICS.rerank_responses:
            self.published["reply", (record.key or b"").decode()] += 1
        elif topic == TOPICS.images_indexed:
            self.published["indexed", self.event_of(record)] += 1
        elif topic in (TOPICS.dead_letter(TOPICS.images_new), TOPICS.dead_letter(TOPICS.rerank_requests)):
            headers = dict(record.headers)
            offset = int(headers[PARTITION_HEADER]), int(headers[OFFSET_HEADER])
            self.published[topic, offset] += 1

    def is_answered(self, request_id: str) -> bool:
        return self.published["reply", request_id] > 0

    def _has_outcome(self, record: Record) -> bool:
        letter = TOPICS.dead_letter(record.partition.topic), (record.partition.number, record.offset)
        if self.published[letter]:
            return True
        if record.partition.topic == TOPICS.rerank_requests:
            return record.value is None or self.is_answered((record.key or b"").decode())
        events = self.events_of[(record.key or b"").decode()]
        number = next(event.number for event in events if event.record.offset == record.offset)
        # An event that is superseded publishes nothing.
        return self.published["indexed", number] > 0 or number < events[-1].number

    def check(self) -> None:
        """What holds at every moment: no offset is committed before its record has an outcome."""
        for (_, partition), commit in self.broker.committed.items():
            log = self.broker.partition_log(*partition)
            for record in log[self._num_checked[partition] : commit.offset]:
                assert self._has_outcome(record), f"{record.partition} {record.offset} is committed without an outcome"
            self._num_checked[partition] = max(self._num_checked[partition], commit.offset)
        for group in self.groups:
            group.check_bounds(MAX_IN_WORK)

    def check_replies(self, done: Finished, floors: dict[str, int], now: float) -> None:
        """Check the replies to one request; `floors` are the image events followed before it was accepted."""
        replies = [message for message in done.messages if message.topic == TOPICS.rerank_responses]
        request_id = (done.record.key or b"").decode()
        if done.record.value is None:
            assert replies == []
            return
        assert len(replies) == 1, f"{request_id} has {len(replies)} replies"
        reply, asked = response_of(replies[0]), self.asked[request_id]
        if reply.status == "expired":
            is_late = asked.deadline is not None and now >= asked.deadline - 1e-3
            assert is_late or asked.is_cancelled, f"{request_id} expired before its deadline"
        elif reply.status == "error":
            assert reply.error is not None
            assert reply.error.code in ("internal_error", "worker_died"), reply.error
        else:
            self._check_ranking(request_id, reply, asked, floors)

    def _check_ranking(self, request_id: str, reply: RerankResponse, asked: Asked, floors: dict[str, int]) -> None:
        for result in reply.results:
            image, text = asked.images[result.index], asked.texts[result.index]
            content = result.logit - 256 * number_of_text(text)
            events = [event for event in self.events_of[image] if event.number >= floors.get(image, 0)]
            contents = {event.content for event in events if not event.is_broken}
            assert content in contents, (
                f"{request_id}: {image} was scored by content {content}, not by one of event {floors.get(image)} "
                f"and later: {contents}"
            )
        for image in reply.missing:
            is_removed = any(event.content is None for event in self._since(image, floors.get(image, 0)))
            assert image not in floors or is_removed, f"{request_id}: {image} is in the store and missing"
        scored = {result.index for result in reply.results}
        left_out = {index for index, image in enumerate(asked.images) if image in reply.missing}
        assert scored | left_out == set(range(len(asked.images))), f"{request_id} lacks candidates"
        assert not scored & left_out

    def _since(self, image: str, number: int) -> list[Event]:
        return [event for event in self.events_of[image] if event.number >= number]

    def verify(self) -> None:
        """What holds at the end: one outcome per message, the later event in the store, and the bounds balance."""
        for topic in (TOPICS.images_new, TOPICS.rerank_requests):
            for record in self.broker.log(topic):
                assert self._has_outcome(record), f"{record.partition} {record.offset} has no outcome"
        if self.exactly_once:
            twice = [outcome for outcome, count in self.published.items() if count > 1]
            assert twice == [], f"published twice: {twice}"
        for image in IMAGES:
            self._verify_stored(image)
        for group in self.groups:
            for worker in group.workers:
                worker.verify()
                job: Any = worker.job
                job.parts.verify()

    def _verify_stored(self, image: str) -> None:
        """The store has the latest event of an image that did not fail."""
        (value,) = MemoryStore.get_many(self.store, [blob_key(LAYOUT.model_digest, image)])
        stored = None if value is None or is_removal_marker(value) else content_sha256_of(LAYOUT, value)
        possible: list[int | None] = []
        for event in reversed(self.events_of[image]):
            if event.is_broken:
                continue
            position = event.record.partition.number, event.record.offset
            is_dead = self.published[TOPICS.dead_letter(TOPICS.images_new), position]
            is_indexed = self.published["indexed", event.number]
            if is_indexed or is_dead:
                possible.append(event.content)
            if is_indexed:
                break
        else:
            possible.append(None)
        assert stored in [
            None if content is None else hashlib.sha256(picture(content)).digest() for content in possible
        ], f"the store has another content of {image} than one of {possible}"
