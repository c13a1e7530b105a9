"""The models of the JSON bodies of requests and answers, from which the OpenAPI document is generated.

Request bodies ignore unknown fields, because clients of other services send additional fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from protocols.events import WarningInfo, WordSimilarities
from protocols.fields import MAX_CANDIDATES, MAX_PRIORITY, Id, InlineData, Metadata, QueryText, Uri

#: Characters of one string of a document.
MAX_DOCUMENT_CHARS = 10_000
MAX_FILTER_KEYS = 16
MAX_FILTER_VALUES = 64

_FilterKey = Annotated[str, StringConstraints(min_length=1, max_length=128)]
_FilterValue = Annotated[str, StringConstraints(max_length=2_048)]
FilterBody = Annotated[
    dict[_FilterKey, _FilterValue | Annotated[list[_FilterValue], Field(min_length=1, max_length=MAX_FILTER_VALUES)]],
    Field(
        max_length=MAX_FILTER_KEYS,
        description="metadata that an image must have; of a list, one value must match",
    ),
]


class Body(BaseModel):
    """Base class of the request bodies."""

    model_config = ConfigDict(frozen=True, extra="ignore", val_json_bytes="base64", protected_namespaces=())


class CallOptions(Body):
    """Options of the gateway that every request for a ranking accepts."""

    on_failure: Annotated[
        Literal["first_stage", "error"] | None,
        Field(description="the answer if no ranking arrives in time: the given order, or an error"),
    ] = None
    timeout_ms: Annotated[int | None, Field(ge=1, description="the longest wait for the answer")] = None
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY, description="requests with a higher priority go first")] = 0
    explain: Annotated[bool, Field(description="add each word's similarity to each visual token, where possible")] = (
        False
    )


class QueryObject(Body):
    """A query that is not a plain string."""

    text: QueryText | None = None
    image_id: Annotated[Id | None, Field(description="rank texts for this image")] = None
    image: Annotated[Id | None, Field(description="the same as image_id")] = None


class RerankBody(CallOptions):
    """The request of `POST /v2/rerank`, `/v1/rerank` and `/rerank`, as Cohere, Jina, vLLM and LiteLLM define it."""

    query: QueryText | QueryObject
    documents: Annotated[
        list[Annotated[str, StringConstraints(max_length=MAX_DOCUMENT_CHARS)] | dict[str, Any]],
        Field(
            max_length=MAX_CANDIDATES,
            description="strings (image ids, unless GATEWAY_DOCUMENTS names another kind) or objects with `image_id`, "
            "`image`, `image_url` or `text`, and a first-stage `score` where there is one",
        ),
    ]
    top_n: Annotated[int | None, Field(ge=0, description="results to return; all if absent or 0")] = None
    return_documents: bool = False
    model: Annotated[str | None, StringConstraints(max_length=256), Field(description="repeated in the answer")] = None


class TeiBody(CallOptions):
    """`POST /rerank` with `texts`: the request of text-embeddings-inference."""

    query: QueryText
    texts: Annotated[
        list[Annotated[str, StringConstraints(max_length=MAX_DOCUMENT_CHARS)]], Field(max_length=MAX_CANDIDATES)
    ]
    raw_scores: Annotated[bool, Field(description="logits instead of probabilities")] = False
    return_text: bool = False


class WeaviateBody(CallOptions):
    """`POST /rerank` with `property`: the request of Weaviate's reranker-transformers."""

    query: QueryText
    documents: Annotated[
        list[Annotated[str, StringConstraints(max_length=MAX_DOCUMENT_CHARS)]], Field(max_length=MAX_CANDIDATES)
    ]
    property: str


class RerankedDocument(BaseModel):
    """One result of `RerankAnswerBody`."""

    index: Annotated[int, Field(description="position of the document in the request, from 0")]
    relevance_score: Annotated[float, Field(ge=0, le=1, description="probability that image and text fit")]
    document: Annotated[Any, Field(description="the document, with return_documents")] = None
    explanation: list[WordSimilarities] | None = None


