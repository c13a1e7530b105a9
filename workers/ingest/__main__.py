"""`python -m workers.ingest`: builds the ingest job over its engine and runs the worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from edje.images import ImageLimits
from protocols.blob import BlobLayout, blob_key
from protocols.thumbnail import thumbnail_key
from trt.contract import Engine
from trt.load import load_engine
from workers.dead_letters import DeadLetters
from workers.ingest.address_policy import AddressPolicy
from workers.ingest.fetch import ImageFetcher
from workers.ingest.fetch_http import FetchLimits
from workers.ingest.image_store import ImageStore
from workers.ingest.job import IngestJob
from workers.ingest.outcomes import IngestOutcomes
from workers.ingest.scheduling import FetchQueue, ImageBatcher
from workers.ingest.spans import IngestSpans
from workers.ingest.stages import IngestStages
from workers.ingest.work import ImageWork, IngestLimits
from workers.runtime import Built, Shared, about, open_store, run_worker
from workers.settings import IngestSettings
from workers.telemetry.bus_spans import BusSpans

#: The bytes of an event in addition to its image: metadata, ids and framing.
EVENT_BYTES = 1 << 20


@contextmanager
def build(shared: Shared[IngestSettings]) -> Iterator[Built]:
    """Build the ingest job over a warm engine. Raises `Misconfigured` or `EngineError`."""
    settings, metrics = shared.settings, shared.metrics
    with ExitStack() as stack:
        fetcher = image_fetcher(settings)
        stack.callback(fetcher.close)
        store = open_store(settings)
        stack.callback(store.close)
        engine = load(settings)
        info = engine.info
        metrics.set_engine(info)
        layout = BlobLayout(info.model_digest, info.num_visual_tokens, info.token_dim, settings.storage)
        bus = BusSpans(shared.tracer, topic=shared.topics.images_new, group_id=settings.group_id)
        spans = IngestSpans(shared.tracer, bus)
        images = ImageStore(
            store, layout, reads=shared.retry("store_read"), writes=shared.retry("store_write"), clock=shared.clock
        )
        stages = IngestStages(
            engine=engine,
            images=images,
            fetcher=fetcher,
            image_limits=ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            decode_threads=settings.decode_threads,
            makes_thumbnails=settings.thumbnails,
            wake=shared.wake,
            clock=shared.clock,
        )
        job = IngestJob(
            stages=stages,
            fetches=FetchQueue[ImageWork](max_fetches=settings.fetch_threads, retry_for_s=settings.fetch_retry_s),
            batcher=ImageBatcher[ImageWork](
                max_images=settings.max_batch_images, max_wait_s=settings.max_batch_wait_ms / 1000
            ),
            outcomes=IngestOutcomes(
                topics=shared.topics,
                layout=layout,
                dead_letters=DeadLetters(shared.topics.dead_letter, settings.max_message_bytes, metrics),
                publish_embedding=settings.publish_embedding,
                max_event_bytes=settings.max_image_bytes * 4 // 3 + EVENT_BYTES,
                metrics=metrics,
                spans=spans,
            ),
            limits=IngestLimits(
                max_image_bytes=settings.max_image_bytes,
                max_inflight_images=settings.max_inflight_images,
                max_inflight_bytes=settings.max_inflight_bytes,
            ),
            metrics=metrics,
            spans=spans,
        )
        prefixes = [blob_key(info.model_digest, ""), thumbnail_key("")]
        stack.callback(job.close)
        yield Built(
            job,
            bus,
            shared.topics.images_new,
            settings.group_id,
            refresh_gauges=lambda lag: None,
            probe=lambda: store.probe(prefixes, writes=True),
            output_topics=(shared.topics.images_indexed,),
            about=about(settings, info),
        )


def image_fetcher(settings: IngestSettings) -> ImageFetcher:
    """Build the fetcher with the address policy and the limits of the settings."""
    policy = AddressPolicy(
        schemes=frozenset(settings.allowed_schemes),
        hosts=settings.allowed_hosts,
        ports=frozenset(settings.allowed_ports),
        file_roots=settings.file_roots,
        allow_private_addresses=settings.allow_private_addresses,
    )
    limits = FetchLimits(
        max_bytes=settings.max_image_bytes,
        timeout_s=settings.fetch_timeout_s,
        max_redirects=settings.max_redirects,
    )
    return ImageFetcher(policy, limits, max_fetches=settings.fetch_threads)


def load(settings: IngestSettings) -> Engine:
    """Load the engine and warm it up; its slab has one slot, because ingest workers score nothing."""
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
