"""What every Kafka client of ours needs to connect, from the settings. Imports no Kafka."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from workers.errors import Misconfigured
from workers.settings import KafkaSettings

#: A broker that was away for long is found again this soon; the client's own 30 s would be added to every outage.
RECONNECT_MAX_MS = 2_000


def kafka_connection(settings: KafkaSettings, client_id: str) -> dict[str, Any]:
    """Keyword arguments of kafka-python's clients: brokers, TLS, SASL. Holds the password: not for logs.

    Raises `Misconfigured` for TLS files that cannot be used: the client would try them again for ever.
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
            # Without a password of ours the library would ask for one on the terminal.
            context.load_cert_chain(settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile, lambda: password or "")
        except OSError as error:
            key = settings.kafka_ssl_keyfile or settings.kafka_ssl_certfile
            raise _unusable(f"KAFKA_SSL_CERTFILE with the key {key}", settings.kafka_ssl_certfile, error) from error


def _unusable(name: str, path: Path, error: OSError) -> Misconfigured:
    return Misconfigured(f"{name}: {path} cannot be used: {error.strerror or error}")
