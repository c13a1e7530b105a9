"""A gateway over the in-memory bus, index and store on a real port, for HTTP clients, without services.

A fake rerank worker answers its requests by a rule of the test.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protocols.encoding import decode, encode
from protocols.events import ErrorInfo, RerankRequest, RerankResponse, Result
from protocols.source_position import SourcePosition
from protocols.topics import Topics
from tracing_harness import Recorded
from workers.bus.memory import MemoryBroker, MemoryFollower, MemoryOutbox
from workers.gateway.api_keys import ApiKeys
from workers.gateway.app import Gate, build_app
from workers.gateway.handlers import Handlers
from workers.gateway.http_server import HttpServer, listening_socket
from workers.gateway.images import Images
from workers.gateway.limits import PairBudget, RateLimit
from workers.gateway.openapi import openapi_document
from workers.gateway.page import SearchPage
from workers.gateway.requests import RerankRequests
from workers.gateway.reranking import Reranking, RerankRules
from workers.gateway.searching import IndexSearch, Searching
from workers.index.memory import MemoryIndex
from workers.index.port import ImageRow
from workers.metrics import Metrics
from workers.ports import Outgoing, Record
from workers.store.memory import MemoryStore
from workers.telemetry.bus_spans import BusSpans

TOPICS = Topics()
PARTITION = 1
LIMIT_S = 20.0
SHA = "a" * 64


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Embedder:
    """Embeds a text as a vector whose angle is the number of its first letter."""

    def of_text(self, text: str) -> np.ndarray:
        angle = (ord(text[0].lower()) - ord("a")) / 26
        return np.array([np.cos(angle), np.sin(angle)], np.float32)


class FakeWorker:
    """Answers requests by its rule, in place of a rerank worker; the default ranks candidates in reverse."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._positions = [0] * broker.num_partitions
        self.requests: list[RerankRequest] = []
        self.records: list[Record] = []
        self.cancelled: list[str] = []
        self.missing: set[str] = set()
        self.rule: Callable[[RerankRequest], RerankResponse | bytes | None] = self.in_reverse
        broker.on_append(self.look)

    def look(self) -> None:
        for number, position in enumerate(self._positions):
            log = self._broker.partition_log(TOPICS.rerank_requests, number)
            self._positions[number] = len(log)
            self._take(log[position:])

    def _take(self, records: list[Record]) -> None:
        for record in records:
            self.records.append(record)
            if record.value is None:
                self.cancelled.append((record.key or b"").decode())
                continue
            request = decode(RerankRequest, record.value)
            self.requests.append(request)
            response = self.rule(request)
            if response is not None:
                self.reply(request, response)

    def reply(self, request: RerankRequest, response: RerankResponse | bytes) -> None:
        value = response if isinstance(response, bytes) else encode(response)
        self._broker.append(
            Outgoing(
                request.reply_topic or TOPICS.rerank_responses,
                request.request_id.encode(),
                value,
                partition=request.reply_partition,
            )
        )

    def in_reverse(self, request: RerankRequest) -> RerankResponse:
        names = [candidate.get("image_id") for candidate in request.candidates]
        order = [index for index in reversed(range(len(names))) if names[index] not in self.missing]
        results = [
            Result(index=index, id=names[index], relevance_score=round(0.9 - place / 2_000, 4), logit=-float(place))
            for place, index in enumerate(order)
        ]
        missing = [name for name in names if name in self.missing]
        return RerankResponse(
            request_id=request.request_id,
            status="partial" if missing else "ok",
            results=results[: request.top_n],
            missing=missing,
            model="m1",
            engine="e1",
            timings_ms={"score": 1.5},
        )

    def never(self, request: RerankRequest) -> None:
        """Answer nothing."""

    def error(self, code: str, message: str = "what went wrong") -> Callable[[RerankRequest], RerankResponse]:
        def rule(request: RerankRequest) -> RerankResponse:
            error = ErrorInfo(code=code, message=message)
            return RerankResponse(request_id=request.request_id, status="error", model="m1", engine="e1", error=error)

        return rule

    def expired(self, request: RerankRequest) -> RerankResponse:
        return RerankResponse(request_id=request.request_id, status="expired", model="m1", engine="e1")


