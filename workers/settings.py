"""The settings of the workers: names, types, bounds, defaults and meanings.

Settings are immutable; composition roots convert them to the small limits that modules take. They are read by
`workers.read_settings` and listed by `workers.show_config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, NonNegativeFloat, PositiveFloat, PositiveInt, SecretStr
from pydantic import model_validator as check
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from protocols.topics import Topics
from workers.telemetry.options import OptionsReader, OtelValues, TelemetryOptions

MIB = 2**20


def _split(value: object) -> object:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


#: Several words, separated by commas.
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]
Ports = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split)]
#: A number of bytes, optionally with a unit: 1GiB.
PositiveBytes = Annotated[ByteSize, Field(gt=0)]


class KafkaSettings(BaseSettings):
    """The connection to Kafka: the same variables for every program that uses it."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_ignore_empty=True, populate_by_name=True, hide_input_in_errors=True
    )

    kafka_brokers: Words = Field(
        ("localhost:9092",),
        min_length=1,
        validation_alias="KAFKA_BROKERS",
        description="Addresses of some brokers of the cluster.",
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT",
        validation_alias="KAFKA_SECURITY_PROTOCOL",
        description="Whether connections use TLS, SASL, both or neither.",
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, validation_alias="KAFKA_SASL_MECHANISM", description="SASL mechanism, for SASL protocols."
    )
    kafka_sasl_username: str | None = Field(
        None, validation_alias="KAFKA_SASL_USERNAME", description="User, for SASL protocols."
    )
    kafka_sasl_password: SecretStr | None = Field(
        None, validation_alias="KAFKA_SASL_PASSWORD", description="Password, for SASL protocols."
    )
    kafka_ssl_cafile: Path | None = Field(
        None,
        validation_alias="KAFKA_SSL_CAFILE",
        description="File of trusted certificates; default: the system's.",
    )
    kafka_ssl_certfile: Path | None = Field(
        None, validation_alias="KAFKA_SSL_CERTFILE", description="File of the client's certificate."
    )
    kafka_ssl_keyfile: Path | None = Field(
        None, validation_alias="KAFKA_SSL_KEYFILE", description="File of the key of the client's certificate."
    )
    kafka_ssl_password: SecretStr | None = Field(
        None, validation_alias="KAFKA_SSL_PASSWORD", description="Password of the client's key."
    )

    @check(mode="after")
    def _security_is_whole(self) -> Self:
        login = (self.kafka_sasl_mechanism, self.kafka_sasl_username, self.kafka_sasl_password)
        if self.kafka_security_protocol.startswith("SASL"):
            if None in login:
                raise ValueError(
                    f"KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs KAFKA_SASL_MECHANISM, "
                    "KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"
                )
        elif login != (None, None, None):
            raise ValueError(
                f"KAFKA_SASL_* is set and KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} would not use it"
            )
        files = (self.kafka_ssl_cafile, self.kafka_ssl_certfile, self.kafka_ssl_keyfile)
        if "SSL" not in self.kafka_security_protocol and files != (None, None, None):
            raise ValueError(
                f"KAFKA_SSL_* is set and KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} would not use it"
            )
        if self.kafka_ssl_keyfile is not None and self.kafka_ssl_certfile is None:
            raise ValueError("KAFKA_SSL_KEYFILE is set without KAFKA_SSL_CERTFILE")
        return self


