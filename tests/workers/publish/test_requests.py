"""A file of requests: replies in the order of the requests, a bounded number of them outstanding."""

from __future__ import annotations

import json

import pytest

from protocols.events import RerankResponse
from workers.client import Reply
from workers.publish.requests import replies_to, requests_in


def line(request_id):
    candidates = [{"image_id": "img-1"}]
    return json.dumps({"request_id": request_id, "query": {"text": "a dog"}, "candidates": candidates})


class EchoClient:
    """A client that replies to each request and records how many are outstanding."""

    def __init__(self):
        self.outstanding = []
        self.most = 0

    def publish_request(self, request):
        self.outstanding.append(request.request_id)
        self.most = max(self.most, len(self.outstanding))

    def reply_to(self, request_id, timeout_s):
        self.outstanding.remove(request_id)
        return Reply(RerankResponse(request_id=request_id, status="ok", model="0" * 16, engine="0" * 16), None)


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_replies_come_in_the_order_of_the_requests(concurrency):
    client, events = EchoClient(), requests_in([line(f"r-{number}") for number in range(10)])

    replies = list(replies_to(client, events, concurrency, 1.0))

    assert [reply.request_id for reply in replies] == [f"r-{number}" for number in range(10)]
    assert client.most == min(10, concurrency)


def test_a_line_that_is_not_a_request_is_reported_with_its_number():
    with pytest.raises(ValueError, match="line 3: "):
        requests_in([line("r-1"), "\n", "{"])


def test_two_requests_with_one_id_are_refused():
    with pytest.raises(ValueError, match="the same request_id"):
        requests_in([line("r-1"), line("r-1")])
