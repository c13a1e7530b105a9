"""Device memory, staging, the gather, streams and graphs on a real GPU: what needs CUDA and no TensorRT."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from trt.contract import EngineUnavailable
from trt.slab.layout import STORAGES, SlotLayout

pytestmark = pytest.mark.gpu

NUM_SLOTS, NUM_ROWS = 200, 64


@pytest.fixture
def gpu(device):
    """The device, a stream and the objects built on them; imported only with pycuda."""
    import pycuda.driver as cuda

    from trt.cuda.context import NON_BLOCKING
    from trt.cuda.kernels import RowCopier

    with device.current():
        copier, stream = RowCopier(device.compute_capability), cuda.Stream(NON_BLOCKING)
    return SimpleNamespace(device=device, cuda=cuda, copier=copier, stream=stream)


def make_slab(gpu, layout, num_slots=NUM_SLOTS):
    from trt.slab.device import CudaSlab

    return CudaSlab(gpu.device, gpu.copier, layout, num_slots, NUM_ROWS)


def fill(slab, slots, random):
    """Random bytes into these slots; returns them."""
    tokens, scales, rows = slab.stage(slots)
    for row in rows:
        tokens[row] = random.integers(0, 256, tokens.shape[1], dtype=np.uint8)
        scales[row] = random.integers(0, 256, scales.shape[1], dtype=np.uint8)
    written = tokens[list(rows)].copy(), scales[list(rows)].copy()
    slab.publish(slots, rows)
    return written


def gather(gpu, slab, slots):
    from trt.cuda.memory import UploadRing, device_memory

    sizes = slab.layout.token_bytes, slab.layout.scale_bytes
    found = [np.empty((len(slots), size), np.uint8) for size in sizes]
    with gpu.device.current():
        parts = [device_memory(len(slots) * size, "no memory") for size in sizes]
        numbers = device_memory(4 * len(slots), "no memory")
        UploadRing(4 * len(slots), gpu.stream).upload(np.asarray(slots, np.int32), int(numbers))
        slab.wait_for_published(gpu.stream)
        slab.gather(int(numbers), len(slots), int(parts[0]), int(parts[1]), gpu.stream)
        gpu.stream.synchronize()
        for part, values in zip(parts, found, strict=True):
            if values.size:
                gpu.cuda.memcpy_dtoh(values, int(part))
    return found


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(64, 384), (5, 32)])
def test_slots_are_gathered_as_they_were_published_for_every_storage(gpu, storage, shape):
    random = np.random.default_rng(0)
    slab = make_slab(gpu, SlotLayout(storage, *shape))
    expected = [np.zeros((NUM_SLOTS, size), np.uint8) for size in (slab.layout.token_bytes, slab.layout.scale_bytes)]

    for slots in (range(50), range(40, 100), [199, 3, 7, 150], range(60, 120)):
        for part, written in zip(expected, fill(slab, slots, random), strict=True):
            part[list(slots)] = written

    wanted = random.integers(0, NUM_SLOTS, 500)
    for part, found in zip(expected, gather(gpu, slab, wanted), strict=True):
        np.testing.assert_array_equal(found, part[wanted])


def test_slots_beyond_two_gigabytes_are_reached(gpu):
    layout = SlotLayout("int8", 64, 384)
    num_slots = 2**32 // layout.token_bytes + 10
    try:
        slab = make_slab(gpu, layout, num_slots)
    except EngineUnavailable as error:
        pytest.skip(str(error))  # a GPU without so much free memory; smaller slabs are tested above
    slots = [0, 2**31 // layout.token_bytes + 1, num_slots - 1]

    tokens, scales = fill(slab, slots, np.random.default_rng(0))

    found = gather(gpu, slab, slots)
    np.testing.assert_array_equal(found[0], tokens)
    np.testing.assert_array_equal(found[1], scales)


def test_slots_are_filled_on_one_thread_while_another_gathers(gpu):
    slab = make_slab(gpu, SlotLayout("int8", 64, 384))
    tokens, _ = fill(slab, range(40), np.random.default_rng(0))
    errors = []

    def write():
        try:
            for number in range(50):
                fill(slab, range(100, 160), np.random.default_rng(number))
        except Exception as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(50):
        np.testing.assert_array_equal(gather(gpu, slab, range(40))[0], tokens)
    writer.join()

    assert errors == []


def test_a_captured_gather_reads_the_content_at_the_time_of_the_replay(gpu):
    from trt.cuda.graphs import ReplayedWork
    from trt.cuda.memory import UploadRing, device_memory

    slab = make_slab(gpu, SlotLayout("int8", 64, 384))
    tokens, _ = fill(slab, range(40), np.random.default_rng(0))
    found = np.empty((8, slab.layout.token_bytes), np.uint8)
    with gpu.device.current():
        numbers, target = device_memory(4 * 8, "no memory"), device_memory(found.nbytes, "no memory")
        scales = device_memory(8 * slab.layout.scale_bytes, "no memory")
        ring = UploadRing(1024, gpu.stream)
        slab.wait_for_published(gpu.stream)
        work = ReplayedWork(
            "gather", lambda: slab.gather(int(numbers), 8, int(target), int(scales), gpu.stream), gpu.stream
        )
        assert work.is_captured
        for slots in (range(8), range(20, 28)):
            ring.upload(np.array(slots, np.int32), int(numbers))
            work.launch()
            gpu.stream.synchronize()
            gpu.cuda.memcpy_dtoh(found, int(target))
            np.testing.assert_array_equal(found, tokens[list(slots)])


def test_a_capture_that_is_not_allowed_leaves_the_stream_usable(gpu):
    from trt.cuda.graphs import CaptureFailed, captured

    with gpu.device.current():
        with pytest.raises(CaptureFailed):
            captured(gpu.stream.synchronize, gpu.stream)
        gpu.stream.synchronize()


def test_events_tell_the_time_between_them(gpu):
    from trt.cuda.context import StreamEvent
    from trt.cuda.copy_clock import CopyClock
    from trt.cuda.memory import UploadRing, device_memory

    with gpu.device.current():
        clock = CopyClock(lambda: StreamEvent(gpu.stream))
        clock.start()
        target, ring = device_memory(1 << 24, "no memory"), UploadRing(1 << 24, gpu.stream)
        with clock.to_device():
            ring.upload(np.ones(1 << 24, np.uint8), int(target))
        gpu.stream.synchronize()

        copies = clock.copies()

    assert 0 < copies.to_device_s < 1
    assert copies.to_host_s == 0


def test_more_memory_than_there_is_is_named_with_a_remedy(gpu):
    with pytest.raises(EngineUnavailable, match="ask for fewer"):
        make_slab(gpu, SlotLayout("fp16", 64, 384), num_slots=100_000_000)


def test_a_thread_that_ends_leaves_no_context_behind(gpu):
    """With one still pushed the process would be aborted."""
    slab = make_slab(gpu, SlotLayout("int8", 64, 384))
    thread = threading.Thread(target=fill, args=(slab, range(10), np.random.default_rng(0)))
    thread.start()
    thread.join()

    assert len(gather(gpu, slab, range(10))[0]) == 10