class ServiceSettings(KafkaSettings):
    """The settings of every process of the service."""

    topic_prefix: str = Field("", description="Prefix of every topic name.")
    max_message_bytes: PositiveBytes = Field(
        ByteSize(MIB), description="Largest message to publish, at most the broker's message.max.bytes."
    )
    http_host: str = Field(
        "127.0.0.1", description="Address that serves health and metrics; 0.0.0.0 for the probes of a pod."
    )
    http_port: int = Field(8080, ge=0, le=65535, description="Port of health and metrics; 0 takes a free one.")
    stall_limit_s: PositiveFloat = Field(
        10.0, description="Seconds without a turn of the loop after which the worker counts as dead."
    )
    drain_grace_s: NonNegativeFloat = Field(
        20.0, description="Longest time after SIGTERM to finish the messages in work."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Format of log lines: console is for people, json for machines."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")
    span_file: Path | None = Field(
        None, description="File that spans are written to, one per line; each process needs its own."
    )
    span_file_bytes: PositiveBytes = Field(
        ByteSize(64 * MIB),
        description="Size at which the span file is renamed to <name>.1, replacing the previous one.",
    )
    otlp_endpoint: SecretStr | None = Field(
        None,
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="Collector for spans and metrics, OTLP over HTTP; without it neither is sent.",
    )
    otlp_traces_endpoint: SecretStr | None = Field(
        None, validation_alias="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", description="Complete address for spans only."
    )
    otlp_metrics_endpoint: SecretStr | None = Field(
        None, validation_alias="OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", description="Complete address for metrics only."
    )
    otel_sdk_disabled: str = Field(
        "false", validation_alias="OTEL_SDK_DISABLED", description="true: record and send neither spans nor metrics."
    )
    otel_traces_exporter: str = Field(
        "otlp", validation_alias="OTEL_TRACES_EXPORTER", description="none: send no spans, even if an endpoint is set."
    )
    otel_metrics_exporter: str = Field(
        "otlp",
        validation_alias="OTEL_METRICS_EXPORTER",
        description="none: send no metrics, even if an endpoint is set; `/metrics` always serves them.",
    )
    otel_protocol: str = Field(
        "http/protobuf",
        validation_alias="OTEL_EXPORTER_OTLP_PROTOCOL",
        description="Protocol to the collector; the only supported one.",
    )
    otel_traces_sampler: str = Field(
        "parentbased_always_on",
        validation_alias="OTEL_TRACES_SAMPLER",
        description="Which messages are traced: always_on, always_off, traceidratio, or one of these after "
        "`parentbased_`, which follows the producer's decision if the message has one.",
    )
    otel_traces_sampler_arg: str = Field(
        "1.0", validation_alias="OTEL_TRACES_SAMPLER_ARG", description="Share of traces to record, for traceidratio."
    )
    otel_max_queue_spans: str = Field(
        "2048",
        validation_alias="OTEL_BSP_MAX_QUEUE_SIZE",
        description="Most spans that wait to be sent; more are dropped.",
    )
    otel_max_batch_spans: str = Field(
        "512",
        validation_alias="OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        description="Most spans sent together, at most the queue's size.",
    )
    otel_span_delay_ms: str = Field(
        "5000", validation_alias="OTEL_BSP_SCHEDULE_DELAY", description="Milliseconds after which fewer spans are sent."
    )
    otel_metric_export_interval_ms: str = Field(
        "60000", validation_alias="OTEL_METRIC_EXPORT_INTERVAL", description="Milliseconds between exports of metrics."
    )

    @check(mode="after")
    def _shared_limits_agree(self) -> Self:
        Topics(self.topic_prefix)
        return self

    def telemetry(self) -> TelemetryOptions:
        """Return the telemetry options; invalid values of OTEL_* variables are ignored."""
        return self._read_telemetry(OptionsReader())

    def warnings(self) -> list[str]:
        """Return a sentence for each ignored value."""
        reader = OptionsReader()
        self._read_telemetry(reader)
        return reader.warnings

    def _read_telemetry(self, reader: OptionsReader) -> TelemetryOptions:
        return reader.read(
            OtelValues(
                sdk_disabled=self.otel_sdk_disabled,
                traces_exporter=self.otel_traces_exporter,
                metrics_exporter=self.otel_metrics_exporter,
                protocol=self.otel_protocol,
                sampler=self.otel_traces_sampler,
                sampler_arg=self.otel_traces_sampler_arg,
                max_queue_spans=self.otel_max_queue_spans,
                max_batch_spans=self.otel_max_batch_spans,
                span_delay_ms=self.otel_span_delay_ms,
                metric_interval_ms=self.otel_metric_export_interval_ms,
            ),
            has_traces_endpoint=bool(self.otlp_endpoint or self.otlp_traces_endpoint),
            has_metrics_endpoint=bool(self.otlp_endpoint or self.otlp_metrics_endpoint),
            span_file=self.span_file,
            span_file_bytes=self.span_file_bytes,
        )


