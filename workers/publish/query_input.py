"""Parses the input of the commands: a rerank request, image ids.

Raises `ValueError` that describes invalid input. Knows nothing of Kafka.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from pydantic import TypeAdapter, ValidationError

from protocols.events import Candidate, Query, RerankRequest
from protocols.fields import Id
from protocols.validation import first_problem

_ID: TypeAdapter[str] = TypeAdapter(Id)


def candidates_of(
    ids: str | None, texts: Sequence[str], lines: Iterable[str] | None, *, for_image: bool
) -> list[Candidate]:
    """Return the candidates from one source: ids separated by commas, texts, or lines with one candidate each.

    A line may end in a tab and the first-stage score.
    """
    if ids is not None and for_image:
        raise ValueError("--candidates takes image ids; with --image give --texts, or lines of text")
    if texts and not for_image:
        raise ValueError("--texts needs --image; the candidates of a text query are images")
    if ids is not None:
        return [Candidate(image_id=image_id.strip()) for image_id in ids.split(",") if image_id.strip()]
    if texts:
        return [Candidate(text=text) for text in texts]
    if lines is None:
        raise ValueError("no candidates: give --candidates, --texts, --candidates-file or standard input")
    return [_candidate(line.rstrip("\r\n"), for_image) for line in lines if line.strip()]


def request_of(
    text: str | None,
    image_id: str | None,
    candidates: list[Candidate],
    *,
    top_n: int | None = None,
    deadline_ms: int | None = None,
    priority: int = 0,
    reply_topic: str | None = None,
    now: datetime | None = None,
) -> RerankRequest:
    """Return the request under a new id; the deadline counts from `now`."""
    if (text is None) == (image_id is None):
        raise ValueError("give a text to rank images for, or --image to rank texts for")
    start = now or datetime.now(UTC)
    try:
        return RerankRequest(
            request_id=uuid.uuid4().hex,
            query=Query(text=text, image_id=image_id),
            candidates=candidates,
            top_n=top_n,
            deadline=start + timedelta(milliseconds=deadline_ms) if deadline_ms is not None else None,
            priority=priority,
            reply_topic=reply_topic,
        )
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


def image_ids_of(lines: Iterable[str]) -> list[str]:
    """Return the distinct image ids of lines with one id each. Raises `ValueError` for an invalid id."""
    ids = dict.fromkeys(line.strip() for line in lines if line.strip())
    for image_id in ids:
        try:
            _ID.validate_python(image_id)
        except ValidationError as error:
            raise ValueError(f"{image_id[:40]!r} is not an image id: {first_problem(error)}") from None
    return list(ids)


def _candidate(line: str, for_image: bool) -> Candidate:
    name, tab, number = line.rpartition("\t")
    if not tab:
        return Candidate(text=line) if for_image else Candidate(image_id=line.strip())
    try:
        score = float(number)
    except ValueError:
        raise ValueError(f"{number[:40]!r} after the tab is not a first-stage score") from None
    return Candidate(text=name, score=score) if for_image else Candidate(image_id=name.strip(), score=score)
