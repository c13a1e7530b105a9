"""Redis behind `workers.ports.TokenStore`: the only file that knows redis-py.

Takes one server, a Sentinel group or a cluster by URL (`workers.store.address`). Safe for any number of threads: a call
takes a connection from a pool that grows to as many as call at once. Never retries, because the callers' backoff is
the only one; foreign errors become `workers.errors` here. Knows nothing of what a blob holds.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import SSLConnection, parse_url
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from workers.errors import Misconfigured, Transient
from workers.secrets import mask_addresses
from workers.store.address import StoreUrl

#: Answers that pass by themselves, by first word, where redis-py has no class: a disk that is full, missing replicas.
_PASSING = ("MISCONF", "NOREPLICAS", "MASTERDOWN")


class RedisStore:
    """Token blobs in Redis; implements `workers.ports.TokenStore`.

    Connects on the first call, so that a worker may start before its store. `timeout_s` bounds a connection attempt
    and each wait for an answer; options in the URL go before ours.
    """

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        """Raises `Misconfigured` for a URL or an option that no server could make right."""
        self._url = StoreUrl.parse(url)
        self._name = mask_addresses(url)
        self._lock = threading.Lock()
        self._open: redis.Redis | RedisCluster | None = None
        defaults: dict[str, Any] = {
            # RESP2: MGET is as fast in either protocol, and this one needs no handshake that an old server refuses.
            "protocol": 2,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "socket_keepalive": True,
        }
        if self._url.client_url.startswith("unix:"):
            del defaults["socket_connect_timeout"], defaults["socket_keepalive"]
        try:
            options = defaults | dict(parse_url(self._url.client_url))  # type: ignore[no-untyped-call]
            self._sentinel_options = {
                name.removeprefix("sentinel_"): options.pop(name)
                for name in ("sentinel_username", "sentinel_password")
                if name in options
            }
            # Made and thrown away, unconnected: the one place where redis-py looks at the names of the options.
            make = options.pop("connection_class", redis.Connection)
            make(**options)
        except (TypeError, ValueError, RedisError) as error:
            raise Misconfigured(f"{self._name} cannot be used: {error}") from error
        self._options = options
        self._connection_class = make

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """One MGET; in a cluster one for each slot, sent to all nodes as pipelines."""
        if not keys:
            return []
        with self._translating():
            client: Any = self._client()
            values: list[bytes | None] = (
                client.mget_nonatomic(keys) if self._url.kind == "cluster" else client.mget(keys)
            )
            return values

    def put_many(self, blobs: Mapping[str, bytes]) -> None:
        """Write all in one round trip to each node. After `Transient` some may be written."""
        if not blobs:
            return
        with self._translating(), self._client().pipeline(transaction=False) as pipeline:
            for key, blob in blobs.items():
                pipeline.set(key, blob)
            pipeline.execute()

    def ping(self) -> None:
        with self._translating():
            self._client().ping()

    def close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def _client(self) -> redis.Redis | RedisCluster:
        """The one client of this store. A cluster's asks for the layout when made, and is made again if that failed."""
        client = self._open
        if client is None:
            with self._lock:
                if self._open is None:
                    self._open = self._make()
                client = self._open
        return client

    def _make(self) -> redis.Redis | RedisCluster:
        once = Retry(NoBackoff(), 0)
        match self._url.kind:
            case "server":
                pool = redis.ConnectionPool(connection_class=self._connection_class, retry=once, **self._options)
                return redis.Redis.from_pool(pool)
            case "cluster":
                nodes = [ClusterNode(*node) for node in self._url.nodes]  # type: ignore[no-untyped-call]
                return RedisCluster(startup_nodes=nodes, retry=once, **self._node_options())
            case "sentinel":
                of_connection = ("socket_", "ssl", "protocol")
                shared = {name: value for name, value in self._node_options().items() if name.startswith(of_connection)}
                options = {**shared, **self._sentinel_options, "retry": once}
                sentinel = Sentinel(list(self._url.nodes), sentinel_kwargs=options)  # type: ignore[no-untyped-call]
                master: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
                    self._url.service, retry=once, **self._node_options()
                )
                return master

    def _node_options(self) -> dict[str, Any]:
        """What goes for every node of a group, in the words of the clients that choose the connection themselves."""
        options = {name: value for name, value in self._options.items() if name not in ("host", "port")}
        return options | ({"ssl": True} if issubclass(self._connection_class, SSLConnection) else {})

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """Turn redis-py's errors into the worker's."""
        try:
            yield
        except (RedisError, RedisClusterException, OSError) as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> Exception:
        """The error by remedy. What a cluster could not be reached for is told by the cause it carries."""
        causes = list(_chain(error))
        sentence = f"{self._name}: {error}"
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            return Misconfigured(f"{sentence}; the certificate is not trusted (ssl_ca_certs in REDIS_URL names the CA)")
        if any(isinstance(cause, (AuthenticationError, AuthorizationError, NoPermissionError)) for cause in causes):
            return Misconfigured(f"{sentence}; check the user, the password and its permissions in REDIS_URL")
        match error:
            case MasterNotFoundError():  # its own text lists the clients with all their options
                return Transient(f"{self._name}: no sentinel that answers knows a master of this service")
            case OutOfMemoryError():
                return Transient(f"{sentence}; the store is full: raise its maxmemory or remove keys of old models")
            case ClusterDownError() | ReadOnlyError() | TryAgainError():
                return Transient(sentence)
            case MovedError():
                return Misconfigured(f"{sentence}; this server is part of a cluster: use redis+cluster:// in REDIS_URL")
            case InvalidResponse():
                return Misconfigured(f"{sentence}; what answers there does not speak the Redis protocol")
            case ResponseError() if not str(error).startswith(_PASSING):
                return Misconfigured(sentence)
            case RedisClusterException() if "Cluster mode is not enabled" in str(error):
                return Misconfigured(f"{sentence}; use redis:// in REDIS_URL")
            case _:
                return Transient(sentence)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
