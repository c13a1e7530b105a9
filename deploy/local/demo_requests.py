"""Asks the demo's questions through Kafka: publishes all requests, then reads the replies."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from demo_rankings import Question, Ranking
from server_process import ServiceError
from workers.client import Client

REPLY_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Answers:
    """The ranking of each question with its request id, and the model and engine that computed them."""

    rankings: Sequence[Ranking]
    request_ids: Sequence[str]
    model_digest: str
    engine_digest: str

    def request_id_of(self, ranking: Ranking) -> str:
        """Return the id of the request that this ranking answers."""
        return next(name for name, each in zip(self.request_ids, self.rankings, strict=True) if each is ranking)


def ask_all(client: Client, questions: Sequence[Question]) -> Answers:
    """Return the rankings. Raises `ServiceError` for a reply without a ranking, or the client's errors."""
    requests = [question.request(f"demo-{uuid.uuid4().hex[:12]}") for question in questions]
    for published in [client.publish_request(request) for request in requests]:
        published.result(REPLY_TIMEOUT_S)
    responses = []
    for request in requests:
        response = client.reply_to(request.request_id, REPLY_TIMEOUT_S).response
        if response.status != "ok":
            raise ServiceError(f"a request was answered with {response.status}: {response.error}")
        responses.append(response)
    rankings = [
        question.ranking(response.results, response.timings_ms)
        for question, response in zip(questions, responses, strict=True)
    ]
    request_ids = [request.request_id for request in requests]
    return Answers(rankings, request_ids, responses[0].model, responses[0].engine)
