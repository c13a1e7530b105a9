"""A real Kubernetes API server with etcd on this machine for one test, and optional controllers.

There are no nodes: pods stay pending unless a test binds and runs them.
"""

from __future__ import annotations

import json
import secrets
import ssl
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from certificates import Authority
from deploy_tools import control_plane, etcd, needed, run
from server_process import Server, free_port

#: For servers on this machine with self-signed certificates.
_UNVERIFIED = ssl.create_default_context()
_UNVERIFIED.check_hostname, _UNVERIFIED.verify_mode = False, ssl.CERT_NONE


#: Those of `ControllerManager`.
CONTROLLERS = (
    "deployment-controller",
    "replicaset-controller",
    "statefulset-controller",
    "horizontal-pod-autoscaler-controller",
)


class Etcd(Server):
    name = "etcd"
    start_limit_s = 60.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._peer_port = free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        peer = f"http://127.0.0.1:{self._peer_port}"
        return [
            str(etcd()),
            f"--data-dir={self.folder}/data",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",  # gone after the test
        ]

    def _answers(self) -> bool:
        return answers(f"{self.url}/health")


class ApiServer(Server):
    """An API server with an administrator's token, enforced namespaces, quotas and Pod Security; APIs can be added."""

    name = "apiserver"
    start_limit_s = 180.0

    def __init__(self, folder: Path, etcd_url: str) -> None:
        super().__init__(folder)
        self._etcd_url = etcd_url
        self.token = secrets.token_hex(16)
        self.service_account_key = folder / "service-accounts.key"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        tokens, key = self.folder / "tokens.csv", self.service_account_key
        tokens.write_text(f"{self.token},admin,1,system:masters\n")
        needed("openssl")
        run(["openssl", "genrsa", "-out", str(key), "2048"])
        authority = Authority(self.folder / "authority")
        aggregator = authority.issue("aggregator")
        return [
            str(control_plane() / "apiserver"),
            f"--etcd-servers={self._etcd_url}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.test",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--allow-privileged=true",  # as clusters have it; what forbids it is the namespace's level
            f"--cert-dir={self.folder}/certificates",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--service-cluster-ip-range=10.0.0.0/24",
            # An API that is added (KEDA's metrics) is asked in the user's name, under this certificate.
            f"--requestheader-client-ca-file={authority.certificate}",
            "--requestheader-allowed-names=aggregator",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            f"--proxy-client-cert-file={aggregator.certificate}",
            f"--proxy-client-key-file={aggregator.key}",
        ]

    def _answers(self) -> bool:
        return self.kubectl("get", "--raw=/readyz").returncode == 0

    def kubectl(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        connection = (
            f"--server={self.url}",
            "--insecure-skip-tls-verify",  # its certificate is its own, and it is on this machine
            f"--token={self.token}",
        )
        return subprocess.run(
            [str(control_plane() / "kubectl"), *connection, *arguments],
            input=text,
            env={"HOME": str(self.folder), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    def done(self, *arguments: str, text: str | None = None) -> str:
        """Standard output of a kubectl that must succeed."""
        result = self.kubectl(*arguments, text=text)
        assert result.returncode == 0, f"kubectl {' '.join(arguments)}: {result.stderr}"
        return result.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self.done("get", *arguments, "--output=json"))

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request of the API, a PATCH as a merge; without the third of a second that kubectl takes to start.

        Raises `urllib.error.HTTPError` with the server's status.
        """
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30, context=_UNVERIFIED) as answer:
            return json.load(answer)

    def kubeconfig(self) -> Path:
        """Return a file with which other programs connect as administrator."""
        path = self.folder / "kubeconfig"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "admin", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(content))
        return path


class ControllerManager(Server):
    """The controllers that create the pods of Deployments and StatefulSets, and the one that sets their number."""

    name = "controllermanager"
    start_limit_s = 120.0

    def __init__(self, folder: Path, api: ApiServer, *, autoscaler_sync_s: int) -> None:
        super().__init__(folder)
        self._api = api
        self._autoscaler_sync_s = autoscaler_sync_s

    def _command(self) -> list[str]:
        return [
            str(control_plane() / "controllermanager"),
            f"--kubeconfig={self._api.kubeconfig()}",
            f"--service-account-private-key-file={self._api.service_account_key}",
            f"--controllers={','.join(CONTROLLERS)}",
            f"--horizontal-pod-autoscaler-sync-period={self._autoscaler_sync_s}s",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--cert-dir={self.folder}/certificates",
        ]

    def _answers(self) -> bool:
        return answers(f"https://127.0.0.1:{self.port}/healthz")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2, context=_UNVERIFIED) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
