"""Settings: read once from the environment, closed to unknown names, shown without secrets."""

import io
import json
import os

import pytest
from pydantic import ValidationError

from workers.errors import Misconfigured
from workers.read_settings import near_misses, read_settings, secrets_of, variable_names
from workers.settings import IngestSettings, RerankSettings
from workers.show_config import show_config

KINDS = [RerankSettings, IngestSettings]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Only what the test itself sets."""
    for name in list(os.environ):
        if name.upper().startswith(("KAFKA_", "REDIS_", "RERANK_", "INGEST_")):
            monkeypatch.delenv(name)
    return monkeypatch.setenv


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_are_enough_to_start_and_agree_with_each_other(kind):
    settings = read_settings(kind)

    assert settings.kafka_brokers == ("localhost:9092",)
    with pytest.raises(ValidationError, match="frozen"):
        settings.topic_prefix = "x"


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_a_description(kind):
    assert all(field.description for field in kind.model_fields.values())


def test_values_come_from_the_environment(environment):
    environment("KAFKA_BROKERS", "a:9092, b:9092,")
    environment("RERANK_SLAB_BYTES", "2GiB")
    environment("RERANK_MAX_BATCH_WAIT_MS", "1.5")
    environment("RERANK_NUM_THREADS", "")  # as good as not set

    settings = read_settings(RerankSettings)

    assert settings.kafka_brokers == ("a:9092", "b:9092")
    assert (settings.slab_bytes, settings.max_batch_wait_ms, settings.num_threads) == (2**31, 1.5, None)


def test_an_unknown_name_with_our_prefix_is_refused_with_a_suggestion(environment):
    environment("RERANK_MAX_BATCHPAIRS", "4")
    environment("RERANK_COLOUR", "red")

    with pytest.raises(Misconfigured) as refused:
        read_settings(RerankSettings)

    assert "RERANK_MAX_BATCHPAIRS is not a setting; did you mean RERANK_MAX_BATCH_PAIRS?" in str(refused.value)
    assert "RERANK_COLOUR is not a setting (" in str(refused.value)


def test_the_settings_of_the_other_worker_are_ignored(environment):
    environment("INGEST_NONSENSE", "1")

    read_settings(RerankSettings)


def test_variables_that_a_platform_injects_are_ignored(environment):
    for service in ("RERANK", "KAFKA", "REDIS", "RERANK_METRICS"):
        environment(f"{service}_SERVICE_HOST", "10.0.0.1")
        environment(f"{service}_SERVICE_PORT", "9092")
        environment(f"{service}_SERVICE_PORT_HTTP", "9092")
        environment(f"{service}_PORT", "tcp://10.0.0.1:9092")
        environment(f"{service}_PORT_9092_TCP", "tcp://10.0.0.1:9092")
        environment(f"{service}_PORT_9092_TCP_ADDR", "10.0.0.1")
    environment("KAFKA_HEAP_OPTS", "-Xmx1g")

    read_settings(RerankSettings)

    assert near_misses(RerankSettings) == []


def test_a_misspelled_port_is_no_service_link(environment):
    environment("RERANK_HTP_PORT", "8080")

    with pytest.raises(Misconfigured, match="did you mean RERANK_HTTP_PORT"):
        read_settings(RerankSettings)


def test_a_shared_name_similar_to_a_setting_is_reported_and_not_refused(environment):
    environment("KAFKA_BROKER", "a:9092")

    read_settings(RerankSettings)

    assert near_misses(RerankSettings) == ["KAFKA_BROKER is not a setting; did you mean KAFKA_BROKERS?"]


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        (RerankSettings, {"RERANK_PIECE_PAIRS": "513"}, "piece_pairs=513 is more than max_batch_pairs=512"),
        (RerankSettings, {"RERANK_MAX_CANDIDATES": "30000"}, "max_candidates=30000 is more than max_inflight_pairs"),
        (RerankSettings, {"RERANK_MAX_BATCH_PAIRS": "many"}, "RERANK_MAX_BATCH_PAIRS: Input should be a valid integer"),
        (RerankSettings, {"RERANK_FETCH_THREADS": "0"}, "RERANK_FETCH_THREADS: Input should be greater than 0"),
        (RerankSettings, {"RERANK_TOPIC_PREFIX": "a b"}, "topic prefix 'a b'"),
        (RerankSettings, {"RERANK_CONSTANT_ENGINE_MS_PER_ITEM": "1"}, "engine=auto would not use it"),
        (RerankSettings, {"RERANK_FIXED_BUCKETS": "1", "RERANK_ENGINE": "constant"}, "would not use it"),
        (
            RerankSettings,
            {"RERANK_ENGINE_DIRECTORY": "engine", "RERANK_ENGINE": "torch"},
            "engine=torch would not use it",
        ),
        (IngestSettings, {"INGEST_ENGINE": "onnx"}, "make it with `python -m trt.build`"),
        (RerankSettings, {"KAFKA_BROKERS": ","}, "KAFKA_BROKERS: Tuple should have at least 1 item"),
        (RerankSettings, {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "needs KAFKA_SASL_MECHANISM"),
        (RerankSettings, {"KAFKA_SASL_USERNAME": "u"}, "would not use it"),
        (RerankSettings, {"KAFKA_SSL_CAFILE": "/ca.pem"}, "would not use it"),
        (
            RerankSettings,
            {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_KEYFILE": "/key.pem"},
            "without KAFKA_SSL_CERTFILE",
        ),
        (IngestSettings, {"INGEST_ALLOWED_SCHEMES": "https,file"}, "file_roots go together"),
        (IngestSettings, {"INGEST_FILE_ROOTS": "/images"}, "file_roots go together"),
        (IngestSettings, {"INGEST_MAX_IMAGE_BYTES": "1GiB"}, "max_image_bytes=1073741824 is more than"),
        (IngestSettings, {"INGEST_MAX_BATCH_IMAGES": "1000"}, "max_batch_images=1000 is more than"),
    ],
)
def test_wrong_or_contradictory_settings_are_refused(environment, kind, given, sentence):
    for name, value in given.items():
        environment(name, value)

    with pytest.raises(Misconfigured) as refused:
        read_settings(kind)

    assert sentence in str(refused.value)


def test_all_faults_are_reported_together(environment):
    environment("RERANK_COLOUR", "red")
    environment("RERANK_DELIVERY", "sometimes")
    environment("RERANK_HTTP_PORT", "70000")

    with pytest.raises(Misconfigured) as refused:
        read_settings(RerankSettings)

    assert [line.split()[0] for line in str(refused.value).splitlines()] == [
        "RERANK_COLOUR",
        "RERANK_HTTP_PORT:",
        "RERANK_DELIVERY:",
    ]


def test_secrets_are_neither_listed_nor_in_errors(environment):
    environment("KAFKA_SECURITY_PROTOCOL", "SASL_SSL")
    environment("KAFKA_SASL_MECHANISM", "PLAIN")
    environment("KAFKA_SASL_USERNAME", "worker")
    environment("KAFKA_SASL_PASSWORD", "hush1")
    environment("KAFKA_SSL_PASSWORD", "hush2")
    environment("REDIS_URL", "redis://worker:hush%403@host:6379/0?ssl_password=hush4")
    settings = read_settings(RerankSettings)

    out = [io.StringIO(), io.StringIO()]
    show_config(settings, out[0])
    show_config(settings, out[1], "json")

    assert all("hush" not in text for text in (repr(settings), *(shown.getvalue() for shown in out)))
    assert "redis://worker:***@host:6379/0?ssl_password=***" in out[0].getvalue()
    assert set(secrets_of(settings)) == {"hush1", "hush2", "hush%403", "hush@3", "hush4"}

    environment("RERANK_DELIVERY", "hush5")
    with pytest.raises(Misconfigured) as refused:
        read_settings(RerankSettings)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_shown_with_value_source_and_meaning(environment, kind):
    environment("KAFKA_BROKERS", "a:1,b:2")
    out = io.StringIO()

    show_config(read_settings(kind), out, "json")
    shown = {row["name"]: row for row in json.loads(out.getvalue())}

    assert set(shown) == set(variable_names(kind).values())
    assert (shown["KAFKA_BROKERS"]["value"], shown["KAFKA_BROKERS"]["source"]) == ("a:1,b:2", "environment")
    assert shown["REDIS_URL"]["source"] == "default"
    assert all(row["meaning"] for row in shown.values())


def test_a_setting_shown_to_a_pipe_stays_on_one_line():
    out = io.StringIO()

    show_config(read_settings(RerankSettings), out)

    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + len(RerankSettings.model_fields)
    assert all(not line.startswith(" ") for line in lines)


def test_reply_topics_follow_the_prefix_unless_set(environment):
    environment("RERANK_TOPIC_PREFIX", "team.")
    assert read_settings(RerankSettings).reply_topic_patterns == (
        "team.rerank.responses",
        "team.rerank.responses.*",
    )

    environment("RERANK_ALLOWED_REPLY_TOPICS", "a.*,b")
    assert read_settings(RerankSettings).reply_topic_patterns == ("a.*", "b")
