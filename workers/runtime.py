"""What both workers are made of, put together: settings, logs, health, store, bus, delivery, loop, signals.

Each worker adds its job. Of a worker only this module names adapters; everything else knows ports.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Generic, TypeVar

import structlog

from protocols.topics import Topics
from trt.contract import EngineError
from workers.bus.connection import kafka_connection
from workers.bus.consumer import KafkaInbox
from workers.bus.producer import KafkaOutbox
from workers.bus.transactions import KafkaTransactionalOutbox
from workers.dead_letters import DeadLetters
from workers.delivery import AtLeastOnce, Delivery, ExactlyOnce
from workers.errors import Misconfigured, Transient
from workers.health import Health, HealthServer
from workers.logs import set_up_logs
from workers.loop import Loop, Wake
from workers.metrics import Metrics, RetryKind
from workers.ports import Inbox, Job, Partition, TokenStore
from workers.read_settings import near_misses, read_settings, secrets_of
from workers.retrying import Retry
from workers.settings import EngineSettings, WorkerSettings
from workers.show_config import show_config
from workers.store.client import RedisStore
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.metric_export import MetricExport
from workers.telemetry.setup import start_metric_export, start_tracing
from workers.telemetry.tracer import Tracer

log = structlog.get_logger(__name__)

S = TypeVar("S", bound=WorkerSettings)
T = TypeVar("T")

#: What a worker waits for before it is ready, in the words of `/readyz`.
ENGINE_WARM, STORE_ANSWERS, BROKER_ANSWERS = "engine loaded and warm", "store answers", "broker answers"
GROUP_JOINED = "consumer group joined"
#: How often gauges are brought up to date.
GAUGES_S = 1.0
#: For the last words to the broker, after the drain.
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Shared(Generic[S]):
    """What a job is built from."""

    settings: S
    topics: Topics
    metrics: Metrics
    tracer: Tracer
    wake: Wake
    clock: Callable[[], float]

    def retry(self, kind: RetryKind) -> Retry:
        return Retry(on_retry=lambda: self.metrics.count_retry(kind))


@dataclass(frozen=True, slots=True)
class Built:
    """A job that is ready to work, and what the worker calls besides.

    `refresh_gauges` takes the lag of each assigned partition. `probe` tries every command that the job sends to its
    store or database, and raises `Transient` or `Misconfigured`.
    """

    job: Job
    spans: BusSpans
    input_topic: str
    group_id: str
    refresh_gauges: Callable[[Mapping[Partition, int]], None]
    probe: Callable[[], None]


Build = Callable[[Shared[S]], AbstractContextManager[Built]]


def open_store(settings: EngineSettings) -> TokenStore:
    """Return the token store that the settings name; it connects on its first call.

    Raises `Misconfigured` for an address that no server could have.
    """
    return RedisStore(settings.redis_url.get_secret_value())


def run_worker(
    name: str, kind: type[S], build: Build[S], *, loads: str = ENGINE_WARM, needs: str = STORE_ANSWERS
) -> int:
    """Run a worker until SIGTERM or SIGINT; returns the process's exit status.

    `loads` and `needs` are the conditions in `/readyz` that the end of `build` and a first good `Built.probe` meet.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m workers.{name}", description="Settings come from the environment."
    )
    parser.add_argument(
        "--show-config", nargs="?", const="table", choices=("table", "json"), help="list every setting, and end"
    )
    arguments = parser.parse_args()
    try:
        settings = read_settings(kind)
    except Misconfigured as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if arguments.show_config is not None:
        show_config(settings, sys.stdout, arguments.show_config)
        return 0
    set_up_logs(log_format=settings.log_format, level=settings.log_level, secrets=secrets_of(settings))
    for sentence in near_misses(kind):
        log.warning(sentence)
    try:
        with ExitStack() as stack:
            _run(name, settings, build, stack, loads=loads, needs=needs)
    except (Misconfigured, EngineError) as error:
        log.error("the worker cannot go on", error=str(error), kind=type(error).__name__)
        return 1
    except Exception:
        log.exception("the worker ends; what was in work is left to its next owner")
        return 1
    return 0


