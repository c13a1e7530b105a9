"""The torch slab on a device, with a fill stream that runs no work until the host synchronises."""

import numpy as np
import pytest
import torch

from torch_recorder import LazyStream
from trt.contract import LimitExceeded
from trt.slab.layout import STORAGES, SlotLayout
from trt.slab.torch_slab import DeviceSlab

NUM_SLOTS, NUM_ROWS = 12, 8


@pytest.fixture(params=STORAGES)
def slab(request):
    return DeviceSlab(SlotLayout(request.param, 4, 32), NUM_SLOTS, torch.device("cpu"), LazyStream(), NUM_ROWS)


def fill(slab, slots, value):
    tokens, scales, rows = slab.stage(slots)
    for row, slot in zip(rows, slots, strict=True):
        tokens[row], scales[row] = slot * 10 + value, slot * 10 + value + 1
    slab.publish(slots, rows)


def gathered(slab, slots):
    slab.wait_for_published()
    tokens, scales = slab.gather(torch.tensor(slots))
    assert all((row == row[0]).all() for row in tokens)
    return [int(row[0]) for row in tokens], [int(row[0]) for row in scales if len(row)]


def test_a_gather_reads_everything_that_was_published_before(slab):
    fill(slab, [3, 7, 1], 0)
    fill(slab, [7, 0], 5)

    tokens, scales = gathered(slab, [0, 1, 3, 7, 2])

    assert tokens == [5, 10, 30, 75, 0]
    assert scales == ([6, 11, 31, 76, 0] if slab.layout.scale_bytes else [])


def test_publishing_copies_nothing_itself(slab):
    stream = slab._stream

    fill(slab, [3], 0)

    assert stream.num_done == 0
    assert len(stream.waiting) == 1


def test_rows_are_written_again_only_after_their_copies(slab):
    for number in range(6):  # 18 rows through a ring of 8
        fill(slab, [number, number + 1, number + 2], number)

    assert gathered(slab, range(8))[0] == [0, 11, 22, 33, 44, 55, 65, 75]


def test_unpublished_rows_leave_the_slots_alone(slab):
    fill(slab, [3], 0)
    tokens, _, rows = slab.stage([4, 5])
    tokens[list(rows)] = 99

    slab.publish([5], [rows[1]])
    slab.publish([], [])

    assert gathered(slab, [3, 4, 5])[0] == [30, 0, 99]


def test_publishing_counts_versions(slab):
    fill(slab, [3, 4], 0)
    fill(slab, [3], 1)

    assert slab.versions.tolist() == [0, 0, 0, 2, 1, *[0] * 7]


def test_more_rows_than_the_ring_has_are_refused(slab):
    with pytest.raises(LimitExceeded, match="9 slots staged in one call; this engine takes at most 8"):
        slab.stage(range(9))


def test_an_engine_without_slots_has_no_staging_rows():
    slab = DeviceSlab(SlotLayout("int8", 64, 384), 0, torch.device("cpu"), LazyStream())

    assert slab.row_tokens.nbytes == slab.row_scales.nbytes == slab.row_slots.nbytes == 0
    assert slab.stage([])[2] == range(0)


def test_slots_may_be_named_as_an_array(slab):
    slots = np.array([2, 9])
    tokens, scales, rows = slab.stage(slots)
    tokens[list(rows)], scales[list(rows)] = 7, 8

    slab.publish(slots.tolist(), list(rows))

    assert gathered(slab, [2, 9])[0] == [7, 7]
