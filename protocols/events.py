"""The events: images, requests and responses.

Each is a frozen, strictly typed model. Unknown fields are ignored, and null means the same as absent.
Knows nothing of encodings and topics.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, model_validator
from typing_extensions import TypedDict

from protocols.fields import (
    MAX_CANDIDATES,
    MAX_EMBEDDING_DIM,
    MAX_ERROR_CODE_CHARS,
    MAX_ERROR_MESSAGE_CHARS,
    MAX_EXPLAINED_TOKENS,
    MAX_EXPLAINED_WORD_CHARS,
    MAX_EXPLAINED_WORDS,
    MAX_PARTITION,
    MAX_PRIORITY,
    MAX_TOKENS,
    MAX_WARNINGS,
    CandidateText,
    Deadline,
    Digest,
    Finite,
    Id,
    InlineData,
    Metadata,
    QueryText,
    Sha256Hex,
    Timings,
    TopicName,
    Uri,
)
from protocols.quantize import StorageType

SCHEMA_VERSION = 1

Status = Literal["ok", "partial", "expired", "error"]


def _given(name: str, **others: Any) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"type": "string"}, **others}}


_NULL: dict[str, Any] = {"type": "null"}


class _Part(BaseModel):
    # Strict, so that the models accept exactly what the published schemas accept.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", val_json_bytes="base64")


class Event(_Part):
    """Base of all events."""

    schema_version: Literal[1] = 1


class ImageNew(Event):
    """An image to encode and store, given by its address or by its bytes."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given("uri"), _given("data")]})

    image_id: Id
    uri: Annotated[Uri | None, Field(description="file, http, https, s3 or gs address")] = None
    data: Annotated[InlineData | None, Field(description="the image file: base64 in JSON, bytes in msgpack")] = None
    metadata: Annotated[
        Metadata | None, Field(description="copied into the image's `images.indexed` event; not stored with the tokens")
    ] = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.uri is None) == (self.data is None):
            raise ValueError("exactly one of uri and data is required")
        return self


class ImageIndexed(Event):
    """The image's visual tokens are in the store."""

    image_id: Id
    model: Annotated[Digest, Field(description="model digest")]
    num_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    dtype: Annotated[StorageType, Field(description="how the tokens are stored")]
    num_bytes: Annotated[int, Field(ge=1, description="of the whole token blob")]
    content_sha256: Annotated[Sha256Hex, Field(description="of the image file")]
    timings_ms: Timings = Field(default_factory=dict)
    skipped: Annotated[
        bool,
        Field(
            description="the same content was already stored under the same model; can be the first report of new "
            "content, so a cache compares content_sha256"
        ),
    ] = False
    embedding: Annotated[
        list[Finite] | None, Field(max_length=MAX_EMBEDDING_DIM, description="pooled output of the vision tower")
    ] = None
    metadata: Annotated[Metadata | None, Field(description="from the image's `images.new` event")] = None


class Query(_Part):
    """The query: a text, whose candidates are images, or an image, whose candidates are texts."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given("text"), _given("image_id")]})

    text: QueryText | None = None
    image_id: Id | None = None

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        if (self.text is None) == (self.image_id is None):
            raise ValueError("exactly one of text and image_id is required")
        return self


# A TypedDict, because a hundred candidates decode in 33 microseconds; as models they would take 60.
class Candidate(TypedDict, total=False):
    """One candidate: an image by its id, or a text."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]  # read by pydantic, not a key

    image_id: Id | None
    text: CandidateText | None
    id: Annotated[Id | None, Field(description="id of a text in the results; the id of an image is its image_id")]
    score: Annotated[
        Finite | None, Field(description="of the first stage, higher is better; read by models trained with it")
    ]


