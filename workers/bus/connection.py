"""The settings that every Kafka client needs to connect, from the worker's settings. Imports no Kafka."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

from workers.errors import Misconfigured, Transient
from workers.settings import KafkaSettings

#: Longest pause between two connection attempts; the client's default of 30 s would lengthen every outage by as much.
RECONNECT_MAX_MS = 2_000
#: Timeout of one attempt to reach one broker.
REACH_S = 2.0
MAX_PORT = 65_535


def kafka_connection(settings: KafkaSettings, client_id: str) -> dict[str, Any]:
    """Keyword arguments of kafka-python's clients: brokers, TLS, SASL. Holds the password: not for logs.

    Raises `Misconfigured` for TLS files that cannot be used: the client would try them again and again.
    """
    _check_tls_files(settings)
    secret = {"sasl_plain_password": settings.kafka_sasl_password, "ssl_password": settings.kafka_ssl_password}
    plain = {
        "sasl_mechanism": settings.kafka_sasl_mechanism,
        "sasl_plain_username": settings.kafka_sasl_username,
        "ssl_cafile": settings.kafka_ssl_cafile and str(settings.kafka_ssl_cafile),
        "ssl_certfile": settings.kafka_ssl_certfile and str(settings.kafka_ssl_certfile),
        "ssl_keyfile": settings.kafka_ssl_keyfile and str(settings.kafka_ssl_keyfile),
    }
    return {
        "bootstrap_servers": list(settings.kafka_brokers),
        "security_protocol": settings.kafka_security_protocol,
        "client_id": client_id,
        "reconnect_backoff_max_ms": RECONNECT_MAX_MS,
        **{name: value for name, value in plain.items() if value is not None},
        **{name: value.get_secret_value() for name, value in secret.items() if value is not None},
    }


def check_reachable(settings: KafkaSettings) -> None:
    """Raise `Transient` unless one of the brokers accepts a connection.

    Checked here because kafka-python reports the same only after half a minute, in dozens of log lines.
    """
    errors = []
    for broker in settings.kafka_brokers:
        host, _, port = broker.rpartition(":")
        if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port[:6]) <= MAX_PORT:
            errors.append(f"{broker}: not of the form host:port with a port from 1 to {MAX_PORT}")
            continue
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S):
                return
        except (OSError, ValueError) as error:  # a host name that cannot be encoded is a ValueError
            errors.append(f"{broker}: {error}")
    is_default = "kafka_brokers" not in settings.model_fields_set
    hint = "KAFKA_BROKERS is not set" if is_default else "check KAFKA_BROKERS"
    raise Transient(f"no Kafka broker accepts a connection ({'; '.join(errors)}); {hint}")


def _check_tls_files(settings: KafkaSettings) -> None:
    password = settings.kafka_ssl_password and settings.kafka_ssl_password.get_secret_value()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if settings.kafka_ssl_cafile is not None:
        try:
            context.load_verify_locations(settings.kafka_ssl_cafile)
        except OSError as error:
            raise _unusable("KAFKA_SSL_CAFILE", settings.kafka_ssl_cafile, error) from error
    if settings.kafka_ssl_certfile is not None:
        try:
            # Without a password here the library would ask for one on the terminal.
            context.load_cert_chain(settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile, lambda: password or "")
        except OSError as error:
            key = settings.kafka_ssl_keyfile or settings.kafka_ssl_certfile
            raise _unusable(f"KAFKA_SSL_CERTFILE with the key {key}", settings.kafka_ssl_certfile, error) from error


def _unusable(name: str, path: Path, error: OSError) -> Misconfigured:
    return Misconfigured(f"{name}: {path} cannot be used: {error.strerror or error}")