@dataclass
class GatewayBench:
    """A running gateway and everything around it."""

    broker: MemoryBroker = field(default_factory=lambda: MemoryBroker(num_partitions=3))
    index: MemoryIndex = field(default_factory=MemoryIndex)
    store: MemoryStore = field(default_factory=MemoryStore)
    metrics: Metrics = field(default_factory=Metrics)
    recorded: Recorded = field(default_factory=Recorded)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.worker = FakeWorker(self.broker)
        self.requests: RerankRequests | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gateway-bench")
        self._listener = listening_socket("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self._thread.start()
        assert self._started.wait(LIMIT_S)

    async def _serve(self) -> None:
        option = self.options.get
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        tracer = self.recorded.tracer(time.monotonic)
        requests = self.requests = RerankRequests(
            request_topic=TOPICS.rerank_requests,
            metrics=self.metrics,
            clock=time.monotonic,
            loop=self.loop,
            sent=BusSpans(tracer, topic="", group_id="").sent,
        )
        index = IndexSearch(self.index, Embedder(), num_threads=2, timeout_s=option("timeout_s", 5.0))
        budget = PairBudget(option("max_inflight_pairs", 10_000))
        rules = RerankRules(
            reply_topic=TOPICS.gateway_replies,
            reply_partition=PARTITION,
            on_failure=option("on_failure", "first_stage"),
            timeout_s=option("timeout_s", 5.0),
            max_timeout_s=30.0,
            deadline_margin_s=0.1,
            max_documents=1_000,
        )
        reranking = Reranking(
            requests, rules, budget, resolve_uris=index.ids_of_uris, metrics=self.metrics, clock=time.monotonic
        )
        images = Images(
            topic=TOPICS.images_new, index=index, store=self.store, max_message_bytes=200_000, timeout_s=5.0
        )
        if option("connected", True):
            requests.outbox = images.outbox = MemoryOutbox(self.broker)
        requests.follower = MemoryFollower(
            self.broker, TOPICS.gateway_replies, wake=requests.wake, partitions=[PARTITION]
        )
        images.dead_letters = MemoryFollower(
            self.broker,
            TOPICS.dead_letter(TOPICS.images_new),
            wake=lambda: self.loop.call_soon_threadsafe(images.receive_dead_letters),
        )
        searching = Searching(index, reranking, metrics=self.metrics, clock=time.monotonic)
        info = {"model": "scenes", "digest": "m1", "token_grid": [3, 3], "explains": True}
        handlers = Handlers(
            reranking=reranking,
            searching=searching if option("search", True) else None,
            index=index,
            images=images,
            documents=option("documents", "image_id"),
            max_documents=option("max_documents", 1_000),
            max_upload_bytes=option("max_upload_bytes", 1 << 20),
            openapi=openapi_document(),
            info=info,
        )
        gate = Gate(
            keys=ApiKeys.parse(option("api_keys", "")),
            rate_limit=RateLimit(option("requests_per_s", None)),
            tracer=tracer,
            metrics=self.metrics,
            clock=time.monotonic,
            max_body_bytes=option("max_body_bytes", 1 << 20),
            body_timeout_s=option("body_timeout_s", 5.0),
        )
        page = SearchPage(
            {
                **info,
                "examples": option("examples", ("a red circle",)),
                "needs_key": bool(option("api_keys", "")),
                "trace_url": option("trace_url", ""),
                "max_image_bytes": images.max_image_bytes,
                "max_candidates": 1_000,
            }
        )
        app = build_app(gate, [*handlers.endpoints(), *page.endpoints()])
        server = HttpServer(app, max_connections=option("max_connections", 4_000), drain_grace_s=5.0)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        self._started.set()
        await self._stop.wait()
        server.should_exit = True
        await serving
        images.close()
        index.close()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = LIMIT_S,
    ) -> Answer:
        """Make one request; a body that is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.call("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def rerank(self, documents: list[Any], query: Any = "a dog", path: str = "/v2/rerank", **fields: Any) -> Answer:
        return self.post(path, {"query": query, "documents": documents} | fields)

    def add_images(self, *names: str, **metadata: str) -> None:
        """Put images into the index; their vectors fan out from that of `a`."""
        rows = []
        for number, name in enumerate(names):
            angle = number / 100
            vector = np.array([np.cos(angle), np.sin(angle)], np.float32)
            rows.append(ImageRow(name, SourcePosition(number, 1), SHA, vector, metadata))
        self.index.apply(rows)

    def value_of(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0

    def eventually(self, condition: Callable[[], object]) -> None:
        end, pause = time.monotonic() + LIMIT_S, threading.Event()
        while not condition():
            assert time.monotonic() < end, "the condition is still false"
            pause.wait(0.005)
