"""Finds and masks secrets: passwords in addresses, and the secret values of settings.

The only patterns for log lines, error messages and listed settings. Knows no setting and no client.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote

MASK = "***"
#: Shorter secrets are masked in addresses only, because they could occur inside ordinary words.
MIN_SECRET_CHARS = 4

#: Matches up to the last @ of the word, so that a password with an unescaped @ or slash is masked whole.
_USERINFO = re.compile(r"(?<=://)([^\s:/@]*):([^\s]*)@")
_SECRET_OPTION = re.compile(r"([?&][^=&\s]*(?:password|secret|token)[^=&\s]*=)([^&\s]*)", re.IGNORECASE)


def mask_addresses(text: str) -> str:
    """Return the text with every password in an address masked."""
    return _SECRET_OPTION.sub(rf"\1{MASK}", _USERINFO.sub(rf"\1:{MASK}@", text))


def secrets_in(value: str) -> list[str]:
    """Return the secrets of one secret setting: the passwords of an address, as written and unquoted, or the value."""
    if "://" not in value:
        return [value] if value else []
    found = [match[2] for pattern in (_USERINFO, _SECRET_OPTION) for match in pattern.finditer(value)]
    return [secret for secret in dict.fromkeys([*found, *map(unquote, found)]) if secret]


def mask_setting(value: str) -> str:
    """Return a secret setting for display: an address without its passwords, anything else masked whole."""
    return mask_addresses(value) if "://" in value else MASK


class SecretMask:
    """Masks known secrets, and the passwords of any address."""

    def __init__(self, secrets: Iterable[str]) -> None:
        long_enough = {secret for secret in secrets if len(secret) >= MIN_SECRET_CHARS}
        self._secrets = sorted(
            long_enough, key=len, reverse=True
        )  # longest first, because one secret may contain another

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return mask_addresses(text)
