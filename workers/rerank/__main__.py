"""The rerank worker: `python -m workers.rerank`. Builds the job and its engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from edje.calibration import Calibration
from edje.checkpoint import read_config
from edje.text import Tokenizer
from protocols.blob import BlobLayout, blob_key
from trt.contract import Engine, EngineInfo, ReportsGraphs
from trt.load import load_engine, slots_in
from workers.dead_letters import DeadLetters
from workers.errors import Misconfigured
from workers.landing import Landing
from workers.ports import Partition
from workers.rerank.admission import AdmissionLimits
from workers.rerank.batching import MicroBatcher
from workers.rerank.fetching import BlobFetcher
from workers.rerank.invalidation import Invalidation
from workers.rerank.job import RerankBounds, RerankJob
from workers.rerank.loading import SlabLoader
from workers.rerank.replies import Replies
from workers.rerank.request import Piece
from workers.rerank.scoring import MAX_BATCHES, BatchScorer
from workers.rerank.spans import RerankSpans
from workers.rerank.texts import TextEncoder
from workers.runtime import Built, Shared, about, open_store, run_worker
from workers.settings import RerankSettings
from workers.telemetry.bus_spans import BusSpans


@contextmanager
def build(shared: Shared[RerankSettings]) -> Iterator[Built]:
    """Build the rerank job with a warm engine. Raises `Misconfigured` or `EngineError`."""
    settings, metrics = shared.settings, shared.metrics
    store = open_store(settings)
    engine = load(settings)
    info = engine.info
    config = read_config(settings.checkpoint)
    metrics.set_engine(info)
    graphs = engine.graph_counts() if isinstance(engine, ReportsGraphs) else None
    if graphs is not None:
        metrics.set_graphs(captured=graphs.captured, uncaptured=graphs.uncaptured)
    layout = BlobLayout(info.model_digest, info.num_visual_tokens, info.token_dim, settings.storage)
    bus = BusSpans(shared.tracer, topic=shared.topics.rerank_requests, group_id=settings.group_id)
    spans = RerankSpans(shared.tracer, bus, info.engine_digest)
    landing, tokenizer = Landing(shared.wake), Tokenizer.load(settings.checkpoint)
    tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
    fetcher = BlobFetcher(
        store, shared.retry("store_read"), settings.fetch_threads, metrics.fetch_seconds, shared.clock
    )
    scorer = BatchScorer(
        engine, executor=ThreadPoolExecutor(1, thread_name_prefix="engine"), landing=landing, clock=shared.clock
    )
    loader = SlabLoader(
        slab=engine.slab,
        layout=layout,
        num_slots=info.num_slots,
        start_fetch=fetcher.start,
        landing=landing,
        metrics=metrics,
        spans=spans,
    )
    invalidation = Invalidation(loader, model_digest=info.model_digest, metrics=metrics)
    job = RerankJob(
        limits=limits_of(settings, shared, info, config.calibration),
        bounds=RerankBounds(
            max_inflight_pairs=settings.max_inflight_pairs,
            max_inflight_bytes=settings.max_inflight_bytes,
            max_fetches=2 * settings.fetch_threads,  # for each thread one fetch in progress and one that waits
            max_ready_pairs=MAX_BATCHES * settings.max_batch_pairs,
            piece_pairs=settings.piece_pairs,
        ),
        num_visual_tokens=info.num_visual_tokens,
        landing=landing,
        texts=TextEncoder(
            tokenizer.encode_batch,
            executor=tokenizing,
            landing=landing,
            cache_size=settings.tokenizer_cache_size,
        ),
        loader=loader,
        invalidation=invalidation,
        batcher=MicroBatcher[Piece](
            max_tokens=settings.max_batch_tokens,
            max_pairs=settings.max_batch_pairs,
            max_wait_s=settings.max_batch_wait_ms / 1000,
        ),
        scorer=scorer,
        replies=Replies(
            reply_topic=shared.topics.rerank_responses,
            dead_letters=DeadLetters(shared.topics.dead_letter, settings.max_message_bytes, metrics),
            model_digest=info.model_digest,
            engine_digest=info.engine_digest,
            calibration=config.calibration,
            metrics=metrics,
            spans=spans,
        ),
        metrics=metrics,
        spans=spans,
        words=tokenizer.words,
        wall_clock=time.time,
    )

    def refresh_gauges(lag: Mapping[Partition, int]) -> None:
        metrics.inflight_pairs.set(job.num_inflight_pairs())
        metrics.backlog.value = job.backlog_s(sum(lag.values()))
        metrics.slab_slots_used.set(loader.slots_used())
        metrics.count_evictions(loader.slots_evicted())

    try:
        yield Built(
            job,
            bus,
            shared.topics.rerank_requests,
            settings.group_id,
            refresh_gauges,
            probe=lambda: store.probe([blob_key(info.model_digest, "")], writes=False),
            output_topics=(shared.topics.rerank_responses,),
            followed_topic=shared.topics.images_indexed,
            on_follower=invalidation.follow,
            about=about(settings, info),
        )
    finally:
        tokenizing.shutdown(wait=True, cancel_futures=True)
        fetcher.close()
        scorer.close()
        store.close()


def load(settings: RerankSettings) -> Engine:
    """Load the engine and warm it up. Raises `Misconfigured` or `EngineError`."""
    num_slots = slots_in(
        settings.slab_bytes,
        settings.checkpoint,
        settings.storage,
        runtime=settings.engine,
        device=settings.device,
        hot_images=settings.hot_images,
    )
    if num_slots < 2 * settings.piece_pairs:
        raise Misconfigured(
            f"RERANK_SLAB_BYTES={settings.slab_bytes} holds {num_slots} images; two pieces of "
            f"RERANK_PIECE_PAIRS={settings.piece_pairs} must fit"
        )
    engine = load_engine(
        settings.engine,
        settings.checkpoint,
        storage=settings.storage,
        num_slots=num_slots,
        max_pairs=settings.max_batch_pairs,
        max_images=1,
        num_threads=settings.num_threads,
        device=settings.device,
        engine_directory=settings.engine_directory,
        fixed_buckets=settings.fixed_buckets,
        hot_images=settings.hot_images,
        constant_ms_per_item=settings.constant_engine_ms_per_item,
    )
    engine.warm_up()
    return engine


def limits_of(
    settings: RerankSettings, shared: Shared[RerankSettings], info: EngineInfo, calibration: Calibration | None
) -> AdmissionLimits:
    """Return the limits of one request."""
    directions = () if calibration is None else calibration.by_direction()
    return AdmissionLimits(
        model_digest=info.model_digest,
        max_request_bytes=settings.max_request_bytes,
        max_candidates=settings.max_candidates,
        max_text_chars=settings.max_query_chars,
        deadline_tolerance_s=settings.deadline_tolerance_ms / 1000,
        reply_topic=shared.topics.rerank_responses,
        allowed_reply_topics=settings.reply_topic_patterns,
        reads_first_stage=[direction for direction, constants in directions if constants.first_stage_gain > 0],
    )


if __name__ == "__main__":
    sys.exit(run_worker("rerank", RerankSettings, build))
