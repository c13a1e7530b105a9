"""Makes a rerank request of what somebody typed: words, options, lines of a file.

Raises `ValueError` with a sentence for what makes no request. Knows nothing of Kafka.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from protocols.events import Candidate, Query, RerankRequest
from protocols.validation import first_problem


def candidates_of(
    ids: str | None, texts: Sequence[str], lines: Iterable[str] | None, *, for_image: bool
) -> list[Candidate]:
    """The candidates from exactly one of: ids with commas between them, texts, or lines with one candidate each.

    A line may end in a tab and the first-stage score.
    """
    if ids is not None and for_image:
        raise ValueError("--candidates names images; give --texts or lines of text to rank for an image")
    if texts and not for_image:
        raise ValueError("--texts is for --image; the candidates of a text query are images")
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
    """The request, under an id of its own; the deadline counts from `now`."""
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


def _candidate(line: str, for_image: bool) -> Candidate:
    name, tab, number = line.rpartition("\t")
    if not tab:
        return Candidate(text=line) if for_image else Candidate(image_id=line.strip())
    try:
        score = float(number)
    except ValueError:
        raise ValueError(f"{number[:40]!r} behind the tab is no first-stage score") from None
    return Candidate(text=name, score=score) if for_image else Candidate(image_id=name.strip(), score=score)
