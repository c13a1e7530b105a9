"""What kafka-python 3.0.12 needs from outside so that a member of a group joins, and stays joined.

Called on the thread that polls, between polls. Knows the consumer alone: no records and no queue.
"""

from __future__ import annotations

from kafka import KafkaConsumer
from kafka.structs import MemberState


def is_stable(consumer: KafkaConsumer) -> bool:
    """Whether the group has told this member what is its own."""
    return bool(consumer.group_metadata().state is MemberState.STABLE)


def is_joining(consumer: KafkaConsumer) -> bool:
    """Whether a join has begun that polls have to see to its end, one after the other and each with a timeout.

    One that ends between two polls, or in a poll without a timeout, is thrown away, and another begun, which makes the
    whole group begin anew.
    """
    return bool(consumer.group_metadata().state is MemberState.REBALANCING)


def has_to_join(consumer: KafkaConsumer) -> bool:
    """Whether the next poll begins a join."""
    return bool(consumer._coordinator.need_rejoin())


def go_on_joining(consumer: KafkaConsumer) -> None:
    """Let the next poll go on with a join that the last one has not seen the end of.

    One that was begun because the topic's partitions had changed (at a first start they appear after the first join) is
    forgotten: the member then has nothing assigned and sends no heartbeats, for ever.
    """
    if is_joining(consumer):
        consumer._coordinator.request_rejoin()


def ask_for_partitions(consumer: KafkaConsumer, topic: str) -> None:
    """Ask which partitions the topic has, unless that is known.

    That it has to is forgotten if a topic is subscribed to while an earlier question is on its way: it is asked again
    after five minutes only, and nothing is assigned till then.
    """
    if consumer._cluster.partitions_for_topic(topic) is None:
        consumer._cluster.request_update()
