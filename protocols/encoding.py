"""Encodes and decodes events, in JSON or msgpack.

Treats every message as hostile: sizes are bounded before parsing, and any fault becomes an `EventError`. Knows nothing
of topics and of what an event is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgpack
import orjson
from pydantic import ValidationError

from protocols.events import SCHEMA_VERSION, Event, Status, WarningInfo, WordSimilarities
from protocols.fields import MAX_CANDIDATES, MAX_INLINE_BYTES
from protocols.validation import problems_in

CONTENT_TYPE_HEADER = "content-type"
#: A record of `rerank.requests` with this header and no value withdraws the request whose id is its key: a worker that
#: has not started it does not score it, and answers `expired`.
CANCEL_HEADER = "edje-cancel"
JSON = "application/json"
MSGPACK = "application/msgpack"

#: The largest event that is decoded: enough for inline data in base64 and for the longest list of candidates.
MAX_EVENT_BYTES = 2 * MAX_INLINE_BYTES
#: Lists and maps of one event: an empty one costs two bytes on the wire and 250 in memory.
MAX_CONTAINERS = 2 * MAX_CANDIDATES
MAX_ERROR_CHARS = 500
_MAX_NAMED_PROBLEMS = 3
_MAX_MAP_ENTRIES = 1_024

_ALIASES = {"text/json": JSON, "application/x-msgpack": MSGPACK, "application/vnd.msgpack": MSGPACK}

EventT = TypeVar("EventT", bound=Event)


class EventError(ValueError):
    """The message is not a valid event of the expected type.

    `code` is "undecodable", "event_too_large", "unsupported_version", "invalid_event" or "unsupported_content_type".
    The text is short and repeats no value of the message.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message[:MAX_ERROR_CHARS])
        self.code = code


def content_type_of(headers: Iterable[tuple[str, bytes]]) -> str:
    """Return the media type of the last content-type header, without parameters and aliases; JSON without a header."""
    content_type = JSON
    for name, value in headers:
        if name.lower() == CONTENT_TYPE_HEADER:
            media_type = value.decode("utf-8", "replace").partition(";")[0].strip().lower()
            content_type = _ALIASES.get(media_type, media_type) or JSON
    return content_type


def decode(
    model: type[EventT],
    value: bytes | None,
    content_type: str = JSON,
    *,
    max_bytes: int = MAX_EVENT_BYTES,
    max_containers: int = MAX_CONTAINERS,
) -> EventT:
    """Decode one event. Raises `EventError`.

    `max_bytes` and `max_containers` (lists and maps, at any depth) bound the time and memory that decoding takes.
    """
    if value is None:
        raise EventError("undecodable", "the value is null, where an event is expected")
    if len(value) > max_bytes:
        raise EventError("event_too_large", f"the event has {len(value)} bytes; at most {max_bytes} are accepted")
    try:
        if content_type == JSON:
            # Brackets inside texts are counted too: an exact count would need to parse the event.
            if value.count(b"[") + value.count(b"{") > max_containers:
                raise _too_many_containers(max_containers)
            return model.model_validate_json(value)
        if content_type == MSGPACK:
            return model.model_validate(_unpack(value, max_containers))
    except ValidationError as error:
        raise _event_error(error) from None
    raise EventError("unsupported_content_type", f"content-type {content_type[:100]!r}; use {JSON} or {MSGPACK}")


def _too_many_containers(limit: int) -> EventError:
    return EventError("event_too_large", f"the event has more than {limit} lists and objects")


def encode(event: Event, content_type: str = JSON) -> bytes:
    """Encode one event, without the fields that are None. Raises `EventError` for an unknown content type."""
    if content_type == JSON:
        return event.model_dump_json(exclude_none=True).encode()
    if content_type == MSGPACK:
        return _pack(event.model_dump(exclude_none=True))
    raise EventError("unsupported_content_type", f"content-type {content_type[:100]!r}; use {JSON} or {MSGPACK}")


def encode_response(
    request_id: str,
    status: Status,
    order: Sequence[int],
    ids: Sequence[str | None],
    relevance_scores: Sequence[float],
    logits: Sequence[float],
    *,
    missing: Sequence[str],
    model: str,
    engine: str,
    timings_ms: Mapping[str, float],
    warnings: Sequence[WarningInfo] = (),
    explanations: Mapping[int, Sequence[WordSimilarities]] | None = None,
    content_type: str = JSON,
) -> bytes:
    """Encode a `RerankResponse` with a ranking without building the model, in a fifth of the time.

    `order` holds the candidates' positions in the request, best first; scores and logits are in the same order. `ids`
    are the ids of all candidates (`RerankRequest.names()`); `explanations` are by position in the request. Ids and
    digests are not validated again. Raises `ValueError` for a score that is not finite.
    """
    if not (all(map(math.isfinite, logits)) and all(map(math.isfinite, relevance_scores))):
        raise ValueError("a score that is not finite cannot be published")
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": score, "logit": logit}
        if (name := ids[index]) is None
        else {"index": index, "id": name, "relevance_score": score, "logit": logit}
        for index, score, logit in zip(order, relevance_scores, logits, strict=True)
    ]
    if explanations:
        for result in results:
            words = explanations.get(result["index"])
            if words is not None:
                result["explanation"] = [{"word": word.word, "similarities": word.similarities} for word in words]
    response = {
        "schema_version": SCHEMA_VERSION,
        "request_id": request_id,
        "status": status,
        "results": results,
        "missing": missing,
        "model": model,
        "engine": engine,
        "timings_ms": timings_ms,
        "warnings": [{"code": warning.code, "message": warning.message} for warning in warnings],
    }
    if content_type == JSON:
        return orjson.dumps(response)
    if content_type == MSGPACK:
        return _pack(response)
    raise EventError("unsupported_content_type", f"content-type {content_type[:100]!r}; use {JSON} or {MSGPACK}")


def _pack(fields: Mapping[str, Any]) -> bytes:
    # A deadline is written as text: few clients read msgpack's extension type for timestamps.
    packed: bytes = msgpack.packb(fields, default=lambda instant: instant.isoformat())
    return packed


def _unpack(value: bytes, max_containers: int) -> Any:
    num_containers = 0

    def count(container: Any) -> Any:
        nonlocal num_containers
        num_containers += 1
        if num_containers > max_containers:
            raise _too_many_containers(max_containers)
        return container

    try:
        return msgpack.unpackb(
            value,
            strict_map_key=True,
            max_array_len=MAX_CANDIDATES + 1,  # one more, so that the model reports that there are too many
            max_map_len=_MAX_MAP_ENTRIES,
            max_ext_len=0,
            ext_hook=_refuse_extension,
            object_hook=count,
            list_hook=count,
        )
    except EventError:
        raise
    except (ValueError, msgpack.UnpackException) as error:
        raise EventError("undecodable", f"not msgpack of the kind events use: {error}") from None


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError("extension types are not used")


def _event_error(error: ValidationError) -> EventError:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    sentence = "; ".join(problems_in(error, root="event", limit=_MAX_NAMED_PROBLEMS))
    if problems[0]["type"] == "json_invalid":
        return EventError("undecodable", sentence)
    if any(problem["loc"] == ("schema_version",) for problem in problems):
        return EventError("unsupported_version", f"only schema_version {SCHEMA_VERSION} is supported; {sentence}")
    return EventError("invalid_event", sentence)
