"""The slab in device memory, on a recorded GPU that runs no work until the host synchronises."""

import importlib
import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recorded_engine import recorded_modules
from recording_cuda import Gpu
from trt.contract import EngineBroken, EngineUnavailable, LimitExceeded
from trt.slab.layout import STORAGES, SlotLayout
from trt.slab.staging import StagingRing, adjacent

NUM_SLOTS, NUM_ROWS = 12, 8


@contextmanager
def on_a_gpu():
    gpu = Gpu()
    with recorded_modules(gpu):
        modules = {name: importlib.import_module(f"trt.cuda.{name}") for name in ("context", "kernels", "memory")}
        modules["slab"] = importlib.import_module("trt.slab.device")
        yield SimpleNamespace(gpu=gpu, device=modules["context"].CudaDevice(0), **modules)


@pytest.fixture
def cuda():
    with on_a_gpu() as modules:
        yield modules


def make_slab(cuda, layout):
    with cuda.device.current():
        copier = cuda.kernels.RowCopier(cuda.device.compute_capability)
    return cuda.slab.CudaSlab(cuda.device, copier, layout, NUM_SLOTS, NUM_ROWS)


def fill(slab, slots, value):
    """Write bytes that encode slot and value into every slot; return them."""
    tokens, scales, rows = slab.stage(slots)
    for row, slot in zip(rows, slots, strict=True):
        tokens[row], scales[row] = slot * 10 + value, slot * 10 + value + 1
    slab.publish(slots, rows)


def gather(cuda, slab, slots):
    """The bytes of these slots, as a plan would find them."""
    layout = slab.layout
    with cuda.device.current():
        stream = cuda.slab.cuda.Stream(cuda.context.NON_BLOCKING)
        parts = [cuda.memory.device_memory(len(slots) * size, "") for size in (layout.token_bytes, layout.scale_bytes)]
        numbers = cuda.memory.device_memory(4 * len(slots), "")
        cuda.memory.UploadRing(4096, stream).upload(np.array(slots, np.int32), int(numbers))
        slab.wait_for_published(stream)
        slab.gather(int(numbers), len(slots), int(parts[0]), int(parts[1]), stream)
        stream.synchronize()
    sizes = layout.token_bytes, layout.scale_bytes
    return [
        cuda.gpu.view(int(part), len(slots) * size).reshape(len(slots), size).copy()
        for part, size in zip(parts, sizes, strict=True)
    ]


def assert_holds(found, values):
    tokens, scales = found
    for row, value in enumerate(values):
        assert (tokens[row] == value).all()
        assert (scales[row] == (value + 1 if value else 0)).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(4, 32), (3, 96)])
def test_slots_are_gathered_as_they_were_published_for_every_storage(cuda, storage, shape):
    slab = make_slab(cuda, SlotLayout(storage, *shape))

    fill(slab, [3, 11, 0], 5)

    assert_holds(gather(cuda, slab, [0, 11, 11, 3, 7]), [5, 115, 115, 35, 0])


def test_rows_that_no_vector_fits_are_copied_byte_by_byte(cuda):
    slab = make_slab(cuda, SlotLayout("int8", 3, 7))

    fill(slab, [1, 2], 5)

    assert_holds(gather(cuda, slab, [2, 1]), [25, 15])


def test_publishing_waits_for_nothing_and_a_gather_waits_for_it(cuda):
    slab = make_slab(cuda, SlotLayout("int8", 4, 32))

    fill(slab, [1], 5)

    assert slab._stream._waiting
    assert_holds(gather(cuda, slab, [1]), [15])


def test_staged_rows_are_not_written_again_before_they_are_copied(cuda):
    slab = make_slab(cuda, SlotLayout("int8", 4, 32))

    for value, slots in enumerate([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [0, 1]]):
        fill(slab, slots, value)

    expected = [slot * 10 + value for slot, value in zip(range(12), [4, 4, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], strict=True)]
    assert_holds(gather(cuda, slab, range(12)), expected)


