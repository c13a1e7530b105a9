"""Events to bytes and back, in JSON or msgpack, as the `content-type` header says.

Every message is treated as hostile: sizes are bounded, and whatever is wrong with one becomes an `EventError`.
Knows nothing of topics and of what an event is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import msgpack
import orjson
from pydantic import TypeAdapter, ValidationError, create_model
from pydantic_core import from_json

from protocols.events import SCHEMA_VERSION, Event, Status, WarningInfo, WordSimilarities
from protocols.fields import MAX_CANDIDATES, MAX_INLINE_BYTES, Id
from protocols.validation import problems_in

CONTENT_TYPE_HEADER = "content-type"
JSON = "application/json"
MSGPACK = "application/msgpack"

#: The largest event read: inline data in base64, and as much again as a candidate list could need.
MAX_EVENT_BYTES = 2 * MAX_INLINE_BYTES
MAX_ERROR_CHARS = 500
_MAX_NAMED_PROBLEMS = 3
_SALVAGE_PREFIX_BYTES = 65_536
_MAX_MAP_ENTRIES = 1_024

_ALIASES = {"text/json": JSON, "application/x-msgpack": MSGPACK, "application/vnd.msgpack": MSGPACK}

EventT = TypeVar("EventT", bound=Event)


class EventError(ValueError):
    """The message is not the event it should be.

    `code` is "undecodable", "unsupported_version", "invalid_event" or "unsupported_content_type".
    The text is short and holds nothing of the message but names of fields.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message[:MAX_ERROR_CHARS])
        self.code = code


def content_type_of(headers: Iterable[tuple[str, bytes]]) -> str:
    """Return what the headers say, without parameters and aliases; JSON where they say nothing."""
    for name, value in headers:
        if name.lower() == CONTENT_TYPE_HEADER:
            media_type = value.decode("utf-8", "replace").partition(";")[0].strip().lower()
            return _ALIASES.get(media_type, media_type) or JSON
    return JSON


def decode(model: type[EventT], value: bytes, content_type: str = JSON) -> EventT:
    """Read one event; raises `EventError`."""
    if len(value) > MAX_EVENT_BYTES:
        raise EventError("undecodable", f"{len(value)} bytes; an event has at most {MAX_EVENT_BYTES}")
    try:
        if content_type == JSON:
            return model.model_validate_json(value)
        if content_type == MSGPACK:
            return model.model_validate(_unpack(value))
    except ValidationError as error:
        raise _event_error(error) from None
    raise EventError("unsupported_content_type", f"content-type {content_type[:100]!r}; use {JSON} or {MSGPACK}")


def encode(event: Event, content_type: str = JSON) -> bytes:
    """Write one event; fields that are None are left out."""
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
    """Write a `RerankResponse` with a ranking, without building one: a fifth of the time of the model.

    `order` holds the candidates' positions in the request, best first; scores and logits are parallel to it, `ids` are
    those of all candidates (`RerankRequest.names()`), `explanations` are by position in the request.
    Unlike the model it does not check ids and digests again.
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


def salvage_id(value: bytes, content_type: str, field: str) -> str | None:
    """Return the id in this field of a message that is not a valid event, or None. Never raises.

    Costs at most what decoding the message has cost; of broken JSON only the first 64 KiB are searched.
    """
    if len(value) > MAX_EVENT_BYTES:
        return None
    try:
        found = _find_in_msgpack(value, field) if content_type == MSGPACK else _find_in_json(value, field)
        return _id_adapter().validate_python(found)
    except (ValueError, msgpack.UnpackException):
        return None


def _find_in_json(value: bytes, field: str) -> Any:
    try:
        # Everything but the one field is parsed and thrown away without becoming Python objects.
        return getattr(_only(field).model_validate_json(value), field)
    except ValidationError:
        partial = from_json(value[:_SALVAGE_PREFIX_BYTES], allow_partial=True)
        return partial.get(field) if isinstance(partial, dict) else None


def _find_in_msgpack(value: bytes, field: str) -> Any:
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_EVENT_BYTES, max_ext_len=0)
    unpacker.feed(value)
    for _ in range(min(unpacker.read_map_header(), _MAX_MAP_ENTRIES)):
        if unpacker.unpack() == field:
            return unpacker.unpack()
        unpacker.skip()
    return None


@cache
def _only(field: str) -> type[Any]:
    return create_model("Only", **{field: (Id, ...)})  # type: ignore[call-overload, no-any-return]


@cache
def _id_adapter() -> TypeAdapter[str]:
    return TypeAdapter(Id)


def _pack(fields: Mapping[str, Any]) -> bytes:
    # The one type of ours that msgpack has no form for is a deadline; as an extension type few clients could read it.
    packed: bytes = msgpack.packb(fields, default=lambda instant: instant.isoformat())
    return packed


def _unpack(value: bytes) -> Any:
    try:
        return msgpack.unpackb(
            value,
            strict_map_key=True,
            max_array_len=MAX_CANDIDATES + 1,  # one more, so that the event itself says that there are too many
            max_map_len=_MAX_MAP_ENTRIES,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
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
        return EventError("unsupported_version", f"only schema_version {SCHEMA_VERSION} is understood; {sentence}")
    return EventError("invalid_event", sentence)