class RerankRequest(Event):
    """A query and the candidates to rank for it."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "properties": {
                        "query": _given("text", image_id=_NULL),
                        "candidates": {"items": _given("image_id", text=_NULL)},
                    }
                },
                {
                    "properties": {
                        "query": _given("image_id", text=_NULL),
                        "candidates": {"items": _given("text", image_id=_NULL)},
                    }
                },
            ]
        }
    )

    request_id: Id
    query: Query
    # Failing at the first invalid candidate bounds the error report of a request with very many.
    candidates: Annotated[list[Candidate], Field(max_length=MAX_CANDIDATES), FailFast()]
    top_n: Annotated[int | None, Field(ge=1, le=MAX_CANDIDATES, description="results to return; all where absent")] = (
        None
    )
    deadline: Annotated[Deadline | None, Field(description="a request not scored by then is answered as expired")] = (
        None
    )
    priority: Annotated[
        int, Field(ge=0, le=MAX_PRIORITY, description="each step doubles the request's share of the service")
    ] = 0
    reply_topic: Annotated[TopicName | None, Field(description="instead of rerank.responses, where allowed")] = None
    reply_partition: Annotated[
        int | None,
        Field(
            ge=0, le=MAX_PARTITION, description="partition of the reply's topic; by the hash of its key where absent"
        ),
    ] = None
    model: Annotated[Digest | None, Field(description="digest of the model that must answer; any where absent")] = None
    explain: Annotated[
        bool, Field(description="add to the best results how similar each word is to each visual token, where possible")
    ] = False

    @model_validator(mode="after")
    def _has_candidates_of_one_kind(self) -> Self:
        is_text_query = self.query.text is not None
        wanted, other = ("image_id", "text") if is_text_query else ("text", "image_id")
        # Two plain passes over up to 1,000 candidates are twice as fast as one with both conditions.
        missing = None in [candidate.get(wanted) for candidate in self.candidates]
        if missing or True in [other in candidate for candidate in self.candidates]:
            self._check_each_candidate(wanted, other)
        return self

    def _check_each_candidate(self, wanted: str, other: str) -> None:
        for number, candidate in enumerate(self.candidates):
            if candidate.get(wanted) is None or candidate.get(other) is not None:
                kinds = {"image_id": "an image (image_id without text)", "text": "a text (text without image_id)"}
                query = {"image_id": "a text", "text": "an image"}[wanted]
                raise ValueError(f"candidate {number} must be {kinds[wanted]}, because the query is {query}")

    def image_ids(self) -> list[str]:
        """Return the ids of the images to score: the candidates, or the query's image."""
        if self.query.image_id is not None:
            return [self.query.image_id]
        return [c["image_id"] for c in self.candidates]  # type: ignore[misc]  # checked by the validator

    def texts(self) -> list[str]:
        """Return the texts to score: the candidates, or the query's text."""
        if self.query.text is not None:
            return [self.query.text]
        return [c["text"] for c in self.candidates]  # type: ignore[misc]  # checked by the validator

    def names(self) -> list[str | None]:
        """Return the id of each candidate in the results."""
        if self.query.text is not None:
            return [c["image_id"] for c in self.candidates]
        return [c.get("id") for c in self.candidates]


class WordSimilarities(_Part):
    """The similarity of one word of the text to each visual token of the image."""

    word: Annotated[str, StringConstraints(max_length=MAX_EXPLAINED_WORD_CHARS)]
    similarities: Annotated[
        list[Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]],
        Field(max_length=MAX_EXPLAINED_TOKENS, description="cosines, one for each visual token, in their stored order"),
    ]


class Result(_Part):
    """One ranked candidate."""

    index: Annotated[int, Field(ge=0, description="position of the candidate in the request, from 0")]
    id: Annotated[Id | None, Field(description="image_id of an image, id of a text where it had one")] = None
    relevance_score: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="probability that image and text fit, calibrated where the model has a calibration; "
            "the sigmoid of the logit otherwise",
        ),
    ]
    logit: Finite
    explanation: Annotated[
        list[WordSimilarities] | None,
        Field(
            max_length=MAX_EXPLAINED_WORDS,
            description="of the best results of a request with `explain`, for models with a late interaction",
        ),
    ] = None


class ErrorInfo(_Part):
    """The reason why there is no ranking."""

    code: Annotated[str, StringConstraints(min_length=1, max_length=MAX_ERROR_CODE_CHARS, pattern=r"^[a-z0-9_]+$")]
    message: Annotated[str, StringConstraints(max_length=MAX_ERROR_MESSAGE_CHARS)]


class WarningInfo(_Part):
    """A reason to trust the ranking less, or why a part of the request was ignored."""

    code: Annotated[str, StringConstraints(min_length=1, max_length=MAX_ERROR_CODE_CHARS, pattern=r"^[a-z0-9_]+$")]
    message: Annotated[str, StringConstraints(max_length=MAX_ERROR_MESSAGE_CHARS)]


class RerankResponse(Event):
    """The one reply to a request; results are ordered best first."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "properties": {"status": {"const": "error"}, "error": {"type": "object"}},
                    "required": ["error"],
                },
                {"properties": {"status": {"enum": ["ok", "partial"]}, "error": _NULL}},
                {"properties": {"status": {"const": "expired"}}},
            ]
        }
    )

    request_id: Id
    status: Annotated[Status, Field(description="partial: some candidates are in `missing` and not in `results`")]
    results: Annotated[list[Result], Field(max_length=MAX_CANDIDATES)] = Field(default_factory=list)
    missing: Annotated[list[Id], Field(max_length=MAX_CANDIDATES, description="images without usable tokens")] = Field(
        default_factory=list
    )
    model: Annotated[Digest, Field(description="model digest")]
    engine: Annotated[Digest, Field(description="engine digest")]
    timings_ms: Annotated[Timings, Field(description="by stage")] = Field(default_factory=dict)
    warnings: Annotated[list[WarningInfo], Field(max_length=MAX_WARNINGS)] = Field(default_factory=list)
    error: ErrorInfo | None = None

    @model_validator(mode="after")
    def _explains_an_error(self) -> Self:
        if self.status == "error" and self.error is None:
            raise ValueError("status error needs an error")
        if self.status in ("ok", "partial") and self.error is not None:
            raise ValueError(f"status {self.status} cannot have an error")
        return self
