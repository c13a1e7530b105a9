"""The instruments of a worker, and the bound on the values of a label."""

from prometheus_client import CollectorRegistry, generate_latest

from trt.contract import EngineInfo
from workers.metrics import MAX_LABEL_VALUES, OTHER, Metrics
from workers.ports import Partition


def test_two_workers_in_one_process_count_apart():
    one, other = Metrics(), Metrics()

    one.count_event("ok")

    assert one.registry.get_sample_value("edje_events_total", {"outcome": "ok"}) == 1
    assert other.registry.get_sample_value("edje_events_total", {"outcome": "ok"}) is None


def test_a_label_never_takes_more_than_its_share_of_values():
    metrics = Metrics()

    for number in range(MAX_LABEL_VALUES + 10):
        metrics.count_dead_letter(f"code{number}")
    metrics.count_dead_letter("code0")

    def counted(code: str) -> float | None:
        return metrics.registry.get_sample_value("edje_dead_letters_total", {"code": code})

    assert counted("code0") == 2
    assert counted(OTHER) == 10
    assert counted(f"code{MAX_LABEL_VALUES}") is None


def test_the_lag_of_a_partition_that_went_away_is_no_longer_shown():
    metrics = Metrics()

    def lag(number: int) -> float | None:
        labels = {"topic": "rerank.requests", "partition": str(number)}
        return metrics.registry.get_sample_value("edje_consumer_lag_events", labels)

    metrics.set_lag({Partition("rerank.requests", 0): 5, Partition("rerank.requests", 1): 7})
    assert (lag(0), lag(1)) == (5, 7)
    metrics.set_lag({Partition("rerank.requests", 1): 0})
    assert (lag(0), lag(1)) == (None, 0)


def test_a_reply_without_a_time_is_counted_and_not_timed():
    metrics = Metrics()

    metrics.count_reply("error", seconds=None, num_pairs=0)

    assert metrics.registry.get_sample_value("edje_replies_total", {"status": "error"}) == 1
    assert metrics.registry.get_sample_value("edje_reply_seconds_count") == 0


def test_the_engine_in_use_can_be_seen():
    metrics = Metrics(CollectorRegistry())
    info = EngineInfo(
        runtime="torch",
        model_digest="m",
        engine_digest="e",
        num_visual_tokens=64,
        token_dim=384,
        storage="int8",
        image_size=384,
        max_text_tokens=63,
        max_images=8,
        max_pairs=128,
        num_slots=10,
    )

    metrics.set_engine(info)

    labels = {"runtime": "torch", "model_digest": "m", "engine_digest": "e", "storage": "int8"}
    assert metrics.registry.get_sample_value("edje_engine_info", labels) == 1


def test_rerank_methods_reach_their_instruments():
    metrics = Metrics()

    metrics.count_slab_lookups(hits=3, misses=2)
    metrics.count_bad_blobs("missing", 2)
    metrics.count_blob_bytes(24_912)
    metrics.observe_batch(num_pairs=128, num_tokens=9_728, max_tokens=16_384, seconds=0.004)
    metrics.observe_queue_wait(0.001, None)
    metrics.observe_image("decode", 0.01, None)
    metrics.count_retry("store_read")

    value = metrics.registry.get_sample_value
    assert (value("edje_slab_hits_total"), value("edje_slab_misses_total")) == (3, 2)
    assert value("edje_bad_blobs_total", {"reason": "missing"}) == 2
    assert value("edje_store_read_bytes_total") == 24_912
    assert (value("edje_batch_pairs_sum"), value("edje_batch_tokens_sum")) == (128, 9_728)
    assert value("edje_batch_seconds_sum") == 0.004
    assert value("edje_queue_wait_seconds_count") == 1
    assert value("edje_image_seconds_count", {"stage": "decode"}) == 1
    assert value("edje_retries_total", {"kind": "store_read"}) == 1


def test_sizes_with_and_without_a_cuda_graph_are_exposed():
    metrics = Metrics()

    metrics.set_graphs(captured=140, uncaptured=2)

    exposed = generate_latest(metrics.registry).decode()
    assert 'edje_engine_cuda_graphs{state="captured"} 140.0' in exposed
    assert 'edje_engine_cuda_graphs{state="uncaptured"} 2.0' in exposed
