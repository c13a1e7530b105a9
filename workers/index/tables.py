"""The tables of the index and every statement on them. Knows SQL; imports no client.

`edje_models` lists the models: digest, name of its table, width of its vectors. Each model has a separate table,
so the images of two models are indexed at once while one model replaces the other, and `DROP TABLE` removes a model.
A removed image leaves a row without a vector for a day, so that no earlier event stores the image again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

MODELS = "edje_models"
#: pgvector's HNSW index takes at most this many dimensions of a halfvec.
MAX_DIM = 4_000
#: Markers of removed images are deleted after this long; a late write of an earlier event takes seconds.
MARKER_LIFE = "1 day"
MAX_COUNT = 100_000
#: The key of the advisory lock that workers take while they create tables.
CREATION_LOCK = 0x65646A65

_PLAIN_DIGEST = re.compile(r"[0-9a-z]{1,40}")


def table_of(model_digest: str) -> str:
    """Return the name of a model's table; a digest that is not a valid name suffix is hashed."""
    plain = _PLAIN_DIGEST.fullmatch(model_digest)
    word = model_digest if plain else hashlib.sha256(model_digest.encode()).hexdigest()[:40]
    return f"edje_images_{word}"


def creation(table: str, dim: int) -> list[str]:
    """Return the statements that create a model's table and indexes if they are missing."""
    return [
        f"CREATE TABLE IF NOT EXISTS {MODELS} ("
        "digest text PRIMARY KEY, table_name text NOT NULL, dim int NOT NULL, created_at timestamptz DEFAULT now())",
        f"CREATE TABLE IF NOT EXISTS {table} ("
        "image_id text PRIMARY KEY, "
        f"embedding halfvec({dim}), "
        "metadata jsonb NOT NULL DEFAULT '{}', "
        "content_sha256 text NOT NULL DEFAULT '', "
        "source_offset bigint NOT NULL, "
        "source_timestamp_ms bigint NOT NULL, "
        "changed_at timestamptz NOT NULL DEFAULT now())",
        f"CREATE INDEX IF NOT EXISTS {table}_vector ON {table} USING hnsw (embedding halfvec_cosine_ops)",
        f"CREATE INDEX IF NOT EXISTS {table}_metadata ON {table} USING gin (metadata jsonb_path_ops)",
    ]


#: Parameters: digest, table, dim.
REGISTER = f"INSERT INTO {MODELS} (digest, table_name, dim) VALUES (%s, %s, %s) ON CONFLICT (digest) DO NOTHING"

_IS_LATER = (
    "(excluded.source_offset >= stored.source_offset OR excluded.source_timestamp_ms > stored.source_timestamp_ms)"
)
_COLUMNS = "image_id, embedding, metadata, content_sha256, source_offset, source_timestamp_ms"


def upsert(table: str) -> str:
    """Return the statement that writes a row.

    Parameters: image id, vector or NULL (a removal), metadata, content SHA-256, offset, timestamp.
    """
    return (
        f"INSERT INTO {table} AS stored ({_COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s) "
        "ON CONFLICT (image_id) DO UPDATE SET embedding = excluded.embedding, metadata = excluded.metadata, "
        "content_sha256 = excluded.content_sha256, source_offset = excluded.source_offset, "
        f"source_timestamp_ms = excluded.source_timestamp_ms, changed_at = now() WHERE {_IS_LATER}"
    )


def keep_vector(table: str) -> str:
    """Return the statement that updates a row with unchanged content; its result is the row's state.

    The result is one row if the vector can be kept or the change is late, no row if there is no vector to keep.
    """
    return (
        f"WITH changed AS (UPDATE {table} SET metadata = %(metadata)s, source_offset = %(offset)s, "
        "source_timestamp_ms = %(timestamp_ms)s, changed_at = now() "
        "WHERE image_id = %(image_id)s AND embedding IS NOT NULL AND content_sha256 = %(content_sha256)s "
        "AND (%(offset)s >= source_offset OR %(timestamp_ms)s > source_timestamp_ms)) "
        f"SELECT 1 FROM {table} WHERE image_id = %(image_id)s AND (("
        "embedding IS NOT NULL AND content_sha256 = %(content_sha256)s) "
        "OR NOT (%(offset)s >= source_offset OR %(timestamp_ms)s > source_timestamp_ms))"
    )


def delete_markers(table: str) -> str:
    return f"DELETE FROM {table} WHERE embedding IS NULL AND changed_at < now() - interval '{MARKER_LIFE}'"


def nearest(table: str, num_alternatives: Sequence[int]) -> str:
    """Return the search for nearest images. Parameters: vector, each filter's alternatives as jsonb, vector, limit.

    Alternatives are joined by OR, because a GIN index cannot search an array of them.
    """
    filters = "".join(f" AND ({' OR '.join(['metadata @> %s'] * number)})" for number in num_alternatives)
    return (
        f"SELECT image_id, 1 - (embedding <=> %s) AS score, metadata FROM {table} "
        f"WHERE embedding IS NOT NULL{filters} ORDER BY embedding <=> %s LIMIT %s"
    )


def search_settings(limit: int) -> list[str]:
    """Return the settings of a search: the candidates of the HNSW scan, which continues if a filter removes many."""
    ef_search = min(max(2 * limit, 100), 1_000)
    return [f"SET LOCAL hnsw.ef_search = {ef_search}", "SET LOCAL hnsw.iterative_scan = relaxed_order"]


def find(table: str) -> str:
    """Return the query for images by id. Parameter: array of image ids."""
    return f"SELECT image_id, content_sha256, metadata FROM {table} WHERE image_id = ANY(%s) AND embedding IS NOT NULL"


def ids_of(table: str) -> str:
    """Return the query for image ids by metadata. Parameters: key, array of values."""
    return (
        "SELECT value, (SELECT image_id FROM "
        f"{table} WHERE metadata @> jsonb_build_object(%s::text, value) AND embedding IS NOT NULL "
        "ORDER BY image_id LIMIT 1) FROM unnest(%s::text[]) AS value"
    )


def count(table: str) -> str:
    """Return the query that counts at most `MAX_COUNT` rows, so that the search page waits for no scan of millions."""
    return f"SELECT count(*) FROM (SELECT 1 FROM {table} WHERE embedding IS NOT NULL LIMIT {MAX_COUNT}) AS counted"
