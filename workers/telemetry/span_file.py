"""Writes spans to a local file, a line each, for looking at traces without infrastructure (`python -m workers.traces`).

A full file becomes `<name>.1`, in place of the one before, so that no more than twice its size is ever taken.
Called from the exporting thread. One process to a file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import structlog
from opentelemetry.sdk.resources import Resource

from workers.errors import Misconfigured
from workers.telemetry.finished_span import FinishedSpan
from workers.telemetry.otlp_json import span_line

log = structlog.get_logger(__name__)


def predecessor_of(path: Path) -> Path:
    """Where a full file goes."""
    return path.with_name(f"{path.name}.1")


class SpanFile:
    """The exporter of one file."""

    def __init__(self, resource: Resource, path: Path, max_bytes: int) -> None:
        """Appends to what is there. Raises `Misconfigured` if the file cannot be written."""
        self._resource = resource
        self._path = path
        self._max_bytes = max_bytes
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise Misconfigured(f"spans cannot be written to {path}: {error}") from error

    def export(self, spans: Sequence[FinishedSpan]) -> bool:
        lines = b"".join(span_line(self._resource, span) for span in spans)
        try:
            if self._file.tell() and self._file.tell() + len(lines) > self._max_bytes:
                self._turn_over()
            self._file.write(lines)
        except OSError as error:
            log.warning("spans not written", path=str(self._path), error=str(error))
            return False
        return True

    def _turn_over(self) -> None:
        self._file.close()
        os.replace(self._path, predecessor_of(self._path))
        self._file = self._path.open("ab", buffering=0)

    def shutdown(self) -> None:
        self._file.close()
