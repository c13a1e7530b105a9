"""A real Kubernetes API server with its etcd, on this machine and for this test: no nodes, no controllers."""

from __future__ import annotations

import json
import secrets
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from deploy_tools import control_plane, etcd, needed, run
from server_process import Server, free_port


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
    """With an administrator's token; namespaces, quotas and Pod Security are enforced, nothing is ever run."""

    name = "apiserver"
    start_limit_s = 180.0

    def __init__(self, folder: Path, etcd_url: str) -> None:
        super().__init__(folder)
        self._etcd_url = etcd_url
        self._token = secrets.token_hex(16)

    def _command(self) -> list[str]:
        tokens, key = self.folder / "tokens.csv", self.folder / "service-accounts.key"
        tokens.write_text(f"{self._token},admin,1,system:masters\n")
        needed("openssl")
        run(["openssl", "genrsa", "-out", str(key), "2048"])
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
        ]

    def _answers(self) -> bool:
        return self.kubectl("get", "--raw=/readyz").returncode == 0

    def kubectl(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        connection = (
            f"--server=https://127.0.0.1:{self.port}",
            "--insecure-skip-tls-verify",  # its certificate is its own, and it is on this machine
            f"--token={self._token}",
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


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
