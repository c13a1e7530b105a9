"""Implements `workers.index.port.ImageIndex` with Postgres and pgvector; the only file that uses psycopg.

Works with any server that has the extension, also behind a connection pooler in transaction mode. Safe for any
number of threads: a call takes a connection from a pool that grows to the number of simultaneous calls. Never
retries; foreign errors become `workers.errors` here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psycopg
from pgvector import HalfVector
from pgvector.psycopg import register_vector
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb

from workers.errors import Misconfigured, Poison, Transient
from workers.index import tables
from workers.index.port import Change, Filter, ImageRow, IndexedImage, Neighbour, RemovedImage, Vector

#: SQLSTATE classes and states that a person has to correct: wrong credentials, unknown database, missing permission,
#: missing extension or type.
_MISCONFIGURED = ("28", "3D", "42", "0A", "58P01")
#: States of class 42 that pass: another worker has not yet created the tables.
_NOT_YET = (errors.UndefinedTable,)
#: A failed connection has no SQLSTATE, only text.
_REFUSED_LOGIN = ("authentication failed", "does not exist", "no pg_hba.conf entry", "permission denied")
#: Values that Postgres cannot hold.
_POISON = ("22", "23")
_CONNECTION_PARAMETERS = {"application_name": "edje-index", "keepalives_idle": "30", "keepalives_interval": "10"}


class PostgresIndex:
    """The images of one model in Postgres; implements `workers.index.port.ImageIndex`.

    Connects on the first call, so that a worker may start before its database.
    """

    def __init__(
        self, url: str, *, model_digest: str, dim: int, creates: bool, connect_timeout_s: int = 5, timeout_s: float = 30
    ) -> None:
        """`dim` is the width of the model's vectors. With `creates`, `ping` creates extension and tables.

        Raises `Misconfigured` for an invalid URL, or vectors that are too wide for the index.
        """
        if dim > tables.MAX_DIM:
            raise Misconfigured(
                f"the checkpoint's first stage has vectors of {dim} values; pgvector indexes at most {tables.MAX_DIM}"
            )
        try:
            given = conninfo_to_dict(url)
        except psycopg.Error:  # its text quotes the address with the password
            raise Misconfigured(
                "DATABASE_URL is not a Postgres address: write postgresql://user:password@host:5432/database, "
                "with / and @ of a password as %2F and %40"
            ) from None
        self._parameters = {
            **_CONNECTION_PARAMETERS,
            "connect_timeout": str(connect_timeout_s),
            "tcp_user_timeout": str(int(timeout_s * 1000)),
            **given,
        }
        self._name = f"Postgres at {given.get('host', 'localhost')}:{given.get('port', 5432)}"
        self._timeout_ms = int(timeout_s * 1000)
        self._limit_s = timeout_s + 1.0  # later than the server's timeout, which keeps the connection open
        self._model_digest = model_digest
        self._dim = dim
        self._creates = creates
        self._table = tables.table_of(model_digest)
        self._idle: deque[psycopg.Connection[Any]] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def apply(self, changes: Sequence[Change]) -> frozenset[str]:
        without_vector = set()
        written = [_upsert_parameters(c) for c in changes if isinstance(c, RemovedImage) or c.vector is not None]
        kept = [change for change in changes if isinstance(change, ImageRow) and change.vector is None]
        with self._transaction() as cursor:
            if written:
                cursor.executemany(tables.upsert(self._table), written)
            for change in kept:
                cursor.execute(tables.keep_vector(self._table), _keep_parameters(change))
                if cursor.fetchone() is None:
                    without_vector.add(change.image_id)
        return frozenset(without_vector)

    def nearest(self, vector: Vector, limit: int, matching: Filter) -> list[Neighbour]:
        asked = HalfVector(vector.astype(np.float16))
        filters = [[Jsonb({key: value}) for value in values] for key, values in matching.items()]
        if not all(filters):
            return []  # a key without a value matches nothing
        statement = tables.nearest(self._table, [len(values) for values in filters])
        parameters = [asked, *(value for values in filters for value in values), asked, limit]
        with self._transaction() as cursor:
            for setting in tables.search_settings(limit):
                cursor.execute(setting)
            cursor.execute(statement, parameters)
            found = [Neighbour(image_id, float(score), metadata) for image_id, score, metadata in cursor.fetchall()]
        # An iterative scan returns its rows in nearly, not exactly, this order.
        return sorted(found, key=lambda neighbour: (-neighbour.score, neighbour.image_id))

    def find(self, image_ids: Sequence[str]) -> list[IndexedImage | None]:
        if not image_ids:
            return []
        with self._transaction() as cursor:
            cursor.execute(tables.find(self._table), [list(image_ids)])
            found = {row[0]: IndexedImage(*row) for row in cursor.fetchall()}
        return [found.get(image_id) for image_id in image_ids]

    def ids_of(self, key: str, values: Sequence[str]) -> list[str | None]:
        if not values:
            return []
        with self._transaction() as cursor:
            cursor.execute(tables.ids_of(self._table), [key, list(values)])
            found = dict(cursor.fetchall())
        return [found.get(value) for value in values]

    def count(self) -> int:
        with self._transaction() as cursor:
            cursor.execute(tables.count(self._table))
            return _only_value(cursor)

    def delete_markers(self) -> int:
        """Delete the markers of images that were removed long ago; returns how many."""
        with self._transaction() as cursor:
            cursor.execute(tables.delete_markers(self._table))
            return cursor.rowcount

    def ping(self) -> None:
        if self._creates:
            self._create()
        self.find(["."])

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, deque()
        for connection in idle:
            connection.close()

    def _create(self) -> None:
        """Create extension and tables where they are missing; raise `Misconfigured` for a table of another width."""
        with self._translating(), self._open() as connection, self._limiting(connection), connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [tables.CREATION_LOCK])
            present = connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchone()
            if present is None:
                connection.execute("CREATE EXTENSION vector")
            for statement in tables.creation(self._table, self._dim):
                connection.execute(statement)
            connection.execute(tables.REGISTER, [self._model_digest, self._table, self._dim])
            row = connection.execute(f"SELECT dim FROM {tables.MODELS} WHERE digest = %s", [self._model_digest])
            dim = _only_value(row)
        if dim != self._dim:
            raise Misconfigured(
                f"the index of model {self._model_digest} holds vectors of {dim} values and the checkpoint's first "
                f"stage makes {self._dim}: another first stage filled it; DROP TABLE {self._table} and delete its row "
                f"in {tables.MODELS}, then start the index worker with a new group to fill it again"
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[psycopg.Cursor[Any]]:
        """A cursor inside a transaction; a connection that failed is closed, not reused."""
        with self._translating():
            connection = self._take() or self._connect()
            try:
                with self._limiting(connection), connection.transaction(), connection.cursor() as cursor:
                    yield cursor
            except BaseException:
                connection.close()
                raise
            self._give_back(connection)

    def _open(self) -> psycopg.Connection[Any]:
        # No prepared statements: a pooler in transaction mode does not support them.
        return psycopg.connect(**self._parameters, autocommit=True, prepare_threshold=None)  # type: ignore[arg-type]

    def _connect(self) -> psycopg.Connection[Any]:
        connection = self._open()
        try:
            register_vector(connection)
            connection.execute(f"SET statement_timeout = {self._timeout_ms}")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _limiting(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        """End the connection after the time limit, because psycopg waits for a hung server without limit."""

        def cut_off() -> None:
            with (
                contextlib.suppress(OSError, psycopg.Error),  # closed meanwhile
                socket.socket(fileno=os.dup(connection.fileno())) as duplicate,
            ):
                duplicate.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self._limit_s, cut_off)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _take(self) -> psycopg.Connection[Any] | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give_back(self, connection: psycopg.Connection[Any]) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """Raise psycopg's errors as the worker's errors."""
        try:
            yield
        except psycopg.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: psycopg.Error) -> Exception:
        sentence = f"{self._name}: {_first_line(error)}"
        state = error.sqlstate or ""
        if isinstance(error, _NOT_YET):
            return Transient(f"{sentence}; the index worker creates the table when it starts with this checkpoint")
        if isinstance(error, (psycopg.ProgrammingError, errors.FeatureNotSupported)) and "vector" in sentence:
            return Misconfigured(f"{sentence}; install pgvector and run CREATE EXTENSION vector as a superuser")
        if state.startswith(_MISCONFIGURED):
            return Misconfigured(f"{sentence}; check user, password, database and permissions in DATABASE_URL")
        if state.startswith(_POISON):
            return Poison("not_indexable", f"the database cannot hold this image: {_first_line(error)}")
        if not state and any(words in sentence for words in _REFUSED_LOGIN):
            return Misconfigured(f"{sentence}; check user and password in DATABASE_URL")
        return Transient(sentence)


def _upsert_parameters(change: Change) -> tuple[Any, ...]:
    offset, timestamp_ms = change.position
    if isinstance(change, RemovedImage):
        return change.image_id, None, Jsonb({}), "", offset, timestamp_ms
    assert change.vector is not None  # `apply` passes only changes with a vector
    vector = HalfVector(change.vector.astype(np.float16))
    return change.image_id, vector, Jsonb(dict(change.metadata)), change.content_sha256, offset, timestamp_ms


def _keep_parameters(change: ImageRow) -> Mapping[str, Any]:
    return {
        "image_id": change.image_id,
        "metadata": Jsonb(dict(change.metadata)),
        "content_sha256": change.content_sha256,
        "offset": change.position.offset,
        "timestamp_ms": change.position.timestamp_ms,
    }


def _only_value(cursor: psycopg.Cursor[Any]) -> int:
    row = cursor.fetchone()
    assert row is not None  # an aggregate, or a row that was written in the same transaction
    return int(row[0])


def _first_line(error: psycopg.Error) -> str:
    """Return the error's first line; the others may quote values."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
