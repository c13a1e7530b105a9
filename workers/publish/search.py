"""Calls a gateway's `POST /v1/search` from the command line. Knows HTTP and the answer's fields; no Kafka."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from workers.errors import WorkerError

#: Longer than the gateway's timeout: ends the wait for a gateway that does not answer.
TIMEOUT_S = 60.0


class SearchFailed(WorkerError):
    """The gateway did not answer a search; the message is for the person who ran the command."""


def search(
    gateway: str,
    query: str,
    *,
    top_n: int,
    candidates: int,
    filters: Mapping[str, Sequence[str]],
    key: str | None,
) -> Mapping[str, Any]:
    """Return the answer of a search. Raises `SearchFailed`."""
    body = {"query": query, "top_n": top_n, "candidates": max(candidates, top_n), "filter": filters}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        request = urllib.request.Request(f"{gateway.rstrip('/')}/v1/search", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found: Mapping[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise SearchFailed(f"{gateway}: {_message_in(error)}") from error
    except (OSError, ValueError) as error:
        raise SearchFailed(f"{gateway} does not answer: {getattr(error, 'reason', error)}; is it running?") from error
    return found


def filters_of(conditions: Sequence[str]) -> dict[str, list[str]]:
    """Return the filter of `key=value` conditions; several values of one key are alternatives. Raises `ValueError`."""
    filters: dict[str, list[str]] = {}
    for condition in conditions:
        key, separator, value = condition.partition("=")
        if not key or not separator:
            raise ValueError(f"{condition!r} is not key=value")
        filters.setdefault(key, []).append(value)
    return filters


def _message_in(error: urllib.error.HTTPError) -> str:
    try:
        body = json.loads(error.read(100_000))
        return f"{body['message']} ({error.code} {body['code']})"
    except (ValueError, KeyError, TypeError, OSError):
        return f"answers with status {error.code}"