class WorkerSettings(ServiceSettings):
    """The settings of every worker that reads a topic as a member of a consumer group."""

    delivery: Literal["at_least_once", "exactly_once"] = Field(
        "at_least_once",
        description="at_least_once: a crash may repeat an outcome; exactly_once: outcomes and offsets are one "
        "transaction.",
    )
    commit_interval_ms: PositiveFloat = Field(
        100.0, description="Milliseconds between offset commits, with at_least_once."
    )
    transaction_interval_ms: PositiveFloat = Field(
        50.0, description="Milliseconds between transactions, with exactly_once."
    )
    session_timeout_ms: int = Field(
        10_000,
        ge=1_500,
        description="Milliseconds without a heartbeat after which a worker counts as dead: its partitions go to "
        "others, its open transaction is aborted.",
    )
    revoke_grace_s: NonNegativeFloat = Field(
        5.0, description="Longest time to finish the messages of a revoked partition before it is given back."
    )
    max_poll_records: PositiveInt = Field(500, description="Most records of one poll.")
    max_undelivered_messages: PositiveInt = Field(
        10_000, description="Outcomes that wait for the broker before reading pauses."
    )
    max_undelivered_bytes: PositiveBytes = Field(
        ByteSize(64 * MIB), description="Bytes of outcomes that wait for the broker before reading pauses."
    )


class EngineSettings(WorkerSettings):
    """The settings of the workers that run an engine and use the token store."""

    redis_url: SecretStr = Field(
        SecretStr("redis://localhost:6379/0"),
        validation_alias="REDIS_URL",
        description="The token store: redis, rediss, unix, redis+sentinel or redis+cluster; may carry a password.",
    )
    checkpoint: Path = Field(Path("checkpoint"), description="Folder of the model checkpoint.")
    engine: Literal["auto", "torch", "tensorrt", "onnx", "constant"] = Field(
        "auto", description="Runtime; auto picks a fast one for this machine and logs it, constant computes nothing."
    )
    engine_directory: Path | None = Field(
        None, description="Output of `python -m trt.build` for the checkpoint, for tensorrt, onnx and auto."
    )
    constant_engine_ms_per_item: NonNegativeFloat = Field(
        0.0, description="Milliseconds that the constant engine takes for a pair or image, for tests and benchmarks."
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="Where the engine runs: cpu, cuda, cuda:1.")
    num_threads: PositiveInt | None = Field(
        None, description="Threads of the engine on a CPU; none: the runtime's choice."
    )
    storage: Literal["fp16", "bf16", "int8", "int4"] = Field("int8", description="Storage type of tokens.")

    @check(mode="after")
    def _engine_settings_agree(self) -> Self:
        if self.constant_engine_ms_per_item and self.engine != "constant":
            raise ValueError(f"constant_engine_ms_per_item is set and engine={self.engine} would not use it")
        if self.engine != "auto" and (self.engine_directory is not None) != (self.engine in ("tensorrt", "onnx")):
            remedy = "would not use it" if self.engine_directory else "needs one: make it with `python -m trt.build`"
            raise ValueError(f"engine_directory: engine={self.engine} {remedy}")
        return self


class RerankSettings(EngineSettings):
    """The rerank worker's settings."""

    model_config = SettingsConfigDict(env_prefix="RERANK_")

    group_id: str = Field("edje-rerank", min_length=1, description="Consumer group.")
    max_candidates: PositiveInt = Field(1000, description="Most candidates of one request.")
    max_query_chars: PositiveInt = Field(2000, description="Most characters of a query or of a candidate's text.")
    max_request_bytes: PositiveBytes = Field(
        ByteSize(MIB), description="Largest request that is read, after decompression."
    )
    max_inflight_bytes: PositiveBytes = Field(
        ByteSize(256 * MIB), description="Bytes of requests in work before reading pauses."
    )
    max_inflight_pairs: PositiveInt = Field(20_000, description="Pairs in work before reading pauses.")
    max_batch_tokens: PositiveInt = Field(65_536, description="Most text and visual tokens of one micro-batch.")
    max_batch_pairs: PositiveInt = Field(512, description="Most pairs of one micro-batch.")
    max_batch_wait_ms: NonNegativeFloat = Field(2.0, description="Longest wait of a pair for a fuller batch.")
    piece_pairs: PositiveInt = Field(128, le=1024, description="Most pairs of the pieces into which a request is cut.")
    slab_bytes: PositiveBytes = Field(ByteSize(1024 * MIB), description="Memory of the token slab on the device.")
    fetch_threads: PositiveInt = Field(2, le=64, description="Threads that read the store, each with one connection.")
    deadline_tolerance_ms: NonNegativeFloat = Field(
        0.0,
        description="Milliseconds added to each deadline, for producers whose clocks are behind this worker's.",
    )
    allowed_reply_topics: Words = Field(
        (), description="Patterns of the reply topics a request may name; none: <responses> and <responses>.*"
    )
    tokenizer_cache_size: int = Field(10_000, ge=0, description="Most texts whose token ids are cached.")
    fixed_buckets: bool = Field(
        False,
        description="Compute in fixed shapes: slower, but a score has the same bits in every batch.",
    )
    hot_images: int = Field(
        0, ge=0, description="Images whose keys and values a `minimal` encoder caches in the slab, within its bytes."
    )

    @check(mode="after")
    def _bounds_agree(self) -> Self:
        if self.fixed_buckets and self.engine not in ("auto", "torch", "tensorrt"):
            raise ValueError(f"fixed_buckets is set and engine={self.engine} would not use it")
        for smaller, larger in (
            ("piece_pairs", "max_batch_pairs"),
            ("max_batch_pairs", "max_inflight_pairs"),
            ("max_candidates", "max_inflight_pairs"),
            ("max_request_bytes", "max_inflight_bytes"),
        ):
            at_most(self, smaller, larger)
        return self

    @property
    def reply_topic_patterns(self) -> tuple[str, ...]:
        responses = Topics(self.topic_prefix).rerank_responses
        return self.allowed_reply_topics or (responses, f"{responses}.*")