def test_only_the_rows_that_are_wanted_are_published(cuda):
    slab = make_slab(cuda, SlotLayout("int8", 4, 32))
    fill(slab, [1, 2, 3], 5)

    tokens, scales, rows = slab.stage([1, 2, 3])
    tokens[list(rows)], scales[list(rows)] = 77, 78
    slab.publish([3, 1], [rows[2], rows[0]])
    slab.publish([], [])

    assert_holds(gather(cuda, slab, [1, 2, 3]), [77, 25, 77])


def test_more_rows_than_the_ring_holds_are_refused(cuda):
    with pytest.raises(LimitExceeded, match="staged"):
        make_slab(cuda, SlotLayout("int8", 4, 32)).stage(range(NUM_ROWS + 1))


def test_a_slab_without_slots_pins_nothing(cuda):
    with cuda.device.current():
        copier = cuda.kernels.RowCopier(cuda.device.compute_capability)

    slab = cuda.slab.CudaSlab(cuda.device, copier, SlotLayout("int8", 4, 32), 0)

    assert slab.num_slots == 0
    assert "pagelocked_empty" not in cuda.gpu.calls


@pytest.mark.parametrize("call", ["mem_alloc", "pagelocked_empty"])
def test_memory_that_is_not_there_is_named_with_a_remedy(cuda, call):
    cuda.gpu.faults[call] = cuda.gpu.errors.MemoryError("out of memory")

    with pytest.raises(EngineUnavailable, match="ask for fewer"):
        make_slab(cuda, SlotLayout("int8", 4, 32))


def test_a_device_that_fails_while_slots_are_published_means_the_process_must_end(cuda):
    slab = make_slab(cuda, SlotLayout("int8", 4, 32))
    cuda.gpu.faults["launch"] = cuda.gpu.errors.LogicError("an illegal memory access was encountered")

    with pytest.raises(EngineBroken, match="illegal memory access"):
        fill(slab, [1], 5)


def test_uploads_that_fill_the_ring_wait_for_those_before_them(cuda):
    with cuda.device.current():
        stream = cuda.slab.cuda.Stream(cuda.context.NON_BLOCKING)
        ring = cuda.memory.UploadRing(1024, stream)
        target = cuda.memory.device_memory(100 * 40, "")
        for number in range(40):
            ring.upload(np.full(100, number, np.uint8), int(target) + 100 * number)
        stream.synchronize()

    found = cuda.gpu.view(int(target), 4000).reshape(40, 100)
    assert (found == np.arange(40)[:, None]).all()


def test_the_error_for_a_kernel_that_does_not_compile_contains_the_compilers_message(cuda):
    cuda.gpu.faults["nvrtcCompileProgram"] = 6

    with pytest.raises(EngineUnavailable, match="no such type"):
        make_slab(cuda, SlotLayout("int8", 4, 32))


def test_a_compiler_that_does_not_know_the_gpu_is_named(cuda):
    cuda.gpu.faults["nvrtcCreateProgram"] = 5

    with pytest.raises(EngineUnavailable, match="NVRTC_ERROR_INVALID_OPTION"):
        make_slab(cuda, SlotLayout("int8", 4, 32))


def test_contexts_are_current_for_as_long_as_a_call_and_nest(cuda):
    with cuda.device.current():
        with cuda.device.current():
            assert len(cuda.gpu.pushed.contexts) == 2
        assert len(cuda.gpu.pushed.contexts) == 1
    assert cuda.gpu.pushed.contexts == []


@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.integers(7, 9))
def test_a_ring_gives_adjacent_rows_and_the_events_of_those_still_read(counts, num_rows):
    ring, read = StagingRing[int](num_rows), {}

    for event, count in enumerate(counts):
        rows, events = ring.take(count)
        assert len(rows) == count
        assert 0 <= rows.start <= rows.stop <= num_rows
        assert {read.pop(row) for row in rows if row in read} <= set(events) | {None}
        for row in [row for row, other in read.items() if other in events]:
            read[row] = None  # its event has passed
        ring.hold(rows, event)
        read.update(dict.fromkeys(rows, event))


@given(st.sets(st.integers(0, 40)))
def test_adjacent_rows_share_a_range(rows):
    found = adjacent(list(rows))

    assert [row for each in found for row in each] == sorted(rows)
    assert all(one.stop < other.start for one, other in itertools.pairwise(found))
