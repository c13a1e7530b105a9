"""Builds and runs one replica of the gateway: HTTP server, Kafka, index, store, health, signals.

The only module of the gateway that names adapters; all others know ports.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import structlog

from edje.checkpoint import read_config
from protocols.topics import Topics
from workers.bus.connection import kafka_connection
from workers.bus.follower import KafkaFollower
from workers.bus.producer import KafkaOutbox
from workers.errors import Misconfigured, Transient
from workers.gateway.api_keys import ApiKeys
from workers.gateway.app import Gate, build_app
from workers.gateway.handlers import Handlers
from workers.gateway.http_server import HttpServer, listening_socket
from workers.gateway.images import Images
from workers.gateway.limits import PairBudget, RateLimit
from workers.gateway.openapi import openapi_document
from workers.gateway.page import TRACE_PATH, SearchPage, TracePages
from workers.gateway.requests import RerankRequests
from workers.gateway.reranking import Reranking, RerankRules, without_index
from workers.gateway.searching import IndexSearch, Searching
from workers.gateway.settings import GatewaySettings
from workers.health import Health, HealthServer
from workers.index.client import PostgresIndex
from workers.index.vectors import VectorModel
from workers.metrics import Metrics
from workers.retrying import BASE_PAUSE_S, MAX_PAUSE_S
from workers.store.client import RedisStore
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.setup import start_metric_export, start_tracing

log = structlog.get_logger(__name__)

#: The conditions of `/readyz`.
FIRST_STAGE_LOADED, KAFKA_CONNECTED = "first stage loaded", "Kafka connected and replies followed"
CLOSE_S = 5.0
#: Interval at which the event loop reports to the health pages that it turns.
TURN_S = 0.25
#: The model's information in a gateway without a checkpoint.
NO_MODEL: dict[str, Any] = {"model": None, "digest": None, "token_grid": None, "explains": False}
#: Interval at which spans and gauges are updated.
HOUSEKEEPING_S = 1.0


class Gateway:
    """One replica of the gateway, from its settings to its end."""

    def __init__(self, settings: GatewaySettings, stack: ExitStack) -> None:
        """`stack` closes the resources that outlive the event loop."""
        self._settings = settings
        self._stack = stack
        self._clock = time.monotonic
        self._metrics = Metrics()
        self._topics = Topics(settings.topic_prefix)
        waits_for = (FIRST_STAGE_LOADED, KAFKA_CONNECTED) if settings.search else (KAFKA_CONNECTED,)
        self._health = Health(waits_for=waits_for, stall_limit_s=settings.stall_limit_s)
        self._health_server = stack.enter_context(
            HealthServer(
                self._health,
                self._metrics.registry,
                clock=self._clock,
                host=settings.http_host,
                port=settings.http_port,
            )
        )
        self._tracer = start_tracing("gateway", settings.telemetry(), self._metrics, self._clock, stack)
        self._metric_export = start_metric_export("gateway", settings.telemetry(), self._metrics.registry, stack)
        self._spans = BusSpans(self._tracer, topic=self._topics.gateway_replies, group_id="")

    async def run(self) -> None:
        """Serve until a signal arrives, then until the open requests are answered or the drain grace is over."""
        settings, loop = self._settings, asyncio.get_running_loop()
        listener = listening_socket(settings.host, settings.port)
        vectors, index = await self._open_index()
        requests = RerankRequests(
            request_topic=self._topics.rerank_requests,
            metrics=self._metrics,
            clock=self._clock,
            loop=loop,
            sent=self._spans.sent,
        )
        reranking = Reranking(
            requests,
            rules_of(settings, self._topics),
            PairBudget(settings.max_inflight_pairs),
            resolve_uris=without_index if index is None else index.ids_of_uris,
            metrics=self._metrics,
            clock=self._clock,
        )
        searching = None
        if index is not None:
            searching = Searching(index, reranking, metrics=self._metrics, clock=self._clock)
        store = RedisStore(settings.redis_url.get_secret_value())
        self._stack.callback(store.close)
        images = Images(
            topic=self._topics.images_new,
            index=index,
            store=store,
            max_message_bytes=settings.max_message_bytes,
            timeout_s=settings.timeout_ms / 1000,
        )
        self._stack.callback(images.close)
        server = HttpServer(
            self._app(reranking, searching, index, images, vectors),
            max_connections=settings.max_connections,
            drain_grace_s=settings.drain_grace_s,
        )
        self._drain_on_signals(loop, server)
        log.info("listening", host=settings.host, port=listener.getsockname()[1])
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        connecting = asyncio.create_task(self._connect(requests, images))
        turning = asyncio.create_task(self._keep_turning(connecting))
        ends: list[asyncio.Future[None]] = [serving, turning, requests.failed]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()
        finally:
            server.should_exit = True
            connecting.cancel()
            turning.cancel()
            await asyncio.gather(serving, connecting, turning, return_exceptions=True)
            self._spans.flush()

    async def _open_index(self) -> tuple[VectorModel | None, IndexSearch | None]:
        """Return the first stage of the checkpoint and its index; None for both if search is off."""
        settings = self._settings
        if not settings.search:
            return None, None
        vectors = await asyncio.to_thread(VectorModel.load, settings.checkpoint)
        self._health.met(FIRST_STAGE_LOADED)
        timeout_s = settings.timeout_ms / 1000
        index = PostgresIndex(
            settings.database_url.get_secret_value(),
            model_digest=vectors.model_digest,
            dim=vectors.dim,
            creates=False,
            connect_timeout_s=max(1, min(5, math.ceil(timeout_s))),
            timeout_s=timeout_s,
        )
        search = IndexSearch(index, vectors, num_threads=settings.index_threads, timeout_s=timeout_s)
        self._stack.callback(search.close)
        return vectors, search

    def _app(
        self,
        reranking: Reranking,
        searching: Searching | None,
        index: IndexSearch | None,
        images: Images,
        vectors: VectorModel | None,
    ) -> Any:
        settings = self._settings
        keys = ApiKeys.parse(settings.api_keys.get_secret_value())
        if not keys.are_required:
            log.warning("every caller may use the gateway, because GATEWAY_API_KEYS is empty")
        info = model_info(settings.checkpoint, vectors.model_digest) if vectors is not None else NO_MODEL
        handlers = Handlers(
            reranking=reranking,
            searching=searching,
            index=index,
            images=images,
            documents={"id": "image_id", "uri": "uri", "text": "text"}[settings.documents],  # type: ignore[arg-type]
            max_documents=settings.max_documents,
            max_upload_bytes=settings.max_upload_bytes,
            openapi=openapi_document(),
            info=info,
        )
        gate = Gate(
            keys=keys,
            rate_limit=RateLimit(settings.requests_per_s),
            tracer=self._tracer,
            metrics=self._metrics,
            clock=self._clock,
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
        )
        endpoints = handlers.endpoints()
        if searching is not None:
            page = SearchPage(
                {
                    **info,
                    "examples": settings.example_queries(),
                    "needs_key": keys.are_required,
                    "trace_url": settings.trace_url or (TRACE_PATH if settings.trace_files else ""),
                    "max_image_bytes": images.max_image_bytes,
                    "max_candidates": min(settings.max_documents, 1_000),
                }
            )
            endpoints += page.endpoints()
        if settings.trace_files:
            endpoints += TracePages(settings.trace_files).endpoints()
        return build_app(gate, endpoints)

    def _drain_on_signals(self, loop: asyncio.AbstractEventLoop, server: HttpServer) -> None:
        def drain() -> None:
            self._health.draining()
            log.info("draining", grace_s=self._settings.drain_grace_s)
            loop.call_later(self._settings.drain_delay_s, stop)

        def stop() -> None:
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, drain)

    async def _connect(self, requests: RerankRequests, images: Images) -> None:
        """Connect to Kafka, retrying until it answers; `/readyz` reports the last error."""
        pause_s = BASE_PAUSE_S
        while True:
            try:
                outbox, replies, letters = await asyncio.to_thread(self._connect_once, requests, images)
                break
            except (Transient, Misconfigured) as error:
                self._health.explain(KAFKA_CONNECTED, str(error))
                self._metrics.count_retry("connect")
                log.warning("Kafka is not connected, trying again", error=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        requests.follower, images.dead_letters = replies, letters
        requests.outbox = images.outbox = outbox
        self._health.met(KAFKA_CONNECTED)
        log.info("ready", replies=self._topics.gateway_replies, partition=self._settings.own_partition())

    def _connect_once(
        self, requests: RerankRequests, images: Images
    ) -> tuple[KafkaOutbox, KafkaFollower, KafkaFollower]:
        """Return the outbox and the followers of replies and dead letters. Raises `Transient` or `Misconfigured`."""
        settings = self._settings
        connection = kafka_connection(settings, client_id="edje-gateway")
        topic, partition = self._topics.gateway_replies, settings.own_partition()
        loop = requests.loop
        with ExitStack() as opened:
            replies = self._follow(connection, topic, requests.wake, {partition})
            opened.callback(replies.close, CLOSE_S)
            if replies.unknown_topics():
                raise Misconfigured(
                    f"the topic {topic} has no partition {partition}: create the topic with more partitions than there "
                    "are replicas (deploy/kafka/topics.toml), or set GATEWAY_REPLY_PARTITION"
                )
            letters = self._follow(
                connection,
                self._topics.dead_letter(self._topics.images_new),
                lambda: loop.call_soon_threadsafe(receive_dead_letters, requests, images),
                None,
            )
            opened.callback(letters.close, CLOSE_S)
            outbox = KafkaOutbox(connection, max_message_bytes=settings.max_message_bytes)
            opened.callback(outbox.close, CLOSE_S)
            self._stack.push(opened.pop_all())
        return outbox, replies, letters

    def _follow(
        self,
        connection: Mapping[str, Any],
        topic: str,
        wake: Callable[[], object],
        partitions: set[int] | None,
    ) -> KafkaFollower:
        return KafkaFollower(
            connection,
            topic,
            wake=lambda: _quietly(wake),
            partitions=partitions,
            max_message_bytes=self._settings.max_message_bytes,
        )

    async def _keep_turning(self, connecting: asyncio.Task[None]) -> None:
        """Report that the event loop turns, and update spans and gauges. Raises the error that ended another thread."""
        due = 0.0
        while True:
            if connecting.done():
                connecting.result()
            now = self._clock()
            self._health.turned(now)
            if now >= due:
                due = now + HOUSEKEEPING_S
                self._spans.refresh()
                if not self._health_server.is_serving():
                    raise RuntimeError("the thread that serves health and metrics has died")
                if self._metric_export is not None and not self._metric_export.is_running():
                    raise RuntimeError("the thread that exports metrics has died")
            await asyncio.sleep(TURN_S)


def receive_dead_letters(requests: RerankRequests, images: Images) -> None:
    """Read the dead letters that have arrived; an error of the follower's thread ends the process."""
    try:
        images.receive_dead_letters()
    except Exception as error:
        if not requests.failed.done():
            requests.failed.set_exception(error)


def _quietly(call: Callable[[], object]) -> None:
    """Call a function from a follower's thread; ignore that the event loop is closed."""
    try:
        call()
    except RuntimeError:
        return


def rules_of(settings: GatewaySettings, topics: Topics) -> RerankRules:
    return RerankRules(
        reply_topic=topics.gateway_replies,
        reply_partition=settings.own_partition(),
        on_failure=settings.on_failure,
        timeout_s=settings.timeout_ms / 1000,
        max_timeout_s=settings.max_timeout_ms / 1000,
        deadline_margin_s=settings.deadline_margin_ms / 1000,
        max_documents=settings.max_documents,
    )


def model_info(checkpoint: Path, digest: str) -> dict[str, Any]:
    """Return the public information about the model, for callers and the page. Raises `CheckpointError`.

    `token_grid` is (rows, columns) of the visual tokens if the adapter keeps their positions, else None.
    """
    config = read_config(checkpoint)
    side = math.isqrt(config.adapter.num_tokens)
    keeps_places = config.adapter.kind == "local" and side * side == config.adapter.num_tokens
    return {
        "model": config.name,
        "digest": digest,
        "token_grid": [side, side] if keeps_places else None,
        "explains": bool(config.joint.match_dim),
    }
