"""Ranks candidate lists with a running service, through its command line `python -m workers.publish requests`.

The service is another program to this package: requests and replies are events as JSON lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edje.data.candidate_lists import CandidateList
from edje.evaluation.errors import ServiceFailed

COMMAND = (sys.executable, "-m", "workers.publish", "requests", "-")


def rank_through_service(
    lists: Sequence[CandidateList], command: Sequence[str] = COMMAND
) -> tuple[list[NDArray[np.int64]], str]:
    """The positions of each list's candidates, best first, and the digest of the model that ranked them.

    Names of images are the ids under which the service indexed them. Candidates that a reply does not rank, such as
    missing images, follow in the given order. Raises `ServiceFailed`.
    """
    run = uuid.uuid4().hex[:8]
    requests = "".join(json.dumps(request_of(one, f"{run}-{number}")) + "\n" for number, one in enumerate(lists))
    done = subprocess.run(command, input=requests.encode(), capture_output=True, check=False)
    if done.returncode:
        raise ServiceFailed(f"the service did not answer: {done.stderr.decode(errors='replace').strip()[-500:]}")
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    if len(replies) != len(lists):
        raise ServiceFailed(f"{len(replies)} replies to {len(lists)} requests")
    orders = [_order_of(one, reply) for one, reply in zip(lists, replies, strict=True)]
    models = {reply.get("model") for reply in replies}
    if len(models) > 1:
        raise ServiceFailed(f"workers with several models replied: {', '.join(map(str, sorted(models, key=str)))}")
    return orders, str(models.pop())


def request_of(one: CandidateList, request_id: str) -> dict[str, object]:
    """The request event of a list."""
    asks_text = one.direction == "text-to-image"
    field = "image_id" if asks_text else "text"
    candidates = [
        {field: candidate.content} | ({} if candidate.score is None else {"score": candidate.score})
        for candidate in one.candidates
    ]
    query = {"text" if asks_text else "image_id": one.query}
    return {"schema_version": 1, "request_id": request_id, "query": query, "candidates": candidates}


def _order_of(one: CandidateList, reply: dict[str, object]) -> NDArray[np.int64]:
    if reply.get("status") not in ("ok", "partial"):
        raise ServiceFailed(f"line {one.line}: the service replied {reply.get('status')}: {reply.get('error')}")
    results = reply.get("results")
    ranked = [int(result["index"]) for result in results] if isinstance(results, list) else []
    missing = sorted(set(range(len(one.candidates))) - set(ranked))
    return np.array(ranked + missing, np.int64)
