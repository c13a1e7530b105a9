"""Dashboard, alerts and autoscaler use only metrics that the workers export; no Prometheus needed."""

from __future__ import annotations

import re

import pytest
import yaml

from deploy_manifests import ROOT
from deploy_queries import alerts, metrics_in, queries
from deploy_tools import CONTROL_PLANE
from workers.metrics import Metrics

#: Series that Prometheus adds for a target, and series of Linux processes.
NOT_OURS = {"up", "process_start_time_seconds"}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "info": ("_info",)}


def series() -> set[str]:
    """Return every series name that a worker's metrics page can show."""
    families = [family for family in Metrics().registry.collect() if family.name.startswith("edje_")]
    return {f"{family.name}{suffix}" for family in families for suffix in SUFFIXES[family.type]}


@pytest.mark.parametrize("name", queries())
def test_a_query_uses_only_metrics_of_the_workers(name: str):
    asked = metrics_in(queries()[name])

    assert asked
    assert asked - series() - NOT_OURS == set()


def test_the_metric_names_in_a_query_are_found_at_every_position():
    query = 'sum by (edje_label) (rate(edje_a_total{b="edje_c"}[5m])) / edje_d unless edje_e offset 15m or up'

    assert metrics_in(query) == {"edje_a_total", "edje_d", "edje_e", "up"}


def test_every_alert_leads_to_its_section_of_the_runbook():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "how-to" / "on-call.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}

    for name, rule in alerts().items():
        document, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert document == "docs/how-to/on-call.md"
        assert anchor == name.lower()
        assert anchor in anchors


def test_every_alert_has_a_test_that_it_fires_and_a_test_that_it_does_not():
    cases = [
        case
        for test in yaml.safe_load((CONTROL_PLANE / "alerts_test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    firing = {case["alertname"]: case for case in cases if case["exp_alerts"]}

    assert firing.keys() == alerts().keys()
    for name, case in firing.items():
        assert alerts()[name]["annotations"]["runbook"] == case["exp_alerts"][0]["exp_annotations"]["runbook"]
