"""Translates errors of the Redis client to the worker's errors, by remedy.

Only a refusal that a person has to correct is `Misconfigured`; every other error, an unknown reply included, is
`Transient`. Servers, proxies and scripts report a condition in different words, so a reply's code is searched in
its whole text.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from typing import Literal

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    RedisClusterException,
    ResponseError,
)
from redis.sentinel import MasterNotFoundError

from workers.errors import Misconfigured, Transient

#: Conditions that the store handles itself.
Condition = Literal["read_only", "no_script", "no_scripting", "wrong_type", "other"]

_CODES = re.compile(
    r"\b(READONLY|NOSCRIPT|NOPERM|WRONGTYPE|OOM|MOVED|CROSSSLOT|NOAUTH|WRONGPASS)\b|ACL failure in script|"
    r"can't run this command|Cluster mode is not enabled|cluster support disabled|DB index is out of range|"
    r"invalid DB index"
)
#: Replies of servers and proxies without scripts.
_NO_SCRIPTING = re.compile(
    r"unknown command|unsupported|not supported|not allowed|no permissions? to (run|execute)|"
    r"ACL failure in script|can't run this command",
    re.IGNORECASE,
)
#: Codes of conditions that end by themselves. Their text may contain "not allowed" too.
_PASSING = re.compile(r"\b(OOM|BUSY|LOADING|READONLY|MISCONF|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|MOVED|ASK)\b")

_REMEDIES = {
    "NOPERM": "allow the user of REDIS_URL these commands and keys",
    "ACL failure in script": "allow the user of REDIS_URL these commands and keys",
    "can't run this command": "allow the user of REDIS_URL these commands and keys",
    "NOAUTH": "set the user and the password in REDIS_URL",
    "WRONGPASS": "check the user and the password in REDIS_URL",
    "MOVED": "this server is part of a cluster: use redis+cluster:// in REDIS_URL",
    "CROSSSLOT": "this server is part of a cluster: use redis+cluster:// in REDIS_URL",
    "Cluster mode is not enabled": "this server is no cluster: use redis:// in REDIS_URL",
    "cluster support disabled": "this server is no cluster: use redis:// in REDIS_URL",
    "DB index is out of range": "the database in REDIS_URL does not exist",
    "invalid DB index": "the database in REDIS_URL does not exist",
}


def text_of(error: BaseException) -> str:
    """Return the server's reply of an error, with the code that the client removes."""
    code = getattr(error, "status_code", None)
    text = str(error)
    return text if not code or text.startswith(str(code)) else f"{code} {text}"


def condition_of(error: BaseException) -> Condition:
    """Return the condition that an error reply reports."""
    text = text_of(error)
    found = _CODES.search(text)
    match found[0] if found else "":
        case "READONLY":
            return "read_only"
        case "NOSCRIPT":
            return "no_script"
        case "WRONGTYPE":
            return "wrong_type"
    if isinstance(error, ResponseError) and _NO_SCRIPTING.search(text) and not _PASSING.search(text):
        return "no_scripting"
    return "other"


def translated(name: str, error: BaseException) -> Misconfigured | Transient:
    """Return the worker's error; `name` is the address of the store without its secrets.

    An unreachable cluster is reported by an error that carries the cause, so the causes are searched too.
    """
    if isinstance(error, MasterNotFoundError):  # its own text lists the clients with all their options
        return Transient(f"{name}: no reachable sentinel knows a master of this service")
    sentence = f"{name}: {text_of(error) or type(error).__name__}"
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Misconfigured(f"{sentence}; the certificate is not trusted (ssl_ca_certs in REDIS_URL names the CA)")
        if isinstance(cause, UnicodeError) and not isinstance(cause, UnicodeDecodeError):
            return Misconfigured(f"{sentence}; the host in REDIS_URL is not a valid host name")
        if isinstance(cause, InvalidResponse):
            return Misconfigured(f"{sentence}; the server does not speak the Redis protocol")
        if isinstance(cause, (AuthenticationError, AuthorizationError, NoPermissionError)):
            return Misconfigured(f"{sentence}; check the user, the password and its permissions in REDIS_URL")
        if isinstance(cause, (ResponseError, RedisClusterException)):
            found = _CODES.search(text_of(cause))
            code = found[0] if found else ""
            if code in _REMEDIES:
                return Misconfigured(f"{sentence}; {_REMEDIES[code]}")
            if code == "OOM":
                return Transient(f"{sentence}; the store is full: raise its maxmemory or remove keys of old models")
    return Transient(sentence)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
