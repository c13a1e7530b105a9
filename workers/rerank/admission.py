"""Decides whether a rerank request is taken, and lays out the pairs that it asks for.

Pure: text becomes ids through a function that is given, time is an argument. Everything refused is a `Poison` with a
code and a sentence.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocols.events import RerankRequest
from workers.errors import Poison
from workers.rerank.batching import bucket_of

#: Text to ids, [CLS] and [SEP] included, cut to what the engine takes.
Encode = Callable[[str], Sequence[int]]

LARGEST_SCORE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What one request may ask for, and what this worker serves."""

    model_digest: str
    max_candidates: int
    max_text_chars: int  # of the query or of one text candidate
    piece_pairs: int
    deadline_tolerance_s: float  # clocks of producer and worker may differ by this much
    reply_topic: str  # where replies go unless the request says otherwise
    allowed_reply_topics: tuple[str, ...]  # patterns that a request's own reply topic must match
    reads_first_stage: bool  # whether the engine makes anything of the candidates' scores


@dataclass(frozen=True, slots=True)
class PieceLayout:
    """Pairs of one request that travel together: their numbers, and the length bucket of their texts."""

    pairs: Sequence[int]
    bucket: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request, laid out: pair i is text `pair_text(i)` with image `pair_image(i)`."""

    request_id: str
    texts: list[Sequence[int]]  # one for a text query, one per distinct text candidate for an image query
    images: list[str]  # one per distinct image candidate, or the query's one image
    candidate_ids: list[str | None]
    candidate_pairs: list[int] | None  # the pair of each candidate; None: the pair of the same number
    num_pairs: int
    first_stage: NDArray[np.float32] | None  # by pair, NaN where there is no score; None for an engine that reads none
    pieces: list[PieceLayout]
    top_n: int | None
    priority: int
    deadline: float | None  # in the loop's clock
    reply_topic: str

    @property
    def num_candidates(self) -> int:
        """What the request counts for among those in work: equal candidates are one pair, and still take memory."""
        return len(self.candidate_ids)

    def pair_text(self, pair: int) -> int:
        return pair if len(self.texts) > 1 else 0

    def pair_image(self, pair: int) -> int:
        return pair if len(self.images) > 1 else 0


def reply_topic_of(request: RerankRequest, limits: AdmissionLimits) -> str:
    """Where the reply goes. Raises `Poison` for a topic that requests may not name, or that Kafka cannot have."""
    topic = request.reply_topic
    if topic is None or topic == limits.reply_topic:
        return limits.reply_topic
    if topic in (".", "..") or not any(fnmatch.fnmatchcase(topic, pattern) for pattern in limits.allowed_reply_topics):
        raise Poison("reply_topic_not_allowed", f"replies may not go to the topic {topic!r}")
    return topic


def admit(request: RerankRequest, limits: AdmissionLimits, encode: Encode, *, now: float, wall_now: float) -> Admitted:
    """Lay the request out. `now` is the loop's clock, `wall_now` seconds since 1970. Raises `Poison`."""
    reply_topic = reply_topic_of(request, limits)
    if request.model is not None and request.model != limits.model_digest:
        raise Poison("model_not_served", f"model {request.model!r} was asked for; this worker serves another")
    if len(request.candidates) > limits.max_candidates:
        raise Poison(
            "too_many_candidates", f"{len(request.candidates)} candidates; at most {limits.max_candidates} are taken"
        )
    deadline = None
    if request.deadline is not None:
        deadline = now + (request.deadline.timestamp() - wall_now) + limits.deadline_tolerance_s

    is_text_query = request.query.text is not None
    wanted = request.image_ids() if is_text_query else request.texts()
    if not request.candidates:
        wanted = []
    distinct = list(dict.fromkeys(wanted))
    candidate_pairs = None
    if len(distinct) < len(wanted):
        numbers = {name: number for number, name in enumerate(distinct)}
        candidate_pairs = [numbers[name] for name in wanted]
    if is_text_query:
        texts = [_encoded(request.texts()[0], "query", limits, encode)]
        images = distinct
    else:
        texts = [_encoded(text, "candidate", limits, encode) for text in distinct]
        images = request.image_ids() if distinct else []
    return Admitted(
        request_id=request.request_id,
        texts=texts,
        images=images,
        candidate_ids=request.names(),
        candidate_pairs=candidate_pairs,
        num_pairs=len(distinct),
        first_stage=_first_stage(request, candidate_pairs, len(distinct)) if limits.reads_first_stage else None,
        pieces=_pieces(texts, len(distinct), limits.piece_pairs),
        top_n=request.top_n,
        priority=request.priority,
        deadline=deadline,
        reply_topic=reply_topic,
    )


def _encoded(text: str, whose: str, limits: AdmissionLimits, encode: Encode) -> Sequence[int]:
    if len(text) > limits.max_text_chars:
        raise Poison("text_too_long", f"a {whose} text has {len(text)} characters; {limits.max_text_chars} are taken")
    return encode(text)


def _first_stage(request: RerankRequest, candidate_pairs: list[int] | None, num_pairs: int) -> NDArray[np.float32]:
    """Scores by pair; of equal candidates the first one that has a score speaks for all."""
    given = np.array([candidate.get("score") for candidate in request.candidates], np.float64)  # None becomes NaN
    if (np.abs(given) > LARGEST_SCORE).any():
        number = int(np.argmax(np.abs(given) > LARGEST_SCORE))
        raise Poison("score_too_large", f"candidate {number} has the score {given[number]}; float32 must hold it")
    if candidate_pairs is None:
        return given.astype(np.float32)
    scores = np.full(num_pairs, np.nan, np.float32)
    scored = np.flatnonzero(~np.isnan(given))
    pairs, first = np.unique(np.array(candidate_pairs)[scored], return_index=True)
    scores[pairs] = given[scored[first]]
    return scores


def _pieces(texts: Sequence[Sequence[int]], num_pairs: int, piece_pairs: int) -> list[PieceLayout]:
    """Cut the pairs into pieces of one bucket each, in the order of the candidates."""
    if len(texts) == 1:  # a text query; or one text, which is all the same
        bucket = bucket_of(len(texts[0]))
        return [
            PieceLayout(range(start, min(start + piece_pairs, num_pairs)), bucket)
            for start in range(0, num_pairs, piece_pairs)
        ]
    by_bucket: dict[int, list[int]] = {}
    for number, ids in enumerate(texts):
        by_bucket.setdefault(bucket_of(len(ids)), []).append(number)
    return [
        PieceLayout(numbers[start : start + piece_pairs], bucket)
        for bucket, numbers in sorted(by_bucket.items())
        for start in range(0, len(numbers), piece_pairs)
    ]
