"""The slot table against a plain model: pinned images stay, the least recently used one goes, counts add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.rerank.slots import NO_SLOT, SlotTable

NUM_SLOTS = 4
KEYS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3, unique=True)


def slots_of(*slots: int) -> np.ndarray:
    return np.array(slots, np.int32)


def filled(num_slots: int, keys: str) -> SlotTable:
    """A table with these images, the first one used longest ago, none of them pinned."""
    table = SlotTable(num_slots)
    for key in keys:
        table.unpin(table.reserve([key]))
    return table


def absent(table: SlotTable, keys: str) -> list[str]:
    return [key for key, slot in zip(keys, table.pin_present(list(keys)).tolist(), strict=True) if slot == NO_SLOT]


def test_a_table_needs_a_slot():
    with pytest.raises(ValueError, match="at least one slot"):
        SlotTable(0)


def test_the_least_recently_used_image_goes_first():
    table = filled(3, "abc")
    table.unpin(table.pin_present(["a"]))

    table.reserve(["d"])

    assert absent(table, "abcd") == ["b"]
    assert table.num_evicted == 1


def test_a_pinned_image_stays_however_old_it_is():
    table = filled(2, "ab")
    table.pin_present(["a"])

    table.reserve(["c"])

    assert absent(table, "ab") == ["b"]


def test_more_than_is_available_is_refused_and_changes_nothing():
    table = filled(2, "ab")
    table.pin_present(["a"])

    with pytest.raises(IndexError, match="2 slots wanted, 1 available"):
        table.reserve(["c", "d"])

    assert absent(table, "abc") == ["c"]


def test_a_reserved_image_has_its_slot_at_once():
    table = SlotTable(2)
    slots = table.reserve(["a"])

    assert table.pin_present(["a"]).tolist() == slots.tolist()


def test_a_discarded_image_is_absent_at_once_and_its_slot_free_after_the_last_unpin():
    table = SlotTable(1)
    slots = table.reserve(["a"])
    table.pin_present(["a"])

    table.discard("a")
    table.discard("never seen")
    assert absent(table, "a") == ["a"]
    table.unpin(slots)
    assert table.num_available() == 0
    table.unpin(slots)

    assert table.num_available() == 1
    assert table.reserve(["b"]).tolist() == slots.tolist()
    assert table.num_evicted == 0


def test_an_image_is_discarded_from_one_slot_and_not_from_its_next_one():
    table = SlotTable(2)
    [old] = table.reserve(["a"]).tolist()
    table.discard("a")
    [new] = table.reserve(["a"]).tolist()

    table.discard("a", old)

    assert "a" in table
    table.discard("a", new)
    assert "a" not in table


def test_all_images_are_discarded_at_once_and_pinned_slots_stay_until_they_are_unpinned():
    table = filled(3, "abc")
    pinned = table.pin_present(["b"])

    table.discard_all()
    assert len(table) == 0
    assert table.num_available() == 2
    taken = table.reserve(["d", "e"])
    assert set(taken.tolist()) == {0, 1, 2} - set(pinned.tolist())
    table.unpin(pinned)

    assert table.reserve(["f"]).tolist() == pinned.tolist()
    assert table.num_evicted == 0


class SlotTableAgainstAModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(NUM_SLOTS)
        self.slot_of: dict[str, int] = {}  # oldest use first
        self.pins: list[int] = []  # one entry per pin
        self.num_evicted = 0

    def touch(self, key: str) -> None:
        self.slot_of[key] = self.slot_of.pop(key)

    @rule(keys=KEYS)
    def pin(self, keys):
        slots = self.table.pin_present(keys).tolist()
        assert slots == [self.slot_of.get(key, NO_SLOT) for key in keys]
        for key in keys:
            if key in self.slot_of:
                self.touch(key)
        self.pins += [slot for slot in slots if slot != NO_SLOT]

    @rule(keys=KEYS)
    def reserve(self, keys):
        keys = [key for key in keys if key not in self.slot_of]
        if len(keys) > self.table.num_available():
            with pytest.raises(IndexError):
                self.table.reserve(keys)
            return
        for key, slot in zip(keys, self.table.reserve(keys).tolist(), strict=True):
            assert slot not in self.pins
            evicted = [other for other, taken in self.slot_of.items() if taken == slot]
            if evicted:
                assert evicted == [other for other, taken in self.slot_of.items() if taken not in self.pins][:1]
                del self.slot_of[evicted[0]]
                self.num_evicted += 1
            self.slot_of[key] = slot
            self.pins.append(slot)
        # Pinned images on the way of an eviction count as used then; which ones is up to the table.
        self.slot_of = {key: self.slot_of[key] for key in self.table._slots}

    @rule(keys=KEYS)
    def discard(self, keys):
        for key in keys:
            self.table.discard(key)
            self.slot_of.pop(key, None)

    @rule()
    def discard_all(self):
        self.table.discard_all()
        self.slot_of.clear()

    @rule(data=st.data())
    def unpin(self, data):
        if self.pins:
            slots = data.draw(st.lists(st.sampled_from(self.pins), min_size=1, unique=True))
            for slot in slots:
                self.pins.remove(slot)
            self.table.unpin(slots_of(*slots))

    @invariant()
    def counts_add_up(self):
        assert len(self.table) == len(self.slot_of)
        assert len(set(self.slot_of.values())) == len(self.slot_of), "two images in one slot"
        assert self.table.num_available() == NUM_SLOTS - len(set(self.pins))
        assert self.table.num_evicted == self.num_evicted


TestSlotTableAgainstAModel = SlotTableAgainstAModel.TestCase
TestSlotTableAgainstAModel.settings = settings(max_examples=60, stateful_step_count=40)
