"""Writes deploy/openapi.json, the OpenAPI document of the gateway, from the models of the bodies.

Run: python -m workers.gateway.openapi [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from workers.gateway.bodies import (
    ErrorBody,
    ImageBody,
    ImagesAccepted,
    ImageState,
    RerankAnswerBody,
    RerankBody,
    SearchAnswerBody,
    SearchBody,
    TeiBody,
    TeiResult,
    WeaviateAnswerBody,
    WeaviateBody,
)
from workers.gateway.handlers import RERANK_PATHS

PATH = Path(__file__).parents[2] / "deploy" / "openapi.json"
VERSION = "1.0.0"
_MODELS: tuple[type[BaseModel], ...] = (
    ErrorBody,
    ImageBody,
    ImagesAccepted,
    ImageState,
    RerankAnswerBody,
    RerankBody,
    SearchAnswerBody,
    SearchBody,
    TeiBody,
    TeiResult,
    WeaviateAnswerBody,
    WeaviateBody,
)
_ERRORS = {
    "400": "the body cannot be read",
    "401": "no valid API key",
    "404": "no such image or path",
    "408": "the body took too long to arrive",
    "413": "the body or the image is too large",
    "422": "the body can be read, but a value in it is invalid",
    "429": "too many pairs in flight or requests per second; try again after Retry-After",
    "503": "Kafka, the index or the token store is away",
    "504": "no ranking in time, with on_failure=error",
}
_IMAGE_ID = {"name": "image_id", "in": "path", "required": True, "schema": {"type": "string"}}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:+/=@-]{1,128}$"},
    "description": "identifies the request: calls with the same key and the same body are one request",
}


def openapi_document() -> dict[str, Any]:
    """Return the document."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {path: {"post": _rerank(path)} for path in RERANK_PATHS}
    paths["/v1/search"] = {
        "post": _operation(
            "search",
            "Find images for a text: candidates from the index, ranked.",
            body=_json(SearchBody),
            answer=_json(SearchAnswerBody),
            parameters=[_IDEMPOTENCY_KEY],
        )
    }
    form = {
        "type": "object",
        "properties": {
            "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
            "image_id": {"type": "string"},
            "metadata": {"type": "string", "description": "a JSON object of strings"},
        },
        "required": ["file"],
    }
    paths["/v1/images"] = {
        "post": _operation(
            "publishImages",
            "Publish images: files in a form, an address, or bytes in base64.",
            body={**_json(ImageBody), "multipart/form-data": {"schema": form}},
            answer=_json(ImagesAccepted),
            status="202",
        )
    }
    paths["/v1/images/{image_id}"] = {
        "get": _operation(
            "imageState",
            "The state of an image.",
            answer=_json(ImageState),
            parameters=[_IMAGE_ID],
        ),
        "delete": _operation("removeImage", "Remove an image.", answer=None, status="202", parameters=[_IMAGE_ID]),
    }
    paths["/v1/images/{image_id}/thumbnail"] = {
        "get": _operation(
            "thumbnail",
            "A small copy of an image.",
            answer={"image/*": {"schema": {"type": "string", "format": "binary"}}},
            parameters=[_IMAGE_ID],
        )
    }
    paths["/v1/info"] = {
        "get": _operation(
            "info", "The model, and how many images there are.", answer={"application/json": {"schema": {}}}
        )
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "EDJE gateway",
            "version": VERSION,
            "description": "Reranking of images over precomputed tokens, behind the rerank APIs of Cohere, Jina, vLLM, "
            "text-embeddings-inference and Weaviate; search and upload of images.",
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": definitions["$defs"],
        },
    }


def _rerank(path: str) -> dict[str, Any]:
    bodies: list[type[BaseModel]] = [RerankBody]
    answers: list[dict[str, Any]] = [_reference(RerankAnswerBody)]
    bodies += [TeiBody, WeaviateBody]
    answers += [{"type": "array", "items": _reference(TeiResult)}, _reference(WeaviateAnswerBody)]
    operation = _operation(
        "rerank" + path.title().replace("/", ""),
        "Rank documents for a query. The dialect follows from the body: `texts` is text-embeddings-inference's, "
        "`property` Weaviate's, everything else Cohere's, Jina's and vLLM's.",
        body={"application/json": {"schema": {"anyOf": [_reference(body) for body in bodies]}}},
        answer={"application/json": {"schema": {"anyOf": answers}}},
        parameters=[_IDEMPOTENCY_KEY],
    )
    operation["responses"]["200"]["headers"] = {
        "Edje-Degraded": {"schema": {"type": "string"}, "description": "why the documents are in the given order"},
        "Edje-Request-Id": {"schema": {"type": "string"}},
        "Edje-Trace-Id": {"schema": {"type": "string"}},
    }
    return operation


def _operation(
    name: str,
    summary: str,
    *,
    answer: dict[str, Any] | None,
    body: dict[str, Any] | None = None,
    status: str = "200",
    parameters: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    errors = {code: {"description": meaning, "content": _json(ErrorBody)} for code, meaning in _ERRORS.items()}
    responses: dict[str, Any] = {status: {"description": summary}, **errors}
    if answer is not None:
        responses[status]["content"] = answer
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(model)}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def main() -> int:
    text = json.dumps(openapi_document(), indent=2, ensure_ascii=False) + "\n"
    if "--check" in sys.argv[1:]:
        if not PATH.is_file() or PATH.read_text(encoding="utf-8") != text:
            print(f"{PATH} is not up to date: python -m workers.gateway.openapi", file=sys.stderr)
            return 1
        return 0
    PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
