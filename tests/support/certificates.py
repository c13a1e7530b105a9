"""A certificate authority for one test, made with openssl; its certificates are valid for two days."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deploy_tools import needed, run

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its key, each a PEM file; `both` is one file with the two, as Kafka reads them."""

    certificate: Path
    key: Path
    both: Path


class Authority:
    """Issues certificates into a folder; the authority's certificate is `ca.crt`, the only file in `trusted`."""

    def __init__(self, folder: Path) -> None:
        needed("openssl")
        self._folder = folder
        self.trusted = folder / "trusted"
        self.trusted.mkdir(parents=True)
        self.certificate, self._key = self.trusted / "ca.crt", folder / "ca.key"
        self._request(self.certificate, self._key, "edje test authority")

    def issue(self, name: str) -> Issued:
        """Issue a certificate for a server on this machine, or a client of this name. Raises `AssertionError`."""
        issued = Issued(*(self._folder / f"{name}.{suffix}" for suffix in ("crt", "key", "pem")))
        signed = ("-CA", str(self.certificate), "-CAkey", str(self._key))
        names = f"subjectAltName=DNS:localhost,DNS:{name},IP:127.0.0.1"
        self._request(
            issued.certificate, issued.key, name, *signed, "-addext", names, "-addext", "basicConstraints=CA:FALSE"
        )
        issued.both.write_bytes(issued.key.read_bytes() + issued.certificate.read_bytes())
        return issued

    @staticmethod
    def _request(certificate: Path, key: Path, name: str, *options: str) -> None:
        files = ("-keyout", str(key), "-out", str(certificate))
        run(["openssl", "req", "-x509", *_NEW_KEY, "-subj", f"/CN={name}", *files, *options])
