"""The index worker: `python -m workers.index`. Builds the job with its first stage and its database."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from workers.dead_letters import DeadLetters
from workers.index.client import PostgresIndex
from workers.index.job import IndexJob
from workers.index.settings import IndexSettings
from workers.index.spans import IndexSpans
from workers.index.vectors import VectorModel
from workers.index.writer import IndexWriter
from workers.runtime import Built, Shared, run_worker
from workers.telemetry.bus_spans import BusSpans

FIRST_STAGE_LOADED, DATABASE_ANSWERS = "first stage loaded", "database answers"


@contextmanager
def build(shared: Shared[IndexSettings]) -> Iterator[Built]:
    """Build the index job with a loaded first stage. Raises `Misconfigured`."""
    settings = shared.settings
    vectors = VectorModel.load(settings.checkpoint)
    index = PostgresIndex(
        settings.database_url.get_secret_value(),
        model_digest=vectors.model_digest,
        dim=vectors.dim,
        creates=True,
        timeout_s=settings.write_timeout_s,
    )
    group_id = f"{settings.group_id}-{vectors.model_digest}"
    bus = BusSpans(shared.tracer, topic=shared.topics.images_indexed, group_id=group_id)
    job = IndexJob(
        writer=IndexWriter(
            index,
            vectors,
            shared.retry("index_write"),
            delete_markers=index.delete_markers,
            clock=shared.clock,
        ),
        dead_letters=DeadLetters(shared.topics.dead_letter, settings.max_message_bytes, shared.metrics),
        max_batch_images=settings.max_batch_images,
        max_inflight_images=settings.max_inflight_images,
        wake=shared.wake,
        metrics=shared.metrics,
        spans=IndexSpans(shared.tracer, bus),
    )
    try:
        yield Built(job, bus, shared.topics.images_indexed, group_id, refresh_gauges=lambda lag: None, probe=index.ping)
    finally:
        job.close()
        index.close()


if __name__ == "__main__":
    sys.exit(run_worker("index", IndexSettings, build, loads=FIRST_STAGE_LOADED, needs=DATABASE_ANSWERS))
