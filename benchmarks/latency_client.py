"""An open-loop client: sends requests at a fixed rate and prints latency percentiles as JSON.

A separate process, so that the client's work is not counted as the harness's. Requests are sent on time whether or
not earlier ones are answered; a latency is measured from the time at which the request was due.
"""

from __future__ import annotations

import argparse
import json
import threading
import time

import numpy as np
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from harness import CANDIDATES, NUM_PARTITIONS, request_json
from protocols.topics import Topics

WARM_UP_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brokers", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--num-images", type=int, required=True)
    arguments = parser.parse_args()
    brokers, topics = arguments.brokers.split(","), Topics(arguments.prefix)
    images = [f"img-{number:06d}" for number in range(arguments.num_images)]
    number_of_requests, windows = int(arguments.rate * arguments.seconds), len(images) // CANDIDATES

    consumer = KafkaConsumer(bootstrap_servers=brokers, enable_auto_commit=False)
    partitions = [TopicPartition(topics.rerank_responses, number) for number in range(NUM_PARTITIONS)]
    consumer.assign(partitions)
    consumer.seek_to_end(*partitions)
    for partition in partitions:
        consumer.position(partition)
    producer = KafkaProducer(bootstrap_servers=brokers)
    due = [0.0] * number_of_requests

    def send() -> None:
        began = time.perf_counter() + 0.1
        for number in range(number_of_requests):
            due[number] = began + number / arguments.rate
            time.sleep(max(0.0, due[number] - time.perf_counter()))
            window = number % windows
            value = request_json(f"{number}", images[window * CANDIDATES : (window + 1) * CANDIDATES])
            producer.send(topics.rerank_requests, value, b"%d" % number)

    # The worker's start and the first fill of the slab are not measured.
    sender = threading.Thread(target=send)
    sender.start()
    latencies: dict[int, float] = {}
    give_up = time.monotonic() + arguments.seconds + 30
    while len(latencies) < number_of_requests and time.monotonic() < give_up:
        for records in consumer.poll(timeout_ms=200).values():
            now = time.perf_counter()
            for record in records:
                number = int(record.key)
                latencies[number] = now - due[number]
    sender.join()
    counted = [latencies[number] * 1000 for number in sorted(latencies) if number >= number_of_requests * WARM_UP_SHARE]
    percentiles = {f"p{q}": round(float(np.percentile(counted, q)), 2) for q in (50, 90, 99)}
    print(json.dumps(percentiles | {"max": round(max(counted), 2), "unanswered": number_of_requests - len(latencies)}))


if __name__ == "__main__":
    main()
