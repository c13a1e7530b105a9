"""Names every span, attribute and metric, with its meaning.

All recorded names come from here; `workers.telemetry.document` writes docs/reference/telemetry.md from it.
Messaging and database names follow the OpenTelemetry conventions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class SpanName:
    """A kind of span; `name` is completed with a topic or a stage where it ends in one."""

    name: str
    kind: Literal["SERVER", "CONSUMER", "PRODUCER", "CLIENT", "INTERNAL"]
    parent: str
    meaning: str
    stem: str = field(init=False)  # the name up to what completes it

    def __post_init__(self) -> None:
        object.__setattr__(self, "stem", self.name.partition("{")[0])


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of a span."""

    name: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Metric:
    """One instrument; the name is the one that is exposed."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# --- stages -----------------------------------------------------------------------------------------------------------

#: Where the time of a request goes, in this order: spans, `timings_ms` and `edje_stage_seconds` share these words.
INBOX, QUEUE, FETCH, BATCH_WAIT, SCORE = "inbox", "queue", "fetch", "batch_wait", "score"
REQUEST_STAGES = {
    INBOX: "From the end of the poll that returned it until the worker takes it; long when the worker is full.",
    QUEUE: "Until its first piece starts; long when other requests have their turn, or no slot is free.",
    FETCH: "Until the last of its pieces has its tokens in the slab.",
    BATCH_WAIT: "Until the last of its micro-batches starts on the engine.",
    SCORE: "Until its reply.",
}
#: Measured separately, because the reply is written before this stage.
PUBLISH = "publish"
TOTAL = "total"
#: Stages of an image on its way into the store; spans have the same names.
IMAGE_STAGES = {
    "fetch": "Reading the bytes at its address.",
    "look_up": "Looking up whether the store has the same content, many images at once.",
    "decode": "Decoding the file to pixels.",
    "encode": "Encoding its batch on the engine.",
    "store": "Writing the blobs of its batch.",
}
#: Stages of a request in the gateway.
EMBED, SEARCH_INDEX, RERANK = "embed", "search_index", "rerank"
GATEWAY_STAGES = {
    EMBED: "Embedding the query's text.",
    SEARCH_INDEX: "Searching the index for candidates.",
    RERANK: "From sending the rerank request to its reply.",
}
#: The stage of an indexed image: the write of its batch, including the wait for the previous write.
INDEX_STAGE = "write"

# --- spans ------------------------------------------------------------------------------------------------------------

PROCESS = SpanName(
    "process {topic}", "CONSUMER", "the producer's span", "One event, from the poll that returned it to its outcome."
)
POLL = SpanName(
    "poll {topic}", "CLIENT", "none, linked", "The poll that returned the event; links to each sampled producer's span."
)
SEND = SpanName(
    "send {topic}",
    "PRODUCER",
    "process",
    "From sending a message to its acknowledgement; the message carries this span's ids.",
)
COMMIT = SpanName(
    "commit {topic}", "CLIENT", "none, linked", "An offset commit or a transaction; links to each event it settles."
)
STAGE = SpanName(
    "{stage}", "INTERNAL", "process", "One stage of the event (next table); stages of zero length are left out."
)
READ = SpanName("MGET", "CLIENT", "process", "One read of blobs, retries included; links to other waiting requests.")
WRITE = SpanName("PIPELINE SET", "CLIENT", "encode batch", "The write of a batch of blobs, retries included.")
HTTP_REQUEST = SpanName(
    "{method} {route}",
    "SERVER",
    "the caller's span",
    "One HTTP request to the gateway, from its headers to its answer.",
)
INDEX_WRITE = SpanName(
    "index write", "CLIENT", "none, linked", "Rows written to the index together; links to each sampled event."
)
MICRO_BATCH = SpanName(
    "micro-batch", "INTERNAL", "none, linked", "Pairs of several requests on the engine; links to each sampled request."
)
ENCODE_BATCH = SpanName(
    "encode batch", "INTERNAL", "none, linked", "Images of several events on the engine; links to each sampled event."
)
ENCODE_QUERIES = SpanName("encode queries", "INTERNAL", "micro-batch", "Encoding the distinct texts of a batch.")
SCORE_PAIRS = SpanName("score pairs", "INTERNAL", "micro-batch", "Scoring the pairs of a batch.")
HOST_TO_DEVICE = SpanName(
    "host to device",
    "INTERNAL",
    "score pairs",
    "The copy to the device, if the runtime measures it; shown at the start.",
)
DEVICE_TO_HOST = SpanName(
    "device to host", "INTERNAL", "score pairs", "The copy to the host, if the runtime measures it; shown at the end."
)

# --- attributes -------------------------------------------------------------------------------------------------------

SYSTEM = Attribute("messaging.system", "`kafka`.")
OPERATION = Attribute("messaging.operation.name", "`process`, `poll`, `send` or `commit`.")
OPERATION_TYPE = Attribute("messaging.operation.type", "`process`, `receive`, `send` or `settle`.")
TOPIC = Attribute("messaging.destination.name", "The topic.")
PARTITION = Attribute("messaging.destination.partition.id", "The partition of the event.")
GROUP = Attribute("messaging.consumer.group.name", "The worker's consumer group.")
OFFSET = Attribute("messaging.kafka.offset", "The offset of the event.")
CONVERSATION = Attribute("messaging.message.conversation_id", "`request_id`, or `image_id` of an image event.")
MESSAGES = Attribute("messaging.batch.message_count", "Messages of a poll, or events that a commit settles.")
DB_SYSTEM = Attribute("db.system.name", "`redis`.")
DB_OPERATION = Attribute("db.operation.name", "`MGET` or `PIPELINE SET`.")
DB_BATCH = Attribute("db.operation.batch.size", "Number of keys read or written.")
ERROR_TYPE = Attribute("error.type", "The code of an error reply or dead letter, `expired`, or the class of an error.")
STATUS = Attribute("edje.status", "Outcome of the event: the status of the reply, `dead_letter`, `ok` or `skipped`.")
CANDIDATES = Attribute("edje.candidates", "Candidates of the request.")
PAIRS = Attribute("edje.pairs", "Pairs of the request or the micro-batch; equal candidates count once.")
MISSING = Attribute("edje.missing", "Pairs of the request without usable tokens.")
TOKENS = Attribute("edje.tokens", "Text and visual tokens of the micro-batch.")
REQUEST_IDS = Attribute("edje.request_ids", "The requests that shared the micro-batch, sampled or not; the first 100.")
IMAGES = Attribute("edje.images", "Images of the batch.")
IMAGE_IDS = Attribute("edje.image_ids", "The images that shared the batch, sampled or not; the first 100.")
ENGINE = Attribute("edje.engine_digest", "The engine that scored the micro-batch.")
ATTEMPTS = Attribute("edje.attempts", "Number of attempts, if more than one.")
HTTP_METHOD = Attribute("http.request.method", "The method of an HTTP request.")
HTTP_ROUTE = Attribute("http.route", "The path of an HTTP request, with names in place of ids.")
HTTP_STATUS = Attribute("http.response.status_code", "The status of the HTTP answer.")
DEGRADED = Attribute("edje.degraded", "Why an answer of the gateway is in the first stage's order.")
READ_BYTES = Attribute("edje.read_bytes", "Bytes of the blobs that were read.")

# --- metrics ----------------------------------------------------------------------------------------------------------

#: From a tenth of a millisecond (a batch's wait on a fast GPU) to the longest retry time of a fetch.
_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PAIRS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
_TOKENS = (256, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
_FILL = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)

EVENTS = Metric("edje_events_total", "counter", "Messages with an outcome.", ("outcome",))
DEAD_LETTERS = Metric("edje_dead_letters_total", "counter", "Messages dead-lettered, by cause.", ("code",))
RETRIES = Metric("edje_retries_total", "counter", "Failed attempts that were repeated.", ("kind",))
COMMITS = Metric("edje_commits_total", "counter", "Offset commits and transactions that the broker has recorded.")
INFLIGHT_EVENTS = Metric("edje_inflight_events", "gauge", "Messages taken and not yet finished.")
LAG = Metric(
    "edje_consumer_lag_events",
    "gauge",
    "Messages of an assigned partition beyond the last one taken.",
    ("topic", "partition"),
)
LOOP_TURNS = Metric("edje_loop_turns_total", "counter", "Turns of the worker's loop.")
ENGINE_INFO = Metric(
    "edje_engine_info", "info", "The engine in use.", ("runtime", "model_digest", "engine_digest", "storage")
)
ENGINE_GRAPHS = Metric(
    "edje_engine_cuda_graphs", "gauge", "Sizes that the engine runs at, captured as a CUDA graph or not.", ("state",)
)
SPANS_DROPPED = Metric(
    "edje_spans_dropped_total", "counter", "Spans dropped because their destination was slow, full or away."
)
BAD_TRACEPARENTS = Metric(
    "edje_bad_traceparents_total", "counter", "Messages with an invalid traceparent; each starts a new trace."
)
STAGE_SECONDS = Metric(
    "edje_stage_seconds", "histogram", "A request in one stage, or publishing any outcome.", ("stage",), _SECONDS
)

REPLIES = Metric("edje_replies_total", "counter", "Replies made, by status.", ("status",))
REPLIES_REPLACED = Metric(
    "edje_replies_replaced_total",
    "counter",
    "Replies that the broker refused and an error reply replaced.",
)
REPLY_WARNINGS = Metric("edje_reply_warnings_total", "counter", "Warnings in replies, by code.", ("code",))
PAIRS_TOTAL = Metric("edje_pairs_total", "counter", "Pairs in replies that went out with a ranking.")
INFLIGHT_PAIRS = Metric("edje_inflight_pairs", "gauge", "Pairs of requests in work.")
BACKLOG_SECONDS = Metric(
    "edje_backlog_seconds",
    "gauge",
    "Seconds of work that wait for this worker: tokens in work, and its partitions' lag times the mean tokens of a "
    "request, over the tokens per second of a busy engine. Absent while work waits and nothing has been scored yet.",
)
REPLY_SECONDS = Metric(
    "edje_reply_seconds",
    "histogram",
    "From taking a request to its reply, replies without a ranking left out.",
    (),
    _SECONDS,
)
QUEUE_WAIT_SECONDS = Metric(
    "edje_queue_wait_seconds", "histogram", "From taking a request to the start of its first piece.", (), _SECONDS
)
FETCH_SECONDS = Metric("edje_fetch_seconds", "histogram", "One read of blobs from the store.", (), _SECONDS)
BATCH_SECONDS = Metric("edje_batch_seconds", "histogram", "One micro-batch on the engine.", (), _SECONDS)
BATCH_PAIRS = Metric("edje_batch_pairs", "histogram", "Pairs in a micro-batch.", (), _PAIRS)
BATCH_TOKENS = Metric("edje_batch_tokens", "histogram", "Text and visual tokens in a micro-batch.", (), _TOKENS)
BATCH_FILL = Metric(
    "edje_batch_fill_ratio", "histogram", "Tokens of a micro-batch over the most it may have.", (), _FILL
)
SLAB_HITS = Metric("edje_slab_hits_total", "counter", "Images of started pieces that had a slot.")
SLAB_MISSES = Metric("edje_slab_misses_total", "counter", "Images of started pieces that had to be fetched.")
SLAB_EVICTIONS = Metric("edje_slab_evictions_total", "counter", "Images that lost their slot to another.")
SLAB_INVALIDATIONS = Metric(
    "edje_slab_invalidations_total", "counter", "Images dropped from the token slab because they have changed."
)
SLAB_SLOTS_USED = Metric("edje_slab_slots_used", "gauge", "Slots of the token slab that hold an image.")
BAD_BLOBS = Metric(
    "edje_bad_blobs_total", "counter", "Images without a usable blob, by reason: missing, corrupt…", ("reason",)
)
STORE_READ_BYTES = Metric("edje_store_read_bytes_total", "counter", "Bytes of blobs read from the store.")

IMAGE_SECONDS = Metric("edje_image_seconds", "histogram", "One image in one stage.", ("stage",), _SECONDS)
BATCH_IMAGES = Metric("edje_batch_images", "histogram", "Images in a batch on the engine.", (), _IMAGES)
INFLIGHT_BYTES = Metric("edje_inflight_bytes", "gauge", "Bytes of images in work.")
STORE_WRITE_BYTES = Metric("edje_store_write_bytes_total", "counter", "Bytes of blobs written to the store.")

INDEX_WRITE_SECONDS = Metric(
    "edje_index_write_seconds", "histogram", "One batch of changes to the index, retries included.", (), _SECONDS
)
INDEX_WITHOUT_VECTOR = Metric(
    "edje_index_without_vector_total",
    "counter",
    "Images left out of the index because their event had no embedding (INGEST_PUBLISH_EMBEDDING).",
)

HTTP_REQUESTS = Metric(
    "edje_http_requests_total", "counter", "HTTP requests answered by the gateway.", ("route", "status")
)
HTTP_SECONDS = Metric(
    "edje_http_seconds", "histogram", "One HTTP request, from its headers to its answer.", ("route",), _SECONDS
)
HTTP_OPEN = Metric("edje_http_open_requests", "gauge", "HTTP requests in work.")
GATEWAY_PAIRS = Metric("edje_gateway_pairs", "gauge", "Pairs of the gateway's requests without a reply yet.")
GATEWAY_DEGRADED = Metric(
    "edje_gateway_degraded_total", "counter", "Answers in the first stage's order, by cause.", ("code",)
)
GATEWAY_REFUSED = Metric(
    "edje_gateway_refused_total", "counter", "Requests answered with an error, by code.", ("code",)
)
GATEWAY_CANCELLED = Metric("edje_gateway_cancelled_total", "counter", "Requests whose caller left before the answer.")
GATEWAY_REPLIES = Metric(
    "edje_gateway_replies_total",
    "counter",
    "Replies on the gateway's partition: matched with a request, late, unknown or invalid.",
    ("kind",),
)
GATEWAY_SECONDS = Metric(
    "edje_gateway_stage_seconds", "histogram", "A request in one of the gateway's stages.", ("stage",), _SECONDS
)

SPANS = tuple(value for value in list(globals().values()) if isinstance(value, SpanName))
ATTRIBUTES = tuple(value for value in list(globals().values()) if isinstance(value, Attribute))
METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
