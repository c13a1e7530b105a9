"""The settings of the gateway."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Literal, Self

from pydantic import ByteSize, Field, NonNegativeFloat, PositiveFloat, PositiveInt, SecretStr
from pydantic import model_validator as check
from pydantic_settings import SettingsConfigDict

from workers.gateway.api_keys import ApiKeys
from workers.index.settings import DATABASE_URL
from workers.settings import MIB, Paths, PositiveBytes, ServiceSettings, at_most

_ORDINAL = re.compile(r".*-(\d{1,4})")


class GatewaySettings(ServiceSettings):
    """The gateway's settings."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_")

    host: str = Field("127.0.0.1", description="Address of the APIs and the page; 0.0.0.0 for all interfaces.")
    port: int = Field(
        8000, ge=0, le=65535, description="Port of the APIs and the page; 0 takes a free one and logs it."
    )
    http_port: int = Field(
        8083, ge=0, le=65535, description="Port of health and metrics; 0 takes a free one and logs it."
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://localhost:6379/0"),
        validation_alias="REDIS_URL",
        description="The token store, from which thumbnails are served; may carry a password.",
    )
    search: bool = Field(True, description="Serve /v1/search and the page; needs DATABASE_URL and a checkpoint.")
    database_url: SecretStr = DATABASE_URL
    checkpoint: Path = Field(
        Path("checkpoint"), description="Folder of the model checkpoint, whose first stage embeds queries."
    )
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="Callers as name:SHA-256 of the key, separated by commas; none: everyone may call. "
        "`python -m workers.gateway --new-key NAME` makes an entry.",
    )
    documents: Literal["id", "uri", "text"] = Field(
        "id",
        description="Meaning of a document that is a string: an image id, an image's address, or a text.",
    )
    on_failure: Literal["first_stage", "error"] = Field(
        "first_stage", description="The answer if no ranking arrives in time: the given order, or an error."
    )
    timeout_ms: PositiveInt = Field(5_000, description="Longest wait for an answer, unless the request sets one.")
    max_timeout_ms: PositiveInt = Field(30_000, description="Longest wait that a request may set.")
    deadline_margin_ms: NonNegativeFloat = Field(
        100.0, description="Time between a request's deadline and the end of the wait; at most half of the wait."
    )
    max_documents: PositiveInt = Field(1_000, description="Documents of one request; at most RERANK_MAX_CANDIDATES.")
    max_body_bytes: PositiveBytes = Field(ByteSize(MIB), description="Largest body of a request, uploads excepted.")
    max_upload_bytes: PositiveBytes = Field(ByteSize(32 * MIB), description="Largest upload, all its files together.")
    body_timeout_s: PositiveFloat = Field(15.0, description="A body that takes longer to arrive is refused.")
    max_connections: PositiveInt = Field(4_000, description="Most connections at once; others get 503.")
    max_inflight_pairs: PositiveInt = Field(20_000, description="Pairs without a reply before requests get 429.")
    requests_per_s: PositiveFloat | None = Field(None, description="Rate limit of each API key; none: no limit.")
    reply_partition: int | None = Field(
        None,
        ge=0,
        description="The partition of the reply topic that this replica reads; none: the number at the end of the "
        "host's name (a StatefulSet's pod), else 0.",
    )
    examples: str = Field("", description="Queries that the page offers, separated by semicolons.")
    trace_files: Paths = Field(
        (), description="Span files (RERANK_SPAN_FILE, GATEWAY_SPAN_FILE) on this machine, shown by /traces/REQUEST_ID."
    )
    index_threads: PositiveInt = Field(4, le=64, description="Most searches of the index at once.")
    trace_url: str = Field("", description="Address of a trace in your tracing tool; must contain {trace_id}.")
    drain_delay_s: NonNegativeFloat = Field(
        0.0, description="Pause after SIGTERM before connections are refused, so that load balancers notice."
    )

    @check(mode="after")
    def _bounds_agree(self) -> Self:
        at_most(self, "timeout_ms", "max_timeout_ms")
        at_most(self, "max_documents", "max_inflight_pairs")
        if self.trace_url and "{trace_id}" not in self.trace_url:
            raise ValueError("trace_url does not contain {trace_id}")
        ApiKeys.parse(self.api_keys.get_secret_value())
        return self

    def example_queries(self) -> list[str]:
        """Return the queries that the page offers."""
        return [query.strip() for query in self.examples.split(";") if query.strip()]

    def own_partition(self) -> int:
        """Return the partition of replies that this replica reads."""
        if self.reply_partition is not None:
            return self.reply_partition
        match = _ORDINAL.fullmatch(socket.gethostname())
        return int(match[1]) if match else 0