class IngestSettings(EngineSettings):
    """The ingest worker's settings."""

    model_config = SettingsConfigDict(env_prefix="INGEST_")

    group_id: str = Field("edje-ingest", min_length=1, description="Consumer group.")
    http_port: int = Field(8081, ge=0, le=65535, description="Port of health and metrics; 0 takes a free one.")
    allowed_schemes: Words = Field(
        ("https", "http"), description="Schemes of addresses to read: http, https, file, s3, gs."
    )
    allowed_hosts: Words = Field(
        (), description="Hosts, buckets and patterns like *.example.com to read; none: any public host, no bucket."
    )
    allowed_ports: Ports = Field((), description="Ports to read from; none: any.")
    file_roots: Paths = Field((), description="Folders from which file addresses may be read.")
    allow_private_addresses: bool = Field(
        False,
        description="Also read from private and loopback addresses; never from link-local ones and those of cloud "
        "metadata services.",
    )
    max_image_bytes: PositiveBytes = Field(ByteSize(32 * MIB), description="Largest image file.")
    max_image_pixels: PositiveInt = Field(50_000_000, description="Most pixels of an image, by its header.")
    max_redirects: int = Field(3, ge=0, le=20, description="Redirects followed, each checked like the first address.")
    fetch_timeout_s: PositiveFloat = Field(
        15.0, description="Time limit of one attempt, from name lookup to the last byte."
    )
    fetch_retry_s: PositiveFloat = Field(
        600.0, description="How long the fetch of an image is retried before its dead letter."
    )
    fetch_threads: PositiveInt = Field(
        16,
        le=256,
        description="Images fetched at once; a slow host gets at most a quarter of them, a fast one three quarters.",
    )
    decode_threads: PositiveInt = Field(2, le=256, description="Most images decoded at once.")
    max_batch_images: PositiveInt = Field(16, description="Most images of one batch.")
    max_batch_wait_ms: NonNegativeFloat = Field(20.0, description="Longest wait of an image for a fuller batch.")
    max_inflight_images: PositiveInt = Field(256, description="Most images in work before reading pauses.")
    max_inflight_bytes: PositiveBytes = Field(
        ByteSize(512 * MIB), description="Most bytes of images in work before reading pauses."
    )
    thumbnails: bool = Field(False, description="Also store a thumbnail of each image, for search pages.")
    publish_embedding: bool = Field(False, description="Whether images.indexed carries the pooled embedding.")

    @check(mode="after")
    def _bounds_agree(self) -> Self:
        at_most(self, "max_batch_images", "max_inflight_images")
        at_most(self, "max_image_bytes", "max_inflight_bytes")
        if ("file" in self.allowed_schemes) != bool(self.file_roots):
            raise ValueError("file among allowed_schemes and file_roots go together: set both or neither")
        if {"s3", "gs"} & set(self.allowed_schemes) and not self.allowed_hosts:
            raise ValueError("s3 and gs among allowed_schemes need the names of their buckets in allowed_hosts")
        return self


def at_most(settings: BaseSettings, smaller: str, larger: str) -> None:
    """Raise `ValueError` if the first limit exceeds the second."""
    low, high = getattr(settings, smaller), getattr(settings, larger)
    if low > high:
        raise ValueError(f"{smaller}={low} is more than {larger}={high}")
