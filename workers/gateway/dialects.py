"""Translates the rerank APIs of other services: request bodies to `RerankCall`, and `RerankAnswer` to answer bodies.

The body decides the dialect: `texts` is text-embeddings-inference's, `property` Weaviate's, everything else
Cohere's, Jina's, vLLM's and LiteLLM's, which share one dialect. Pure functions; knows nothing of HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import orjson
from pydantic import ValidationError

from protocols.events import Query
from protocols.fields import MAX_ID_CHARS
from protocols.validation import first_problem
from workers.gateway.bodies import Body, CallOptions, QueryObject, RerankBody, TeiBody, WeaviateBody
from workers.gateway.calls import Document, DocumentKind, RankedDocument, RerankAnswer, RerankCall
from workers.gateway.errors import ApiError

Dialect = Literal["cohere", "tei", "weaviate"]
BodyT = TypeVar("BodyT", bound=Body)

#: Schemes of image addresses; a string that starts with none of them is an id.
_URI_SCHEMES = ("http://", "https://", "s3://", "gs://", "file://")
_USE_IDS = "publish the image first (POST /v1/images) and send its id"


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises `ApiError`."""
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "not_json", f"the body is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ApiError(422, "invalid_request", "the body must be a JSON object")
    return parsed


def validated(kind: type[BodyT], given: Mapping[str, Any]) -> BodyT:
    """Return the body as this model. Raises an `ApiError` that names the first problem."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ApiError(422, "invalid_request", first_problem(error)) from None


def dialect_of(given: Mapping[str, Any]) -> Dialect:
    if "texts" in given:
        return "tei"
    return "weaviate" if "property" in given else "cohere"


def read_call(given: Mapping[str, Any], *, strings_are: DocumentKind, max_documents: int) -> RerankCall:
    """Return the call of a body in any dialect. Raises `ApiError`.

    `strings_are` is the kind of a document that is a plain string.
    """
    dialect = dialect_of(given)
    listed = given.get("texts" if dialect == "tei" else "documents")
    if isinstance(listed, list) and len(listed) > max_documents:  # before validating, which is slow for a long list
        raise ApiError(
            422, "too_many_documents", f"{len(listed)} documents; at most {max_documents} are ranked in one request"
        )
    if dialect == "tei":
        tei = validated(TeiBody, given)
        return _call(
            tei, tei.query, tei.texts, strings_are, return_documents=tei.return_text, raw_scores=tei.raw_scores
        )
    if dialect == "weaviate":
        weaviate = validated(WeaviateBody, given)
        return _call(weaviate, weaviate.query, weaviate.documents, strings_are)
    body = validated(RerankBody, given)
    return _call(
        body,
        body.query,
        body.documents,
        strings_are,
        top_n=body.top_n or None,
        return_documents=body.return_documents,
        model_name=body.model,
    )


def options_of(options: CallOptions) -> dict[str, Any]:
    """Return the `RerankCall` fields that every body has."""
    return {
        "on_failure": options.on_failure,
        "timeout_s": None if options.timeout_ms is None else options.timeout_ms / 1000,
        "priority": options.priority,
        "explain": options.explain,
    }


def _call(
    options: CallOptions,
    query: str | QueryObject,
    documents: Sequence[str | dict[str, Any]],
    strings_are: DocumentKind,
    **fields: Any,
) -> RerankCall:
    asked = _query(query, strings_are)
    # Documents of an image query are texts.
    kind: DocumentKind = "text" if asked.image_id is not None else strings_are
    read = [_document(given, number, kind) for number, given in enumerate(documents)]
    wanted = "text" if asked.image_id is not None else "image"
    for number, document in enumerate(read):
        if (document.kind == "text") != (wanted == "text"):
            asks = "an image" if wanted == "text" else "a text"
            raise ApiError(
                422, "wrong_document_kind", f"documents.{number} must be {_a(wanted)}, because the query is {asks}"
            )
    return RerankCall(query=asked, documents=read, **options_of(options), **fields)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _query(query: str | QueryObject, strings_are: DocumentKind) -> Query:
    if isinstance(query, str):
        return Query(image_id=checked_id(query, "query")) if strings_are == "text" else Query(text=query)
    image_id = query.image_id or query.image
    if (query.text is None) == (image_id is None):
        raise ApiError(422, "invalid_request", "query: exactly one of text and image_id is needed")
    return Query(text=query.text, image_id=image_id)


def _document(given: str | dict[str, Any], number: int, strings_are: DocumentKind) -> Document:
    where = f"documents.{number}"
    if isinstance(given, str):
        return _from_string(given, where, strings_are, None, given)
    score = _score(given.get("score"), where)
    if isinstance(given.get("image_id"), str):
        return Document("image_id", checked_id(given["image_id"], where), score, given)
    # Jina and vLLM: {"image": ...}; vLLM and OpenAI: {"image_url": {"url": ...}}, also as the one part of "content";
    # Elasticsearch: {"type": "image", "format": "url", "value": ...}.
    for name in ("image", "image_url", "url", "value"):
        value = given.get(name)
        if isinstance(value, Mapping):
            value = value.get("url")
        if isinstance(value, str) and not (name == "value" and given.get("type") != "image"):
            return _image(value, where, score, given)
    content = given.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        inner = _document(content[0], number, strings_are)
        return Document(inner.kind, inner.value, inner.score if score is None else score, given)
    if isinstance(given.get("text"), str):
        return _from_string(given["text"], where, strings_are, score, given)
    raise ApiError(
        422, "invalid_document", f"{where} must be a string or have one of image_id, image, image_url and text"
    )


def _from_string(
    value: str, where: str, strings_are: DocumentKind, score: float | None, given: str | dict[str, Any]
) -> Document:
    if strings_are == "text":
        return Document("text", value, score, given)
    if strings_are == "uri":
        return Document("uri", value, score, given)
    return Document("image_id", checked_id(value, where), score, given)


def _image(value: str, where: str, score: float | None, given: dict[str, Any]) -> Document:
    if value.startswith("data:") or given.get("format") == "base64":
        raise ApiError(422, "image_bytes", f"{where} holds the bytes of an image; {_USE_IDS}")
    if value.startswith(_URI_SCHEMES):
        return Document("uri", value, score, given)
    return Document("image_id", checked_id(value, where), score, given)


def checked_id(value: str, where: str) -> str:
    """Return a valid image id unchanged. Raises an `ApiError` that names the field."""
    is_id = 1 <= len(value) <= MAX_ID_CHARS and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in value)
    if not is_id:
        raise ApiError(
            422,
            "invalid_image_id",
            f"{where} is not an image id: 1 to {MAX_ID_CHARS} characters without control characters",
        )
    return value


def _score(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ApiError(422, "invalid_score", f"{where}.score must be a finite number")
    return float(value)


def render(dialect: Dialect, path: str, call: RerankCall, answer: RerankAnswer) -> Any:
    """Return the body of the answer as JSON values. Every score is a float, 0.0 and 1.0 included."""
    results = answer.results[: call.num_results()]
    if dialect == "tei":
        return [_tei_result(call, result) for result in results]
    if dialect == "weaviate":
        return {"scores": _weaviate_scores(call, results)}
    body: dict[str, Any] = {
        "id": answer.request_id,
        "model": call.model_name or answer.model,
        "results": [_result(call, result) for result in results],
        "missing": list(answer.missing),
        "warnings": [warning.model_dump() for warning in answer.warnings],
        "timings_ms": dict(answer.timings_ms),
        "trace_id": answer.trace_id,
        # Clients of Cohere read the first field, clients of Jina and vLLM the second.
        "meta": {"api_version": {"version": "2" if "/v2/" in path else "1"}, "billed_units": {"search_units": 1}},
        "usage": {"total_tokens": 0},
    }
    if answer.degraded is not None:
        body["degraded"] = answer.degraded
    return body


def _result(call: RerankCall, result: RankedDocument) -> dict[str, Any]:
    body: dict[str, Any] = {"index": result.index, "relevance_score": float(result.relevance_score)}
    if call.return_documents:
        given = call.documents[result.index].given
        body["document"] = {"text": given} if isinstance(given, str) else given
    if result.explanation is not None:
        body["explanation"] = [word.model_dump() for word in result.explanation]
    return body


def _tei_result(call: RerankCall, result: RankedDocument) -> dict[str, Any]:
    score = result.logit if call.raw_scores else result.relevance_score
    body: dict[str, Any] = {"index": result.index, "score": float(score)}
    if call.return_documents:
        body["text"] = call.documents[result.index].given
    return body


def _weaviate_scores(call: RerankCall, results: Sequence[RankedDocument]) -> list[dict[str, Any]]:
    """Return the scores in the order of the documents, as Weaviate requires."""
    ordered = sorted(results, key=lambda result: result.index)
    return [
        {"document": call.documents[result.index].given, "score": float(result.relevance_score)} for result in ordered
    ]
