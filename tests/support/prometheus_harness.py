"""Debian's Prometheus with a configuration of the test's own. Knows nothing of what it scrapes."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy_tools import prometheus
from kubernetes_harness import answers
from server_process import Server


class Prometheus(Server):
    """A Prometheus server; a restart keeps the address and the stored samples."""

    name = "prometheus"
    start_limit_s = 60.0

    def __init__(self, folder: Path, config: Callable[[], Mapping[str, Any]]) -> None:
        """`config` returns the content of prometheus.yml; it is called at each start."""
        super().__init__(folder)
        self._config = config

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        path = self.folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(dict(self._config())))
        return [
            str(prometheus()),
            f"--config.file={path}",
            f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]

    def _answers(self) -> bool:
        return answers(f"{self.url}/-/ready")

    def query(self, query: str) -> list[dict[str, Any]]:
        """Return the samples of a query now. Raises `HTTPError` for an invalid query."""
        words = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{words}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]
