"""One module names everything, and the document is made from it."""

import re

import pytest
from prometheus_client.openmetrics.exposition import generate_latest

from workers.metrics import Metrics
from workers.telemetry.document import DOCUMENT, renewed, tables
from workers.telemetry.names import ATTRIBUTES, METRICS, SPANS

#: What dashboards, alerts and autoscalers elsewhere are written against.
PROMISED = [
    "edje_backlog_seconds",
    "edje_stage_seconds",
    "edje_reply_seconds",
    "edje_queue_wait_seconds",
    "edje_batch_seconds",
    "edje_batch_pairs",
    "edje_batch_tokens",
    "edje_batch_fill_ratio",
    "edje_pairs_total",
    "edje_replies_total",
    "edje_events_total",
    "edje_dead_letters_total",
    "edje_retries_total",
    "edje_consumer_lag_events",
    "edje_bad_blobs_total",
    "edje_store_read_bytes_total",
    "edje_slab_hits_total",
    "edje_slab_misses_total",
    "edje_slab_evictions_total",
    "edje_engine_info",
    "edje_spans_dropped_total",
    "edje_bad_traceparents_total",
    "edje_image_seconds",
    "edje_inflight_pairs",
    "edje_inflight_events",
]


def test_the_tables_of_the_document_are_current():
    text = DOCUMENT.read_text()

    assert set(re.findall(r"<!-- begin (\w+) -->", text)) == set(tables())
    assert renewed(text) == text, "run `python -m workers.telemetry.document`"


def test_a_metric_that_is_named_is_exposed_under_that_name_and_no_other_is():
    metrics = Metrics()
    exposed = {
        family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for family in metrics.registry.collect()
    }

    assert {name for name in exposed if name.startswith("edje_")} == {metric.name for metric in METRICS}
    assert b"# EOF" in generate_latest(metrics.registry)


def test_the_names_that_others_rely_on_are_kept():
    assert set(PROMISED) <= {metric.name for metric in METRICS}


@pytest.mark.parametrize("kind", [SPANS, ATTRIBUTES, METRICS])
def test_a_name_is_given_once(kind):
    assert len({each.name for each in kind}) == len(kind)
