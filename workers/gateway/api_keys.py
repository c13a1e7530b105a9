"""Checks the API keys of callers against hashes; the gateway stores no key.

A key is 256 random bits, so a plain SHA-256 protects it. Comparisons take the same time for every key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

#: Name of every caller if no keys are configured.
ANYONE = "anyone"

_ENTRY = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")


class ApiKeys:
    """The names and hashes of the valid keys. Without keys, everyone may call."""

    def __init__(self, hashes: Sequence[tuple[str, bytes]]) -> None:
        """`hashes` holds names and the SHA-256 of their keys; a name may occur twice while its key is replaced."""
        self._hashes = tuple(hashes)

    @classmethod
    def parse(cls, text: str) -> ApiKeys:
        """Read `name:hash` entries, separated by commas or white space. Raises `ValueError`."""
        hashes = []
        for number, entry in enumerate(filter(None, re.split(r"[\s,]+", text)), start=1):
            match = _ENTRY.fullmatch(entry)
            if match is None:
                # Not the entry itself, which may hold a key instead of its hash.
                raise ValueError(
                    f"entry {number} is not name:hash, with the SHA-256 of the key in hexadecimal; "
                    "`python -m workers.gateway --new-key NAME` prints both"
                )
            hashes.append((match[1], bytes.fromhex(match[2])))
        return cls(hashes)

    @property
    def are_required(self) -> bool:
        return bool(self._hashes)

    def caller_of(self, key: str | None) -> str | None:
        """Return the name of the caller with this key; None if the key is not valid."""
        if not self._hashes:
            return ANYONE
        sent = hashlib.sha256((key or "").encode("utf-8", "surrogateescape")).digest()
        caller = None
        for name, expected in self._hashes:  # always all of them, so that every key takes the same time
            if hmac.compare_digest(sent, expected):
                caller = name
        return caller


def new_key(name: str) -> tuple[str, str]:
    """Return a new key, and the entry of its name and hash."""
    key = secrets.token_urlsafe(32)
    return key, f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"


def key_in(authorization: str | None, x_api_key: str | None) -> str | None:
    """Return the key in a request's headers: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    if authorization is not None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() in ("bearer", "api-key", "apikey"):
            return key.strip()
    return x_api_key