class _Signals:
    """SIGTERM and SIGINT: before the loop runs they end the process, afterwards they drain it."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self.loop: Loop | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._health.draining()
        if self.loop is None:
            raise SystemExit(0)
        self.loop.stop()


def _run(name: str, settings: S, build: Build[S], stack: ExitStack, *, loads: str, needs: str) -> None:
    clock, metrics, wake = time.monotonic, Metrics(), Wake()
    health = Health(waits_for=(loads, needs, BROKER_ANSWERS, GROUP_JOINED), stall_limit_s=settings.stall_limit_s)
    signals = _Signals(health)
    server = stack.enter_context(
        HealthServer(health, metrics.registry, clock=clock, host=settings.http_host, port=settings.http_port)
    )
    tracer = start_tracing(name, settings, metrics, clock, stack)
    metric_export = start_metric_export(name, settings, metrics, stack)
    shared = Shared(settings, Topics(settings.topic_prefix), metrics, tracer, wake, clock)

    built = stack.enter_context(build(shared))
    health.met(loads)
    _when_it_answers(shared, health, needs, built.probe)
    inbox, delivery = _when_it_answers(shared, health, BROKER_ANSWERS, lambda: _connect(name, shared, built, stack))

    loop = Loop(
        inbox=inbox,
        job=built.job,
        delivery=delivery,
        dead_letter=DeadLetters(shared.topics.dead_letter, settings.max_message_bytes, metrics).finished,
        wake=wake,
        clock=clock,
        drain_grace_s=settings.drain_grace_s,
        revoke_grace_s=settings.revoke_grace_s,
        on_turn=_Housekeeping(health, server, metrics, metric_export, inbox, built),
    )
    signals.loop = loop
    log.info("joining the group", topic=built.input_topic, group=built.group_id, delivery=settings.delivery)
    loop.run()
    built.spans.flush()


def _when_it_answers(shared: Shared[S], health: Health, condition: str, call: Callable[[], T]) -> T:
    """Try until it succeeds, and have `/readyz` say why it does not.

    Refused credentials are waited for as well: a worker that says what is wrong is found sooner than one that restarts.
    """

    def attempt() -> T:
        try:
            return call()
        except (Transient, Misconfigured) as error:
            health.explain(condition, str(error))
            raise Transient(str(error)) from error

    answer = shared.retry("connect")(condition, attempt)
    health.met(condition)
    return answer


def _connect(name: str, shared: Shared[S], built: Built, stack: ExitStack) -> tuple[Inbox, Delivery]:
    """Connect to Kafka. Raises `Transient` while no broker answers; nothing is then left open."""
    settings, wake = shared.settings, shared.wake
    connection = kafka_connection(settings, client_id=f"edje-{name}")
    with ExitStack() as opened:
        inbox = KafkaInbox(
            connection,
            topic=built.input_topic,
            group_id=built.group_id,
            wake=wake,
            read_committed=settings.delivery == "exactly_once",
            max_poll_records=settings.max_poll_records,
            max_message_bytes=settings.max_message_bytes,
            session_timeout_ms=settings.session_timeout_ms,
        )
        opened.callback(inbox.close, CLOSE_S)
        delivery: Delivery
        if settings.delivery == "exactly_once":
            transactional = KafkaTransactionalOutbox(
                connection,
                transactional_id=transactional_id(built.group_id),
                membership=inbox.membership,
                max_message_bytes=settings.max_message_bytes,
                transaction_timeout_ms=settings.session_timeout_ms,
            )
            executor = opened.enter_context(ThreadPoolExecutor(1, thread_name_prefix="transaction"))
            opened.callback(transactional.close, CLOSE_S)  # first, because it ends a transaction that waits
            interval_s = settings.transaction_interval_ms / 1000
            delivery = ExactlyOnce(transactional, executor, wake, interval_s, shared.metrics, built.spans)
        else:
            outbox = KafkaOutbox(connection, max_message_bytes=settings.max_message_bytes)
            opened.callback(outbox.close, CLOSE_S)
            interval_s = settings.commit_interval_ms / 1000
            delivery = AtLeastOnce(inbox, outbox, wake, interval_s, shared.metrics, built.spans)
        stack.push(opened.pop_all())
    return inbox, delivery


def transactional_id(group_id: str) -> str:
    """The same for a container that restarts in its pod, so that its successor ends an open transaction at once.

    In a container the process number is always 1; elsewhere it tells the workers of one host apart.
    """
    return f"{group_id}-{socket.gethostname()}-{os.getpid()}"


class _Housekeeping:
    """Tells health and metrics of every turn of the loop, the costlier things now and then."""

    def __init__(
        self,
        health: Health,
        server: HealthServer,
        metrics: Metrics,
        metric_export: MetricExport | None,
        inbox: Inbox,
        built: Built,
    ) -> None:
        self._health, self._server, self._metrics, self._inbox, self._built = health, server, metrics, inbox, built
        self._metric_export = metric_export
        self._has_joined = False
        self._due = 0.0
        self._num_turns = 0

    def __call__(self, now: float) -> None:
        self._health.turned(now)
        self._num_turns += 1
        if not self._has_joined and self._inbox.joined():
            self._has_joined = True
            self._health.met(GROUP_JOINED)
            log.info("ready")
        if now < self._due:
            return
        self._due = now + GAUGES_S
        if not self._server.is_serving():
            raise RuntimeError("the thread that serves health and metrics has died")
        if self._metric_export is not None and not self._metric_export.is_running():
            raise RuntimeError("the thread that exports metrics has died")
        self._metrics.loop_turns.inc(self._num_turns)
        self._num_turns = 0
        self._metrics.inflight_events.set(self._built.job.num_active())
        lag = self._inbox.lag()
        self._metrics.set_lag(lag)
        self._built.refresh_gauges(lag)
        self._built.spans.refresh()
