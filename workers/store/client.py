"""Implements `workers.ports.TokenStore` with Redis.

Connects to one server, a Sentinel group or a cluster by URL (`workers.store.address`). Safe for any number of threads:
a call takes a connection from a pool that grows to the number of simultaneous calls. Never retries, because the
callers do; errors of the client become `workers.errors` here. Of a value it knows only where its source position is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis
import structlog
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from protocols.source_position import HEAD_BYTES, SourcePosition, may_replace, removal_marker
from workers.errors import Misconfigured, Transient
from workers.secrets import mask_addresses
from workers.store.address import StoreUrl
from workers.store.replies import condition_of, text_of, translated
from workers.store.scripts import WRITE_UNLESS_OLDER, WRITE_UNLESS_OLDER_SHA

log = structlog.get_logger(__name__)

#: Keys that `probe` reads and writes: several, because a server of a cluster refuses keys of different slots.
_NUM_PROBE_KEYS = 2
_PROBE_LIFETIME_S = 1.0

_Command = tuple[str | int | bytes, ...]


class RedisStore:
    """Values in Redis; implements `workers.ports.TokenStore`.

    Connects on the first call, so that a worker may start before its store. `timeout_s` bounds a connection attempt
    and each wait for an answer; options in the URL override it.
    """

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        """Raises `Misconfigured` for an invalid URL or option."""
        self._url = StoreUrl.parse(url)
        self._name = mask_addresses(url)
        self._lock = threading.Lock()
        self._open: redis.Redis | RedisCluster | None = None
        self._has_scripts = True
        options: dict[str, Any] = {
            # RESP2 and no CLIENT SETINFO: proxies and old servers know neither HELLO nor CLIENT, and MGET is as fast.
            "protocol": 2,
            "driver_info": None,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "socket_keepalive": True,
            "username": self._url.username,
            "password": self._url.password,
            "db": self._url.database,
            **self._url.options,
        }
        make: type[Any] = redis.SSLConnection if self._url.has_tls else redis.Connection
        if self._url.socket_path is not None:
            make = redis.UnixDomainSocketConnection
            del options["socket_connect_timeout"], options["socket_keepalive"]
        connection_options = {name: value for name, value in options.items() if name != "max_connections"}
        try:
            make(**connection_options)  # never connected; redis-py checks the names of the options here
        except (TypeError, ValueError, RedisError) as error:
            raise Misconfigured(f"REDIS_URL={self._name} has an invalid option: {error}") from error
        self._options = options
        self._connection_class = make

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """One MGET; in a cluster one for each slot, sent to all nodes as pipelines."""
        if not keys:
            return []
        with self._retryable():
            return self._get_many(keys)

    def put_many(self, values: Mapping[str, bytes], *, lifetime_s: float | None = None) -> list[bool]:
        """Write all in one round trip to each node. After `Transient` some may be written."""
        if not values:
            return []
        with self._retryable():
            return self._put_many(values, lifetime_s)

    def exist_many(self, keys: Sequence[str]) -> list[bool]:
        """Return for each key whether the store has a value other than a removal marker."""
        with self._retryable():
            lengths = self._pipelined([("STRLEN", key) for key in keys])
            wrong_type = [_condition(length) == "wrong_type" for length in lengths]
            _checked([length for length, is_wrong in zip(lengths, wrong_type, strict=True) if not is_wrong])
            return [not is_wrong and length > HEAD_BYTES for length, is_wrong in zip(lengths, wrong_type, strict=True)]

    def probe(self, prefixes: Sequence[str], *, writes: bool) -> None:
        """Try every command that the worker needs, on keys with these prefixes that no image can have.

        Raises `Misconfigured` if a person has to correct something, `Transient` while the store cannot be reached.
        """
        keys = [f"{prefix}\0probe-{number}" for prefix in prefixes for number in range(_NUM_PROBE_KEYS)]
        with self._translating():
            self._get_many(keys)
            if writes:
                marker = removal_marker(SourcePosition())
                values = dict.fromkeys(keys, marker)
                try:
                    self._put_many(values, _PROBE_LIFETIME_S)
                except RedisConnectionError as error:
                    # Some proxies answer an unknown command by closing the connection.
                    self._get_many(keys)
                    if not self._has_scripts:
                        raise
                    self._forgo_scripts(error)
                    self._put_many(values, _PROBE_LIFETIME_S)

    def close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def _get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        client: Any = self._client()
        values: Any = client.mget_nonatomic(keys) if self._url.kind == "cluster" else client.mget(keys)
        if (
            not isinstance(values, list)
            or len(values) != len(keys)
            or not {bytes, type(None)} >= set(map(type, values))
        ):
            raise RedisError("the reply to MGET is not one value for each key")
        return values

    def _put_many(self, values: Mapping[str, bytes], lifetime_s: float | None) -> list[bool]:
        lifetime_ms = 0 if lifetime_s is None else max(1, round(lifetime_s * 1000))
        if not self._has_scripts:
            return self._put_many_without_scripts(values, lifetime_ms)
        replies = self._run_script("EVALSHA", WRITE_UNLESS_OLDER_SHA, values, lifetime_ms)
        # A restarted server has forgotten the script; EVAL sends it again.
        unknown = [key for key, reply in replies.items() if _condition(reply) == "no_script"]
        if unknown:
            replies |= self._run_script("EVAL", WRITE_UNLESS_OLDER, {key: values[key] for key in unknown}, lifetime_ms)
        for reply in replies.values():
            if _condition(reply) == "no_scripting":
                self._forgo_scripts(reply)
                return self._put_many_without_scripts(values, lifetime_ms)
        written = _checked(list(replies.values()))
        if any(type(reply) is not int or reply not in (0, 1) for reply in written):
            raise RedisError("the reply to EVALSHA is neither 0 nor 1")
        return [reply == 1 for reply in written]

    def _run_script(self, command: str, script: str, values: Mapping[str, bytes], lifetime_ms: int) -> dict[str, Any]:
        commands: list[_Command] = [(command, script, 1, key, value, lifetime_ms) for key, value in values.items()]
        return dict(zip(values, self._pipelined(commands, key_at=3), strict=True))

    def _put_many_without_scripts(self, values: Mapping[str, bytes], lifetime_ms: int) -> list[bool]:
        """Compare in this process, then write; another worker may write in between."""
        heads = self._pipelined([("GETRANGE", key, 0, HEAD_BYTES - 1) for key in values])
        _checked([head for head in heads if _condition(head) != "wrong_type"])
        written = [
            may_replace(value, head if isinstance(head, bytes) else None)
            for value, head in zip(values.values(), heads, strict=True)
        ]
        lifetime: _Command = ("PX", lifetime_ms) if lifetime_ms else ()
        _checked(
            self._pipelined(
                [
                    ("SET", key, value, *lifetime)
                    for (key, value), is_later in zip(values.items(), written, strict=True)
                    if is_later
                ]
            )
        )
        return written

    def _forgo_scripts(self, reason: Any) -> None:
        self._has_scripts = False
        log.warning(
            "the store runs no scripts: values are compared before they are written, and two workers that write one "
            "image at the same moment may leave the earlier one; allow EVAL, EVALSHA, GETRANGE and SET to avoid this",
            store=self._name,
            reply=text_of(reason),
        )

    def _pipelined(self, commands: Sequence[_Command], key_at: int = 1) -> list[Any]:
        """Send all commands in one round trip to each node; returns each reply, or its error."""
        if not commands:
            return []
        client: Any = self._client()
        with client.pipeline(transaction=False) if self._url.kind != "cluster" else client.pipeline() as pipeline:
            for command in commands:
                # The node by the key: for these commands redis-py would ask the server where the keys are.
                target = (
                    {"target_nodes": client.get_node_from_key(command[key_at])} if self._url.kind == "cluster" else {}
                )
                pipeline.execute_command(*command, **target)
            replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies

    def _client(self) -> redis.Redis | RedisCluster:
        """Return the one client of this store. A cluster's client asks for the slots when it is made."""
        client = self._open
        if client is None:
            with self._lock:
                if self._open is None:
                    self._open = self._make()
                client = self._open
        return client

    def _make(self) -> redis.Redis | RedisCluster:
        once = Retry(NoBackoff(), 0)
        url, options = self._url, {**self._options, "retry": once}
        if url.kind == "server":
            if url.socket_path is not None:
                options["path"] = url.socket_path
            else:
                options["host"], options["port"] = url.nodes[0]
            return redis.Redis.from_pool(redis.ConnectionPool(connection_class=self._connection_class, **options))
        if url.has_tls:
            options["ssl"] = True
        if url.kind == "cluster":
            del options["db"]
            nodes = [ClusterNode(*node) for node in url.nodes]  # type: ignore[no-untyped-call]
            return RedisCluster(startup_nodes=nodes, **options)
        of_connection = ("socket_", "ssl", "protocol", "retry", "driver_info")
        sentinel_options = {name: value for name, value in options.items() if name.startswith(of_connection)}
        sentinel_options |= {"username": url.sentinel_username, "password": url.sentinel_password}
        sentinel = Sentinel(list(url.nodes), sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
        master: redis.Redis = sentinel.master_for(url.service, **options)  # type: ignore[no-untyped-call]
        return master

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """Raise the client's errors as the worker's errors."""
        try:
            yield
        except (RedisError, RedisClusterException, OSError, UnicodeError) as error:
            if condition_of(error) == "read_only":
                self._drop_connections()
            raise translated(self._name, error) from error

    @contextlib.contextmanager
    def _retryable(self) -> Iterator[None]:
        """Like `_translating`, but every error is `Transient`: a person may correct the fault while the worker runs."""
        try:
            with self._translating():
                yield
        except Misconfigured as error:
            raise Transient(str(error)) from error

    def _drop_connections(self) -> None:
        """Close idle connections, which after a failover behind one address lead to the former master."""
        pool: Any = getattr(self._open, "connection_pool", None)
        if pool is not None:
            pool.disconnect(inuse_connections=False)


def _condition(reply: object) -> str:
    return condition_of(reply) if isinstance(reply, Exception) else ""


def _checked(replies: list[Any]) -> list[Any]:
    """Return the replies. Raises the first error among them."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
