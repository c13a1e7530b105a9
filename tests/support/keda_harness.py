"""A real KEDA outside the cluster that it scales: the operator, and the adapter that the autoscaler queries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from certificates import Authority
from deploy_tools import keda
from kubernetes_harness import ApiServer, answers
from server_process import Server, free_port

NAMESPACE = "keda"
_METRICS = "external.metrics.k8s.io"


class KedaOperator(Server):
    """Reads ScaledObjects, queries their triggers, and makes an autoscaler for each."""

    name = "keda-operator"
    start_limit_s = 120.0

    def __init__(self, folder: Path, api: ApiServer, trusted: Path) -> None:
        """`trusted` is a folder of certificates that it trusts, such as that of the Kafka whose lag it reads."""
        super().__init__(folder)
        self._api = api
        self._trusted = trusted
        self.metrics_port = free_port()
        self._prometheus_port = free_port()
        self.certificates = folder / "certificates"

    def _command(self) -> list[str]:
        authority = Authority(self.folder / "authority")
        operator = authority.issue("keda-operator.keda.svc")
        self.certificates.mkdir()
        for source, name in (
            (authority.certificate, "ca.crt"),
            (operator.certificate, "tls.crt"),
            (operator.key, "tls.key"),
        ):
            shutil.copy(source, self.certificates / name)
        return in_namespace(
            str(keda() / "operator"),
            f"--kubeconfig={self._api.kubeconfig()}",
            f"--cert-dir={self.certificates}",
            f"--ca-dir={self.certificates}",
            f"--ca-dir={self._trusted}",
            f"--metrics-bind-address=127.0.0.1:{self._prometheus_port}",
            f"--health-probe-bind-address=127.0.0.1:{self.port}",
            f"--metrics-service-bind-address=127.0.0.1:{self.metrics_port}",
        )

    def _answers(self) -> bool:
        return answers(f"http://127.0.0.1:{self.port}/readyz")


class KedaAdapter(Server):
    """Serves the operator's figures as an API of the cluster."""

    name = "keda-adapter"
    start_limit_s = 120.0

    def __init__(self, folder: Path, api: ApiServer, operator: KedaOperator) -> None:
        super().__init__(folder)
        self._api = api
        self._operator = operator
        self._prometheus_port = free_port()

    def _command(self) -> list[str]:
        kubeconfig, certificates = self._api.kubeconfig(), self._operator.certificates
        return in_namespace(
            str(keda() / "adapter"),
            f"--kubeconfig={kubeconfig}",
            f"--lister-kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            f"--metrics-service-address=localhost:{self._operator.metrics_port}",
            f"--port={self._prometheus_port}",
            f"--cert-dir={certificates}",
            f"--tls-cert-file={certificates}/tls.crt",
            f"--tls-private-key-file={certificates}/tls.key",
            f"--client-ca-file={certificates}/ca.crt",
        )

    def _answers(self) -> bool:
        return answers(f"https://127.0.0.1:{self.port}/healthz")

    def register(self) -> None:
        """Register the adapter with the API server, and wait until its requests arrive."""
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "keda-metrics-apiserver", "namespace": NAMESPACE},
            "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": self.port}]},
        }
        api_service = {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"v1beta1.{_METRICS}"},
            "spec": {
                "group": _METRICS,
                "version": "v1beta1",
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "insecureSkipTLSVerify": True,
                "service": {"name": "keda-metrics-apiserver", "namespace": NAMESPACE, "port": self.port},
            },
        }
        self._api.done("apply", "--server-side", "--filename=-", text=json.dumps(service))
        self._api.done("apply", "--server-side", "--filename=-", text=json.dumps(api_service))
        self._api.done("wait", "--for=condition=Available", "--timeout=120s", f"apiservice/v1beta1.{_METRICS}")


def in_namespace(*command: str) -> list[str]:
    """The command with the variables that KEDA's own pods have; all namespaces are watched."""
    variables = {"KEDA_CLUSTER_OBJECT_NAMESPACE": NAMESPACE, "POD_NAMESPACE": NAMESPACE, "WATCH_NAMESPACE": ""}
    return ["/usr/bin/env", *(f"{name}={value}" for name, value in variables.items()), *command]