class RerankAnswerBody(BaseModel):
    """The answer to `RerankBody`, best first; one result per document if no `top_n` is given."""

    id: Annotated[str, Field(description="the request id")]
    model: str | None = None
    results: list[RerankedDocument]
    missing: Annotated[list[Any], Field(description="documents without tokens; they come last, with score 0.0")] = []
    degraded: Annotated[str | None, Field(description="why the documents are in the given order")] = None
    warnings: list[WarningInfo] = []
    timings_ms: dict[str, float] = {}
    trace_id: str | None = None
    meta: dict[str, Any] = {}
    usage: dict[str, int] = {}


class TeiResult(BaseModel):
    """One result of the answer to `TeiBody`."""

    index: int
    score: float
    text: str | None = None


class WeaviateScore(BaseModel):
    """The score of one document."""

    document: str
    score: float


class WeaviateAnswerBody(BaseModel):
    """The answer to `WeaviateBody`, in the order of the documents."""

    scores: list[WeaviateScore]


class SearchBody(CallOptions):
    """The request of `POST /v1/search`: candidates from the index are ranked."""

    query: QueryText
    top_n: Annotated[int, Field(ge=1, le=1_000, description="results to return")] = 10
    candidates: Annotated[int, Field(ge=1, le=1_000, description="images taken from the index to be ranked")] = 50
    filter: FilterBody = {}


class SearchResult(BaseModel):
    """One result of `SearchAnswerBody`."""

    image_id: str
    metadata: dict[str, str] = {}
    rank: Annotated[int, Field(description="from 1, after reranking")]
    rank_before: Annotated[int, Field(description="from 1, in the order of the index")]
    relevance_score: Annotated[float | None, Field(description="null in a degraded answer")] = None
    first_stage_score: Annotated[float, Field(description="the cosine of the vectors of query and image")]
    is_missing: Annotated[bool, Field(description="the image is indexed but has no tokens in the store")] = False
    explanation: list[WordSimilarities] | None = None


class SearchAnswerBody(BaseModel):
    """The answer to `SearchBody`: the reranked order and the order of the index."""

    id: str
    query: str
    num_candidates: int
    results: Annotated[list[SearchResult], Field(description="best first, reranked")]
    first_stage: Annotated[list[SearchResult], Field(description="the first `top_n` in the index's order, best first")]
    degraded: Annotated[str | None, Field(description="why `results` is in the index's order")] = None
    degraded_message: str | None = None
    warnings: list[WarningInfo] = []
    model: str | None = None
    engine: str | None = None
    timings_ms: Annotated[dict[str, float], Field(description="by stage, of gateway and rerank worker")] = {}
    trace_id: str | None = None


class ImageBody(Body):
    """The JSON request of `POST /v1/images`: the address of an image, or its bytes in base64."""

    image_id: Annotated[Id | None, Field(description="if absent: the digest of the content or address")] = None
    uri: Uri | None = None
    data: InlineData | None = None
    metadata: Metadata = {}


class AcceptedImage(BaseModel):
    """An image that was published to `images.new`; `GET /v1/images/{id}` reports when it can be found."""

    image_id: str
    status: Literal["pending"] = "pending"


class ImagesAccepted(BaseModel):
    """The answer to `POST /v1/images`."""

    images: list[AcceptedImage]


class ImageState(BaseModel):
    """The answer to `GET /v1/images/{id}`."""

    image_id: str
    status: Literal["indexed", "pending", "failed"]
    metadata: dict[str, str] = {}
    error: Annotated[str | None, Field(description="the error code of the dead letter of a failed image")] = None
    message: str | None = None


class ErrorBody(BaseModel):
    """The body of every error answer."""

    code: Annotated[str, Field(description="a stable error code")]
    message: Annotated[str, Field(description="what is wrong and what to do")]
    trace_id: str | None = None
