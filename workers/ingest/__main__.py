"""The ingest worker: `python -m workers.ingest`. Puts the job together over its engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edje.images import ImageLimits
from protocols.blob import BlobLayout, blob_key
from trt.contract import Engine
from trt.load import load_engine
from workers.dead_letters import DeadLetters
from workers.ingest.address_policy import AddressPolicy
from workers.ingest.fetch import ImageFetcher
from workers.ingest.fetch_http import FetchLimits
from workers.ingest.image_batcher import ImageBatcher
from workers.ingest.job import IngestJob
from workers.ingest.outcomes import IngestOutcomes
from workers.ingest.spans import IngestSpans
from workers.ingest.stages import IngestRetries, IngestStages
from workers.ingest.state import ImageInWork, IngestLimits
from workers.runtime import Built, Shared, open_store, run_worker
from workers.settings import IngestSettings
from workers.telemetry.bus_spans import BusSpans


@contextmanager
def build(shared: Shared[IngestSettings]) -> Iterator[Built]:
    """The ingest job over a warm engine. Raises `Misconfigured` or `EngineError`."""
    settings, metrics = shared.settings, shared.metrics
    fetcher = image_fetcher(settings)
    store = open_store(settings)
    engine = load(settings)
    info = engine.info
    metrics.set_engine(info)
    layout = BlobLayout(info.model_digest, info.num_visual_tokens, info.token_dim, settings.storage)
    bus = BusSpans(shared.tracer, topic=shared.topics.images_new, group_id=settings.group_id)
    spans = IngestSpans(shared.tracer, bus)
    stages = IngestStages(
        engine=engine,
        store=store,
        fetcher=fetcher,
        layout=layout,
        image_limits=ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
        fetch_attempts=settings.fetch_attempts,
        fetch_threads=settings.fetch_threads,
        decode_threads=settings.decode_threads,
        retries=IngestRetries(
            fetch=shared.retry("image_fetch"),
            store_read=shared.retry("store_read"),
            store_write=shared.retry("store_write"),
        ),
        wake=shared.wake,
        clock=shared.clock,
    )
    job = IngestJob(
        stages=stages,
        batcher=ImageBatcher[ImageInWork](
            max_images=settings.max_batch_images, max_wait_s=settings.max_batch_wait_ms / 1000
        ),
        outcomes=IngestOutcomes(
            topics=shared.topics,
            layout=layout,
            dead_letters=DeadLetters(shared.topics.dead_letter, settings.max_message_bytes, metrics),
            publish_embedding=settings.publish_embedding,
            metrics=metrics,
            spans=spans,
        ),
        limits=IngestLimits(
            max_image_bytes=settings.max_image_bytes,
            max_inflight_images=settings.max_inflight_images,
            max_inflight_bytes=settings.max_inflight_bytes,
            fetch_threads=settings.fetch_threads,
        ),
        metrics=metrics,
        spans=spans,
    )
    try:
        yield Built(
            job,
            bus,
            shared.topics.images_new,
            settings.group_id,
            refresh_gauges=lambda lag: None,
            probe=lambda: store.probe([blob_key(info.model_digest, "")], writes=True),
        )
    finally:
        job.close()
        store.close()


def image_fetcher(settings: IngestSettings) -> ImageFetcher:
    policy = AddressPolicy(
        schemes=frozenset(settings.allowed_schemes),
        hosts=settings.allowed_hosts,
        ports=frozenset(settings.allowed_ports),
        file_roots=settings.file_roots,
        allow_private_addresses=settings.allow_private_addresses,
    )
    return ImageFetcher(
        policy,
        FetchLimits(
            max_bytes=settings.max_image_bytes,
            timeout_s=settings.fetch_timeout_s,
            max_redirects=settings.max_redirects,
        ),
    )


def load(settings: IngestSettings) -> Engine:
    """The engine, warm; its slab is the smallest there is, because nothing is scored here."""
    engine = load_engine(
        settings.engine,
        settings.checkpoint,
        storage=settings.storage,
        num_slots=1,
        max_pairs=1,
        max_images=settings.max_batch_images,
        num_threads=settings.num_threads,
        device=settings.device,
        engine_directory=settings.engine_directory,
        constant_ms_per_item=settings.constant_engine_ms_per_item,
    )
    engine.warm_up()
    return engine


if __name__ == "__main__":
    sys.exit(run_worker("ingest", IngestSettings, build))
