"""Composes and runs a worker: settings, logs, health, telemetry, bus, delivery, loop, signals.

Each kind of worker adds its job (`Build`). Only this module and `workers.connect` name adapters; all others
know ports.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Generic, TypeVar

import structlog

from protocols.topics import Topics
from trt.contract import EngineError, EngineInfo
from workers.command_line import ShowConfig, run_command, run_with_settings
from workers.connect import Subscription, connect, transactional_id
from workers.dead_letters import DeadLetters
from workers.errors import Misconfigured, Transient
from workers.health import Health, HealthServer
from workers.logs import set_up_logs
from workers.loop import Loop, Wake
from workers.metrics import Metrics, RetryKind
from workers.ports import Follower, Inbox, Job, Partition, TokenStore
from workers.read_settings import near_misses, secrets_of, variable_names
from workers.retrying import Retry
from workers.secrets import mask_addresses
from workers.settings import EngineSettings, WorkerSettings
from workers.store.client import RedisStore
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.metric_export import MetricExport
from workers.telemetry.setup import start_metric_export, start_tracing
from workers.telemetry.tracer import Tracer

log = structlog.get_logger(__name__)

S = TypeVar("S", bound=WorkerSettings)
T = TypeVar("T")

#: The conditions of `/readyz`.
ENGINE_WARM, STORE_ANSWERS, BROKER_ANSWERS = "engine loaded and warm", "store answers", "broker answers"
GROUP_JOINED = "consumer group joined"
#: Interval at which gauges are updated.
GAUGES_S = 1.0
#: Interval at which a ready worker probes its store or database.
PROBE_S = 5.0
#: Kinds of retries whose result shows whether the store or database works.
STORE_RETRIES: tuple[RetryKind, ...] = ("store_read", "store_write")


@dataclass(frozen=True, slots=True)
class Shared(Generic[S]):
    """The parts of a worker that its job uses."""

    settings: S
    topics: Topics
    metrics: Metrics
    tracer: Tracer
    wake: Wake
    clock: Callable[[], float]
    health: Health = field(default_factory=lambda: Health(waits_for=(), stall_limit_s=60.0))

    def retry(self, kind: RetryKind) -> Retry:
        """Return a retry that counts its attempts; retries of the store also report their success to `/readyz`."""
        if kind not in STORE_RETRIES:
            return Retry(on_retry=lambda: self.metrics.count_retry(kind))
        return Retry(
            on_retry=lambda: self.metrics.count_retry(kind),
            on_error=lambda error: self.health.fail(kind, str(error)),
            on_success=lambda: self.health.restore(kind),
        )


@dataclass(frozen=True, slots=True)
class Built:
    """A job that is ready to work, and its topics, group, checks and gauges.

    `refresh_gauges` takes the lag of each assigned partition. `probe` tries every command that the job sends to its
    store or database, and raises `Transient` or `Misconfigured`. `on_follower` gets the follower that reads
    `followed_topic` without a group. `about` is logged with the line `ready`.
    """

    job: Job
    spans: BusSpans
    input_topic: str
    group_id: str
    refresh_gauges: Callable[[Mapping[Partition, int]], None]
    probe: Callable[[], None]
    output_topics: tuple[str, ...] = ()
    followed_topic: str | None = None
    on_follower: Callable[[Follower], None] = lambda follower: None
    about: Mapping[str, object] = field(default_factory=dict)


Build = Callable[[Shared[S]], AbstractContextManager[Built]]


def open_store(settings: EngineSettings) -> TokenStore:
    """Return the token store that the settings name; it connects on its first call.

    Raises `Misconfigured` for an address that no server could have.
    """
    return RedisStore(settings.redis_url.get_secret_value())


def about(settings: EngineSettings, info: EngineInfo) -> dict[str, object]:
    """Return the fields of the log line `ready`: images stored for another model or storage type would be missing."""
    return {
        "model": info.model_digest,
        "engine": info.engine_digest,
        "runtime": info.runtime,
        "storage": settings.storage,
        "store": mask_addresses(settings.redis_url.get_secret_value()),
    }


def run_worker(
    name: str, kind: type[S], build: Build[S], *, loads: str = ENGINE_WARM, needs: str = STORE_ANSWERS
) -> int:
    """Run a worker until SIGTERM or SIGINT; returns the exit status, or raises `SystemExit`.

    `loads` and `needs` are the `/readyz` conditions that `build` and the first successful `Built.probe` meet.
    """
    program = f"python -m workers.{name}"

    def command(layout: ShowConfig = None) -> None:
        run_with_settings(
            program, kind, layout, lambda settings: _run_logged(name, settings, build, loads=loads, needs=needs)
        )

    run_command(program, command)
    return 0


def _run_logged(name: str, settings: S, build: Build[S], *, loads: str, needs: str) -> int:
    set_up_logs(log_format=settings.log_format, level=settings.log_level, secrets=secrets_of(settings))
    for sentence in (*near_misses(type(settings)), *settings.warnings()):
        log.warning(sentence)
    try:
        with ExitStack() as stack:
            _run(name, settings, build, stack, loads=loads, needs=needs)
    except (Misconfigured, EngineError) as error:
        log.error("the worker cannot run", error=str(error), kind=type(error).__name__)
        return 1
    except Exception:
        log.exception("the worker ends; the next owner repeats the messages in work")
        return 1
    return 0


class _Signals:
    """Handles SIGTERM and SIGINT: they end the process before the loop runs, and drain the loop afterwards.

    The handler sets flags and takes no lock, because the interrupted code may hold it.
    """

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
    names = variable_names(type(settings))
    server = stack.enter_context(
        HealthServer(
            health,
            metrics.registry,
            clock=clock,
            host=settings.http_host,
            port=settings.http_port,
            settings=(names["http_host"], names["http_port"]),
        )
    )
    tracer = start_tracing(name, settings.telemetry(), metrics, clock, stack)
    metric_export = start_metric_export(name, settings.telemetry(), metrics.registry, stack)
    _check_checkpoint(settings, names)
    shared = Shared(settings, Topics(settings.topic_prefix), metrics, tracer, wake, clock, health)

    built = stack.enter_context(build(shared))
    health.met(loads)
    _wait_for(shared, needs, built.probe)
    dead_letter_topic = shared.topics.dead_letter(built.input_topic)
    subscription = Subscription(
        name=name,
        group_id=built.group_id,
        input_topic=built.input_topic,
        output_topics=(*built.output_topics, dead_letter_topic),
        transactional_id=transactional_id(built.group_id, server.port),
        followed_topic=built.followed_topic,
    )
    connected = _wait_for(
        shared,
        BROKER_ANSWERS,
        lambda: connect(
            settings,
            subscription,
            wake=wake,
            metrics=metrics,
            spans=built.spans,
            on_follower=built.on_follower,
            stack=stack,
        ),
    )
    prober = stack.enter_context(_Prober(health, needs, built.probe))

    loop = Loop(
        inbox=connected.inbox,
        job=built.job,
        delivery=connected.delivery,
        partitions=connected.partitions,
        dead_letter=DeadLetters(shared.topics.dead_letter, settings.max_message_bytes, metrics).finished,
        wake=wake,
        clock=clock,
        drain_grace_s=settings.drain_grace_s,
        revoke_grace_s=settings.revoke_grace_s,
        on_turn=_Housekeeping(shared, built, connected.inbox, [server, prober], metric_export),
    )
    signals.loop = loop
    log.info("joining the group", topic=built.input_topic, group=built.group_id, delivery=settings.delivery)
    loop.run()
    built.spans.flush()


def _check_checkpoint(settings: WorkerSettings, names: Mapping[str, str]) -> None:
    if isinstance(settings, EngineSettings) and not settings.checkpoint.is_dir():
        raise Misconfigured(
            f"{names['checkpoint']}={settings.checkpoint} is not a folder; name the folder of a model checkpoint "
            "(`python -m edje.init` makes an untrained one)"
        )


def _wait_for(shared: Shared[S], condition: str, call: Callable[[], T]) -> T:
    """Repeat a call until it succeeds; `/readyz` shows the last error.

    Also repeats after refused credentials or missing permissions, which `/readyz` reports better than restarts would.
    """

    def attempt() -> T:
        try:
            return call()
        except (Transient, Misconfigured) as error:
            shared.health.explain(condition, str(error))
            raise Transient(str(error)) from error

    answer = shared.retry("connect")(condition, attempt)
    shared.health.met(condition)
    return answer


class _Prober:
    """Probes a ready worker's store or database on a thread, because an idle worker would not notice an outage."""

    def __init__(self, health: Health, needs: str, probe: Callable[[], None]) -> None:
        self._health = health
        self._needs = needs
        self._probe = probe
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)

    def __enter__(self) -> _Prober:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()  # the thread is not joined: its probe may wait for an unreachable store

    def is_serving(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.wait(PROBE_S):
            try:
                self._probe()
            except (Transient, Misconfigured) as error:
                self._health.fail(self._needs, f"no longer: {error}")
            else:
                self._health.restore(self._needs)
                for kind in STORE_RETRIES:
                    self._health.restore(kind)


class _Housekeeping:
    """Reports each turn of the loop to health and metrics, and updates gauges and spans once a second."""

    def __init__(
        self,
        shared: Shared[S],
        built: Built,
        inbox: Inbox,
        threads: list[HealthServer | _Prober],
        metric_export: MetricExport | None,
    ) -> None:
        self._health, self._metrics, self._inbox, self._built = shared.health, shared.metrics, inbox, built
        self._threads = threads
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
            log.info("ready", **self._built.about)
        if now < self._due:
            return
        self._due = now + GAUGES_S
        if not all(thread.is_serving() for thread in self._threads):
            raise RuntimeError("the thread that serves health and metrics, or the one that probes, has died")
        if self._metric_export is not None and not self._metric_export.is_running():
            raise RuntimeError("the thread that exports metrics has died")
        self._metrics.loop_turns.inc(self._num_turns)
        self._num_turns = 0
        self._metrics.inflight_events.set(self._built.job.num_active())
        lag = self._inbox.lag()
        self._metrics.set_lag(lag)
        self._built.refresh_gauges(lag)
        self._built.spans.refresh()
