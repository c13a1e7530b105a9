"""What a Kafka client is given to connect with, and that TLS files which cannot be used are named before it tries."""

from __future__ import annotations

import socket
import subprocess

import pytest

import workers.bus.connection
from certificates import Authority
from workers.bus.connection import check_reachable, kafka_connection
from workers.errors import Misconfigured, Transient
from workers.settings import KafkaSettings


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


def settings(**files):
    return KafkaSettings(kafka_security_protocol="SSL", **{f"kafka_ssl_{name}": file for name, file in files.items()})


def test_tls_files_that_can_be_used_are_handed_to_the_client(authority):
    ours = authority.issue("worker")

    connection = kafka_connection(
        settings(cafile=authority.certificate, certfile=ours.certificate, keyfile=ours.key), "edje"
    )

    assert connection["ssl_cafile"] == str(authority.certificate)
    assert (connection["ssl_certfile"], connection["ssl_keyfile"]) == (str(ours.certificate), str(ours.key))


def test_without_tls_no_file_is_read():
    assert kafka_connection(KafkaSettings(), "edje")["security_protocol"] == "PLAINTEXT"


@pytest.mark.parametrize(
    ("written", "why"), [(None, "No such file"), (b"", "no certificate"), (b"not a certificate", "no certificate")]
)
def test_an_authority_that_is_not_there_or_is_no_certificate_is_named(tmp_path, written, why):
    path = tmp_path / "ca.crt"
    if written is not None:
        path.write_bytes(written)

    with pytest.raises(Misconfigured, match=f"KAFKA_SSL_CAFILE: {path} cannot be used: .*{why}"):
        kafka_connection(settings(cafile=path), "edje")


def test_a_key_of_another_certificate_is_named(authority):
    ours, other = authority.issue("worker"), authority.issue("other")

    with pytest.raises(Misconfigured, match=f"KAFKA_SSL_CERTFILE with the key {other.key}: .*(?i:mismatch)"):
        kafka_connection(settings(certfile=ours.certificate, keyfile=other.key), "edje")


def test_a_key_is_opened_with_its_password_only_and_without_a_prompt(authority):
    ours = authority.issue("worker")
    locked = ours.key.with_suffix(".locked")
    command = ["openssl", "pkey", "-in", ours.key, "-out", locked, "-aes256", "-passout", "pass:opensesame"]
    subprocess.run(command, check=True)

    given = {"certfile": ours.certificate, "keyfile": locked}
    assert kafka_connection(settings(**given, password="opensesame"), "edje")["ssl_password"] == "opensesame"
    for wrong in ({}, {"password": "sesame"}):
        with pytest.raises(Misconfigured, match=f"key {locked}") as told:
            kafka_connection(settings(**given, **wrong), "edje")
        assert "sesame" not in str(told.value)


def test_brokers_that_do_not_answer_are_one_sentence_that_names_the_variable():
    with pytest.raises(
        Transient, match=r"no Kafka broker accepts a connection \(127.0.0.1:1: .*\); check KAFKA_BROKERS"
    ):
        check_reachable(KafkaSettings(kafka_brokers="127.0.0.1:1,nonsense"))


@pytest.mark.parametrize(
    "broker", ["kafka.example", "kafka.example:", ":9092", "host:99999", "host:0", "host:x", "h:٣"]
)
def test_a_broker_without_a_valid_port_is_named_with_the_form_it_should_have(broker):
    with pytest.raises(Transient, match="not of the form host:port"):
        check_reachable(KafkaSettings(kafka_brokers=broker))


def test_forgotten_brokers_are_named_as_forgotten(monkeypatch):
    monkeypatch.delenv("KAFKA_BROKERS", raising=False)
    settings = KafkaSettings()

    monkeypatch.setattr(workers.bus.connection.socket, "create_connection", refuse)

    with pytest.raises(Transient, match="KAFKA_BROKERS is not set"):
        check_reachable(settings)


def refuse(*address, **options):
    raise ConnectionRefusedError("connection refused")


def test_one_broker_that_accepts_is_enough():
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_reachable(KafkaSettings(kafka_brokers=f"127.0.0.1:1,127.0.0.1:{server.getsockname()[1]}"))
