"""Runs a cluster that scales the workers on this machine, and applies the manifests that users deploy.

etcd, API server, controllers, KEDA, Prometheus, a Kafka with TLS and SCRAM, Redis, PostgreSQL, and a node for tests
that runs the pods (`node_agent`). Follows "Deploying" in docs/how-to/deploy.md: topics, namespace, Secret, overlay.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

from kafka import KafkaAdminClient
from kafka.admin import ScramMechanism, UserScramCredentialUpsertion

from certificates import Authority
from deploy_manifests import KUBERNETES, ROOT, Object
from deploy_tools import custom_definitions, run
from edje.checkpoint import read_config, read_digest
from keda_harness import NAMESPACE as KEDA_NAMESPACE
from keda_harness import KedaAdapter, KedaOperator
from kubernetes_harness import ApiServer, ControllerManager, Etcd
from node_agent import Node
from prometheus_harness import Prometheus
from protocols.blob import BlobLayout
from server_process import Server, ServiceError, free_port, tail
from service_harness import Checkpoint
from services import KafkaServer, PostgresServer, RedisServer
from skipping import missing

NAMESPACE = "edje"
#: Every kind of worker that the overlay deploys.
KINDS = ("ingest", "rerank", "index", "gateway")
#: The model whose digest is the tag of edje-model in the manifests.
MODEL = ROOT / "deploy" / "models" / "scenes"
OVERLAY = Path(__file__).parent / "autoscaling" / "kustomization.yaml"
#: Path in a worker's image of the certificates to trust.
TRUSTED = "/etc/edje/trusted"
USER, PASSWORD = "edje", "not-in-any-log"
#: The autoscaler's own turns: a third of the 15 s of a cluster, as everything in the overlay.
AUTOSCALER_SYNC_S = 5


class GuardedKafka(KafkaServer):
    """A Kafka with a second address that requires TLS, a user and a password."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        super().__init__(folder)
        self.guarded = f"127.0.0.1:{free_port()}"
        plain = self._properties()
        guarded = f"SASL_SSL://{self.guarded}"
        self.settings |= {
            "listeners": f"{plain['listeners']},{guarded}",
            "advertised.listeners": f"{plain['advertised.listeners']},{guarded}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": "org.apache.kafka.common.security.scram."
            "ScramLoginModule required;",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(authority.issue("kafka").both),
        }

    def start(self) -> None:
        super().start()
        admin = KafkaAdminClient(bootstrap_servers=[self.brokers])
        try:
            mechanism = ScramMechanism.SCRAM_SHA_512
            admin.alter_user_scram_credentials([UserScramCredentialUpsertion(USER, mechanism, PASSWORD)])
        finally:
            admin.close()


