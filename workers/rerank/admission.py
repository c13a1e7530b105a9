"""Reads rerank requests: decodes a record, checks the request and lays out its pairs.

Pure: knows no broker, no engine and no tokenizer; time is an argument. Every refusal is a `Poison` with a code and a
sentence.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from edje.calibration import Direction
from edje.first_stage_scores import FAULT_MESSAGES, standardise
from protocols.encoding import JSON, MSGPACK, EventError, content_type_of, decode
from protocols.events import RerankRequest
from protocols.fields import MAX_PARTITION, TOPIC_NAME
from protocols.salvage import salvage, salvage_id
from workers.errors import Poison
from workers.ports import Record
from workers.rerank.request import Request
from workers.telemetry.tracer import MessageTrace

#: Lists and objects of a request in addition to those of its candidates; also counts brackets inside texts.
_SPARE_CONTAINERS = 10_000


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The limits of one request, and the models, topics and directions that this worker serves."""

    model_digest: str
    max_request_bytes: int
    max_candidates: int
    max_text_chars: int  # of the query, and of each text candidate
    deadline_tolerance_s: float  # allowed difference between the clocks of producer and worker
    reply_topic: str  # the default
    allowed_reply_topics: tuple[str, ...]  # patterns of topic names
    reads_first_stage: Collection[Direction]  # the directions whose ranking uses first-stage scores


def open_request(record: Record, trace: MessageTrace, limits: AdmissionLimits, now: float) -> Request:
    """Return the request of a record before its value is read, so that errors can be answered."""
    content_type = content_type_of(record.headers)
    return Request(
        record=record,
        trace=trace,
        accepted_at=now,
        content_type=content_type if content_type in (JSON, MSGPACK) else JSON,
        reply_topic=limits.reply_topic,
    )


def read_request(request: Request, limits: AdmissionLimits, *, now: float, wall_now: float) -> None:
    """Read the record's value into the request. Raises `Poison`.

    `now` is the loop's time, `wall_now` the seconds since 1970. The reply address is set first, so that any later
    refusal can be sent to it.
    """
    record = request.record
    try:
        event = decode(
            RerankRequest,
            record.value,
            content_type_of(record.headers),
            max_bytes=limits.max_request_bytes,
            max_containers=limits.max_candidates + _SPARE_CONTAINERS,
        )
    except EventError as error:
        raise Poison(error.code, str(error)) from error
    request.request_id = event.request_id
    if event.reply_topic is not None:
        if not _is_allowed(event.reply_topic, limits):
            raise Poison("reply_topic_not_allowed", f"replies may not go to the topic {event.reply_topic!r}")
        request.reply_topic = event.reply_topic
    request.reply_partition = event.reply_partition
    _check(event, limits)
    if event.deadline is not None:
        request.deadline = now + (event.deadline.timestamp() - wall_now) + limits.deadline_tolerance_s
    request.top_n, request.priority, request.explain = event.top_n, event.priority, event.explain
    _lay_out(request, event, limits)


def salvage_address(request: Request, limits: AdmissionLimits) -> None:
    """Read as much as possible of the id and the reply address of a request that is not valid as a whole."""
    value = request.record.value
    request.request_id = salvage_id(value, request.record.key, "request_id")
    topic, partition = salvage(value, "reply_topic"), salvage(value, "reply_partition")
    if isinstance(topic, str) and re.fullmatch(TOPIC_NAME, topic) and _is_allowed(topic, limits):
        request.reply_topic = topic
    if isinstance(partition, int) and 0 <= partition <= MAX_PARTITION:
        request.reply_partition = partition


def _is_allowed(topic: str, limits: AdmissionLimits) -> bool:
    if topic == limits.reply_topic:
        return True
    # Kafka allows no topic with these two names, even if the patterns match them.
    return topic not in (".", "..") and any(
        fnmatch.fnmatchcase(topic, pattern) for pattern in limits.allowed_reply_topics
    )


def _check(event: RerankRequest, limits: AdmissionLimits) -> None:
    if event.model is not None and event.model != limits.model_digest:
        raise Poison(
            "model_not_served", f"the request asks for model {event.model!r}; this worker serves {limits.model_digest}"
        )
    if len(event.candidates) > limits.max_candidates:
        raise Poison(
            "too_many_candidates",
            f"{len(event.candidates)} candidates; at most {limits.max_candidates} are accepted",
        )
    longest = max(map(len, event.texts()), default=0)
    if longest > limits.max_text_chars:
        whose = "the query" if event.query.text is not None else "a candidate's text"
        raise Poison("text_too_long", f"{whose} has {longest} characters; at most {limits.max_text_chars} are accepted")


def _lay_out(request: Request, event: RerankRequest, limits: AdmissionLimits) -> None:
    """Give every distinct candidate a pair."""
    is_text_query = event.query.text is not None
    request.direction = "text-to-image" if is_text_query else "image-to-text"
    asked = event.image_ids() if is_text_query else event.texts()
    request.candidate_ids = asked if is_text_query else event.names()
    distinct = list(dict.fromkeys(asked))
    request.num_pairs = len(distinct)
    if len(distinct) < len(asked):
        numbers = {name: number for number, name in enumerate(distinct)}
        request.pair_of_candidate = np.fromiter(map(numbers.__getitem__, asked), np.intp, len(asked))
    if distinct:
        request.texts = event.texts() if is_text_query else distinct
        request.images = distinct if is_text_query else event.image_ids()
        if request.direction in limits.reads_first_stage:
            _read_first_stage(request, event)
    request.logits = np.zeros(request.num_pairs, np.float32)
    request.scored = np.zeros(request.num_pairs, np.bool_)


def _read_first_stage(request: Request, event: RerankRequest) -> None:
    """Standardise the first-stage scores; of equal candidates the first one's counts. A fault becomes a warning."""
    scores = standardise([candidate.get("score") for candidate in event.candidates])
    values = scores.values
    if request.pair_of_candidate is not None:
        _, first = np.unique(request.pair_of_candidate, return_index=True)
        values = values[first]
    request.first_stage = values
    if scores.fault is not None:
        request.warn(f"first_stage_scores_{scores.fault}", FAULT_MESSAGES[scores.fault])
