"""Dashboard, alerts and autoscaler against what the workers really count; no Prometheus needed."""

from __future__ import annotations

import re

import pytest
import yaml

from deploy_manifests import ROOT
from deploy_queries import alerts, metrics_in, queries
from deploy_tools import CONTROL_PLANE
from workers.metrics import Metrics

#: What Prometheus itself knows of a target, and what only a Linux process has.
NOT_OURS = {"up", "process_start_time_seconds"}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "info": ("_info",)}


def series() -> set[str]:
    """Every name that a worker's metrics page can show."""
    families = [family for family in Metrics().registry.collect() if family.name.startswith("edje_")]
    return {f"{family.name}{suffix}" for family in families for suffix in SUFFIXES[family.type]}


@pytest.mark.parametrize("name", queries())
def test_a_query_asks_only_for_what_workers_count(name: str):
    asked = metrics_in(queries()[name])

    assert asked
    assert asked - series() - NOT_OURS == set()


def test_the_names_in_a_query_are_found_wherever_they_stand():
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


def test_every_alert_is_seen_to_fire_and_to_be_silent():
    cases = [
        case
        for test in yaml.safe_load((CONTROL_PLANE / "alerts_test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    firing = {case["alertname"]: case for case in cases if case["exp_alerts"]}

    assert firing.keys() == alerts().keys()
    for name, case in firing.items():
        assert alerts()[name]["annotations"]["runbook"] == case["exp_alerts"][0]["exp_annotations"]["runbook"]