class Cluster:
    """Servers and deployments that run within a `with` block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: list[Server] = []
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        authority = Authority(self._folder / "authority")
        store = self._started(Etcd(self._folder / "etcd"))
        self.api = self._started(ApiServer(self._folder / "apiserver", store.url))
        self.kafka = self._started(GuardedKafka(self._folder / "kafka", authority))
        self.redis = self._started(RedisServer(self._folder / "redis"))
        # Outside of pytest's folders, to which only root has access while another pytest session runs.
        postgres_folder = self._stack.enter_context(TemporaryDirectory(prefix="edje-postgres-"))
        self.postgres = self._started(PostgresServer(Path(postgres_folder)))
        self._started(ControllerManager(self._folder / "controllers", self.api, autoscaler_sync_s=AUTOSCALER_SYNC_S))
        self._define()
        operator = self._started(KedaOperator(self._folder / "operator", self.api, authority.trusted))
        self._started(KedaAdapter(self._folder / "adapter", self.api, operator)).register()
        self._make_topics()
        self.node = Node(self.api, NAMESPACE, self._folder / "pods", images(authority.trusted))
        self.prometheus = Prometheus(self._folder / "prometheus", lambda: scrape_config(self.api, self.node.targets))
        self._deploy(self._overlay(authority.certificate.name))
        self._stack.callback(self.node.close)
        self.node.start()
        self._started(self.prometheus)

    def _started(self, server: Any) -> Any:
        self._servers.append(server)
        try:
            server.start()
        except ServiceError as error:
            missing(str(error))
        self._stack.callback(server.stop)
        return server

    def _define(self) -> None:
        files = [f"--filename={path}" for path in custom_definitions()]
        self.api.done("apply", "--server-side", *files)
        self.api.done("wait", "--for=condition=Established", "--timeout=120s", *files)
        self.api.done("create", "namespace", KEDA_NAMESPACE)

    def _make_topics(self) -> None:
        script = str(ROOT / "deploy" / "kafka" / "create_topics.py")
        run([sys.executable, script, "--replication-factor", "1"], KAFKA_BROKERS=self.kafka.brokers)

    def _overlay(self, certificate: str) -> Path:
        """Return the test's overlay with the servers' addresses."""
        folder = (self._folder / "overlay").resolve()
        folder.mkdir()
        words = {
            "CPU": os.path.relpath(KUBERNETES / "overlays" / "cpu", folder),
            "KAFKA": self.kafka.guarded,
            "KAFKA_CA": f"{TRUSTED}/{certificate}",
            "PROMETHEUS": self.prometheus.url,
        }
        (folder / OVERLAY.name).write_text(Template(OVERLAY.read_text()).substitute(words))
        return folder

    def _deploy(self, overlay: Path) -> None:
        secret = {
            "REDIS_URL": self.redis.url,
            "DATABASE_URL": self.postgres.url,
            "KAFKA_SASL_USERNAME": USER,
            "KAFKA_SASL_PASSWORD": PASSWORD,
        }
        literals = [f"--from-literal={name}={value}" for name, value in secret.items()]
        self.api.done("create", "namespace", NAMESPACE)
        self.api.done("create", "secret", "generic", "credentials", f"--namespace={NAMESPACE}", *literals)
        self.api.done("apply", "--server-side", f"--kustomize={overlay}")

    def num_ready(self) -> dict[str, int]:
        """The number of ready pods of each kind of worker."""
        found = {kind: 0 for kind in KINDS}
        for pod in self.api.get("pods", f"--namespace={NAMESPACE}")["items"]:
            conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions", ())}
            found[pod["metadata"]["labels"]["app.kubernetes.io/component"]] += conditions.get("Ready") == "True"
        return found

    def deployment(self, name: str) -> Object:
        return self.api.call("GET", f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{name}")

    def scaled_object(self, name: str) -> Object:
        return self.api.call("GET", f"/apis/keda.sh/v1alpha1/namespaces/{NAMESPACE}/scaledobjects/{name}")

    def restart(self, name: str) -> None:
        """Begin a rolling update, as after a changed setting."""
        self.api.done("rollout", "restart", f"deployment/{name}", f"--namespace={NAMESPACE}")

    def logs(self) -> str:
        """Return the last log lines of every server and pod."""
        servers = "\n".join(f"--- the end of {server.name}\n{tail(server.log, 1_500)}" for server in self._servers)
        objects = self.api.kubectl("get", "hpa,scaledobject,deployment,pod", f"--namespace={NAMESPACE}").stdout
        return f"{servers}\n{self.node.logs()}\n--- objects\n{objects}"


def images(trusted: Path) -> dict[str, dict[str, Path]]:
    """The local folders that replace folders of each image: trusted certificates and the model.

    The programs of every image are those of this environment.
    """
    return {**{f"edje-{kind}": {TRUSTED: trusted} for kind in KINDS}, "edje-model": {"/model": MODEL}}


def model() -> Checkpoint:
    """Return the model that the pods load, with its storage type."""
    config = read_config(MODEL)
    return Checkpoint(MODEL, BlobLayout(read_digest(MODEL), config.adapter.num_tokens, config.joint.dim, "int8"))


def scrape_config(api: ApiServer, targets: Path) -> dict[str, Any]:
    """Return the configuration that the Prometheus operator would make of the applied PodMonitor.

    The pods are read from a file instead, because Debian's Prometheus cannot read them from an API server.
    """
    monitor = api.get("podmonitor", "edje", f"--namespace={NAMESPACE}")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    keep = [
        {
            "action": "keep",
            "source_labels": [f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9]', '_', label)}"],
            "regex": value,
        }
        for label, value in monitor["spec"]["selector"]["matchLabels"].items()
    ]
    port = {"action": "keep", "source_labels": ["__meta_kubernetes_pod_container_port_name"], "regex": endpoint["port"]}
    names = [
        {"source_labels": [f"__meta_kubernetes_{source}"], "target_label": target}
        for source, target in (("namespace", "namespace"), ("pod_name", "pod"), ("pod_container_name", "container"))
    ]
    own = [
        {"source_labels": rule["sourceLabels"], "target_label": rule["targetLabel"]} for rule in endpoint["relabelings"]
    ]
    job = {
        "job_name": f"podMonitor/{NAMESPACE}/{monitor['metadata']['name']}/0",
        "scrape_interval": endpoint["interval"],
        "scrape_timeout": endpoint["scrapeTimeout"],
        "metrics_path": endpoint["path"],
        "file_sd_configs": [{"files": [str(targets)]}],
        "relabel_configs": [*keep, port, *names, *own],
    }
    return {"scrape_configs": [job]}
