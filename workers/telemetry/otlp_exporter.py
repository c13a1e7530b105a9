"""Sends spans to an OTLP endpoint over HTTP: the SDK's exporter (address, headers, TLS, compression, retries) with a
faster encoder.

The SDK's exporter accepts no other encoder, so its private client is used; a test sends spans to a real endpoint
through it.
"""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource

from workers.telemetry.finished_span import FinishedSpan
from workers.telemetry.otlp_protobuf import encode_request


class OtlpExporter:
    """Exports to the endpoint in OTEL_EXPORTER_OTLP_*."""

    def __init__(self, resource: Resource) -> None:
        self._resource = resource
        self._exporter = OTLPSpanExporter()

    def export(self, spans: Sequence[FinishedSpan]) -> bool:
        is_taken: bool = self._exporter._client.export(encode_request(self._resource, spans)).success
        return is_taken

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
