"""Reads listings of image addresses for a backfill: a folder, a bucket's prefix, a CSV or a Parquet file.

Every listing is read as a stream and always in the same order, so that a backfill can continue after an interruption. A
row without a valid image is returned with the reason. Knows nothing of Kafka.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote_plus

from pydantic import ValidationError

from edje.images import SUFFIXES
from protocols.events import ImageNew
from protocols.validation import first_problem
from workers.errors import Misconfigured

#: Names of columns with an address or an id, the preferred name first.
URI_COLUMNS = ("uri", "url", "path", "image_url")
ID_COLUMNS = ("image_id", "id")
_BATCH_ROWS = 10_000
_SCHEMES = ("http://", "https://", "file://", "s3://", "gs://")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that names no image, and why."""

    number: int
    reason: str


def rows_of(
    source: str, *, skip: int = 0, id_prefix: str = "", keep_extension: bool = False
) -> Iterator[ImageNew | BadRow]:
    """Yield the events of a listing from row `skip` on, and a `BadRow` for each row without one.

    Raises `Misconfigured` if the listing cannot be opened.
    """
    for number, (image_id, uri) in enumerate(islice(_pairs(source), skip, None), skip):
        if not uri:
            yield BadRow(number, "no address")
            continue
        name = image_id or _id_of(uri, keep_extension)
        try:
            yield ImageNew(image_id=f"{id_prefix}{name}", uri=uri)
        except ValidationError as error:
            yield BadRow(number, first_problem(error))


def fingerprint_of(source: str) -> str:
    """Return a text that identifies a listing, for the checkpoint of a backfill."""
    if source.startswith(("s3://", "gs://")):
        return source
    try:
        path = Path(source).resolve(strict=True)
        state = path.stat()
    except OSError as error:
        raise Misconfigured(f"{source}: {error.strerror or error}") from None
    return str(path) if path.is_dir() else f"{path} {state.st_size} bytes, modified {state.st_mtime_ns}"


def _pairs(source: str) -> Iterator[tuple[str | None, str | None]]:
    """Yield the id of each row, None if the listing has no ids, and the row's address."""
    if source.startswith(("s3://", "gs://")):
        return _objects(source)
    path = Path(source)
    if path.is_dir():
        return ((None, each.resolve().as_uri()) for each in _files(path))
    if path.suffix.lower() in (".parquet", ".pq"):
        return _parquet(path)
    return _csv(path)


def _id_of(uri: str, keep_extension: bool) -> str:
    """Return the path of an address without leading slash and, unless `keep_extension`, without suffix."""
    path = PurePosixPath(uri.partition("://")[2].partition("?")[0].partition("/")[2] or uri)
    return str(path if keep_extension else path.with_suffix("") if path.name else path)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder, folder by folder, each folder ordered by name."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file():
            yield Path(entry.path)


def _csv(path: Path) -> Iterator[tuple[str | None, str | None]]:
    """Read a CSV with a header, a list of addresses, or an S3 Inventory (bucket, key, …)."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = csv.reader(file)
            first = next(rows, [])
            names = [name.strip().lower() for name in first]
            uri_at = next((names.index(name) for name in URI_COLUMNS if name in names), None)
            id_at = next((names.index(name) for name in ID_COLUMNS if name in names), None)
            if uri_at is not None:
                yield from ((_cell(row, id_at), _cell(row, uri_at)) for row in rows if row)
                return
            if first and not first[0].startswith(_SCHEMES) and len(first) < 2:
                raise Misconfigured(f"{path}: no column {', '.join(URI_COLUMNS)}, and the first line is not an address")
            yield from (_headless(row) for row in chain([first], rows) if row)
    except (OSError, csv.Error) as error:
        raise Misconfigured(f"{path}: {error}") from None


def _headless(row: list[str]) -> tuple[str | None, str | None]:
    if row[0].startswith(_SCHEMES):
        return None, row[0].strip()
    # An S3 Inventory: bucket, and the key in URL encoding.
    key = unquote_plus(row[1]) if len(row) > 1 else ""
    return None, f"s3://{row[0]}/{key}" if key else None


def _cell(row: list[str], number: int | None) -> str | None:
    return row[number].strip() or None if number is not None and number < len(row) else None


def _parquet(path: Path) -> Iterator[tuple[str | None, str | None]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise Misconfigured(f"{path}: Parquet needs the extra parquet (pip install 'edje-rerank[parquet]')") from error
    try:
        with ParquetFile(path) as file:
            names = {name.lower(): name for name in file.schema_arrow.names}
            uri = next((names[name] for name in URI_COLUMNS if name in names), None)
            image_id = next((names[name] for name in ID_COLUMNS if name in names), None)
            bucket_and_key = [names[name] for name in ("bucket", "key") if name in names]
            if uri is None and len(bucket_and_key) < 2:
                raise Misconfigured(f"{path}: no column {', '.join(URI_COLUMNS)}; columns: {', '.join(names)}"[:500])
            columns = bucket_and_key if uri is None else [uri, *([image_id] if image_id else [])]
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                first, *others = (batch.column(name).to_pylist() for name in columns)
                if uri is None:
                    yield from (
                        (None, f"s3://{a}/{unquote_plus(b)}" if a and b else None)
                        for a, b in zip(first, others[0], strict=True)
                    )
                else:
                    ids: Iterable[Any] = others[0] if others else (None for _ in first)
                    yield from ((None if b is None else str(b), a) for a, b in zip(first, ids, strict=True))
    except (OSError, ArrowException) as error:
        raise Misconfigured(f"{path}: {error}") from None


def _objects(source: str) -> Iterator[tuple[str | None, str | None]]:
    """Yield the image files below a prefix of a bucket, folder by folder."""
    scheme, _, prefix = source.partition("://")
    try:
        if scheme == "s3":
            from s3fs import S3FileSystem as FileSystem
        else:
            from gcsfs.core import GCSFileSystem as FileSystem
    except ImportError as error:
        raise Misconfigured(f"{source}: needs the extra {scheme} (pip install 'edje-rerank[{scheme}]')") from error
    try:
        for _, folders, files in FileSystem().walk(prefix.rstrip("/"), detail=True, on_error="raise"):
            for name in sorted(files):
                if PurePosixPath(name).suffix.lower() in SUFFIXES:
                    yield None, f"{scheme}://{files[name]['name']}"
            for name in sorted(folders):  # `walk` reads this dictionary again, and so visits the folders in this order
                folders[name] = folders.pop(name)
    except (OSError, ValueError) as error:
        raise Misconfigured(f"{source}: {type(error).__name__}: {error}") from None
