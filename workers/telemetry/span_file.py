"""Writes spans to a local file, one per line, to read traces without infrastructure (`python -m workers.traces`).

A full file is renamed to `<name>.1`, replacing the previous one, so the files take at most twice the limit.
Called from the exporting thread. Each process needs its own file.
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
    """Return the path that a full file is renamed to."""
    return path.with_name(f"{path.name}.1")


class SpanFile:
    """Exports to one file."""

    def __init__(self, resource: Resource, path: Path, max_bytes: int) -> None:
        """Append to an existing file. Raises `Misconfigured` if the file cannot be written."""
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
