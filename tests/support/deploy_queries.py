"""Returns every PromQL query of the dashboard, the alerts and the autoscaler, and the metric names in a query."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import yaml

from deploy_manifests import KUBERNETES

MONITORING = KUBERNETES / "monitoring"
#: Values of Grafana's variables, for a Prometheus that scrapes every second.
GRAFANA = {"$__rate_interval": "15s", "$namespace": ".*"}
_METRIC = re.compile(r"\b(?:edje|process|up)\w*(?=[\s{)\[]|$)")


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Each query by the title of its panel."""
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for number, target in enumerate(panel.get("targets", ())):
            query = target["expr"]
            for variable, value in GRAFANA.items():
                query = query.replace(variable, value)
            yield f"{panel['title']} {number}", query


def rules() -> dict[str, list[dict]]:
    """The groups of alerts, as Prometheus itself reads them."""
    return yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]


def alerts() -> dict[str, dict]:
    return {rule["alert"]: rule for group in rules()["groups"] for rule in group["rules"]}


def autoscaler_queries() -> Iterator[tuple[str, str]]:
    for path in sorted((KUBERNETES / "autoscaling").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            for trigger in document.get("spec", {}).get("triggers", ()):
                if trigger["type"] == "prometheus":
                    yield f"{path.stem} {trigger['name']}", trigger["metadata"]["query"]


def queries() -> dict[str, str]:
    expressions = ((name, rule["expr"]) for name, rule in alerts().items())
    return dict([*dashboard_queries(), *expressions, *autoscaler_queries()])


def metrics_in(query: str) -> set[str]:
    """Return the series names in a query, without quoted words and grouping labels."""
    bare = re.sub(r"\b(?:by|without|on|ignoring)\s*\([^)]*\)", "", re.sub(r'"[^"]*"', '""', query))
    return set(_METRIC.findall(bare))
