"""Connects a worker to Kafka: makes its inbox, its outbox and the delivery for its delivery promise.

The only module besides `workers.runtime` that names adapters of the bus for a worker.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from workers.at_least_once import AtLeastOnce
from workers.bus.connection import check_reachable, kafka_connection
from workers.bus.consumer import KafkaInbox
from workers.bus.follower import KafkaFollower
from workers.bus.permissions import check_access
from workers.bus.producer import KafkaOutbox
from workers.bus.transactions import KafkaTransactionalOutbox
from workers.delivery import Delivery, DeliveryMetrics, UndeliveredLimits
from workers.exactly_once import ExactlyOnce
from workers.partitions import Partitions
from workers.ports import Follower, Inbox
from workers.settings import WorkerSettings
from workers.telemetry.bus_spans import BusSpans

#: Timeout for closing each Kafka client after the drain.
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a worker reads and writes."""

    name: str  # name of the worker
    group_id: str
    input_topic: str
    output_topics: tuple[str, ...]
    transactional_id: str
    followed_topic: str | None = None  # read without a group, from its end


@dataclass(frozen=True, slots=True)
class Connected:
    """A group member's inbox, and the delivery of its outcomes."""

    inbox: Inbox
    partitions: Partitions
    delivery: Delivery


def connect(
    settings: WorkerSettings,
    subscription: Subscription,
    *,
    wake: Callable[[], None],
    metrics: DeliveryMetrics,
    spans: BusSpans,
    on_follower: Callable[[Follower], None],
    stack: ExitStack,
) -> Connected:
    """Connect to Kafka and join the group; `stack` closes what was opened, `on_follower` gets the followed topic.

    Raises `Transient` while no broker answers, `Misconfigured` while a topic or a permission is missing; nothing is
    then left open.
    """
    check_reachable(settings)
    connection = kafka_connection(settings, client_id=f"edje-{subscription.name}")
    check_access(
        connection,
        reads=[topic for topic in (subscription.input_topic, subscription.followed_topic) if topic is not None],
        writes=subscription.output_topics,
        group_id=subscription.group_id,
    )
    with ExitStack() as opened:
        if subscription.followed_topic is not None:  # before any record is taken, so that no later event is missed
            follower = KafkaFollower(
                connection, subscription.followed_topic, wake=wake, max_message_bytes=settings.max_message_bytes
            )
            opened.callback(follower.close, CLOSE_S)
            on_follower(follower)
        inbox = KafkaInbox(
            connection,
            topic=subscription.input_topic,
            group_id=subscription.group_id,
            wake=wake,
            read_committed=settings.delivery == "exactly_once",
            max_poll_records=settings.max_poll_records,
            max_message_bytes=settings.max_message_bytes,
            session_timeout_ms=settings.session_timeout_ms,
        )
        opened.callback(inbox.close, CLOSE_S)
        partitions = Partitions(inbox, wake)
        limits = UndeliveredLimits(settings.max_undelivered_messages, settings.max_undelivered_bytes)
        delivery: Delivery
        if settings.delivery == "exactly_once":
            transactional = KafkaTransactionalOutbox(
                connection,
                transactional_id=subscription.transactional_id,
                membership=inbox.membership,
                committed=inbox.committed,
                max_message_bytes=settings.max_message_bytes,
                transaction_timeout_ms=settings.session_timeout_ms,
            )
            executor = opened.enter_context(ThreadPoolExecutor(1, thread_name_prefix="transaction"))
            opened.callback(transactional.close, CLOSE_S)  # closed first: this ends a waiting transaction
            interval_s = settings.transaction_interval_ms / 1000
            delivery = ExactlyOnce(transactional, executor, partitions, wake, interval_s, metrics, spans, limits)
        else:
            outbox = KafkaOutbox(connection, max_message_bytes=settings.max_message_bytes)
            opened.callback(outbox.close, CLOSE_S)
            interval_s = settings.commit_interval_ms / 1000
            delivery = AtLeastOnce(inbox, outbox, partitions, wake, interval_s, metrics, spans, limits)
        stack.push(opened.pop_all())
    return Connected(inbox, partitions, delivery)


def transactional_id(group_id: str, http_port: int) -> str:
    """Return an id that no other running worker has, and that this worker has again after a restart.

    A restarted container thus ends the open transaction of its predecessor at once. The port of the
    health pages is unique on a host: two pods on a host's network share its name and their process numbers.
    """
    return f"{group_id}-{socket.gethostname()}-{http_port}"
