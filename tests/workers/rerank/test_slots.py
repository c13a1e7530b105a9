"""The slot table against a plain model: pinned images stay, the least recently used one goes, counts add up."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.rerank.slots import SlotTable

NUM_SLOTS = 4
KEYS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3, unique=True)


def filled(num_slots: int, keys: str) -> SlotTable:
    """A table in which these images lie, the first one used longest ago, none of them pinned."""
    table = SlotTable(num_slots)
    for key in keys:
        slots = table.reserve([key])
        table.unpin(slots)
    return table


def test_a_table_needs_a_slot():
    with pytest.raises(ValueError, match="at least one slot"):
        SlotTable(0)


def test_the_least_recently_used_image_goes_first():
    table = filled(3, "abc")
    used, _ = table.pin_present(["a"])
    table.unpin(used)

    table.reserve(["d"])

    assert table.pin_present(["a", "b", "c", "d"])[1] == ["b"]
    assert table.num_evicted == 1


def test_a_pinned_image_stays_however_old_it_is():
    table = filled(2, "ab")
    table.pin_present(["a"])

    table.reserve(["c"])

    assert table.pin_present(["a", "b"])[1] == ["b"]


def test_more_than_is_available_is_refused_and_changes_nothing():
    table = filled(2, "ab")
    table.pin_present(["a"])

    with pytest.raises(IndexError, match="2 slots wanted, 1 available"):
        table.reserve(["c", "d"])

    assert table.pin_present(["a", "b", "c"])[1] == ["c"]


def test_a_reserved_image_has_its_slot_at_once():
    table = SlotTable(2)
    slots = table.reserve(["a"])

    assert table.pin_present(["a"]) == (slots, [])


def test_a_discarded_image_is_absent_at_once_and_its_slot_free_after_the_last_pin():
    table = SlotTable(1)
    slots = table.reserve(["a"])
    table.pin_present(["a"])

    table.discard(["a", "never seen"])
    assert table.pin_present(["a"]) == ([None], ["a"])
    table.unpin(slots)
    assert table.num_available() == 0
    table.unpin(slots)

    assert table.num_available() == 1
    assert table.reserve(["b"]) == slots
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
        slots, absent = self.table.pin_present(keys)
        assert slots == [self.slot_of.get(key) for key in keys]
        assert absent == [key for key in keys if key not in self.slot_of]
        for key in keys:
            if key in self.slot_of:
                self.touch(key)
        self.pins += [slot for slot in slots if slot is not None]

    @rule(keys=KEYS)
    def reserve(self, keys):
        keys = [key for key in keys if key not in self.slot_of]
        if len(keys) > self.table.num_available():
            with pytest.raises(IndexError):
                self.table.reserve(keys)
            return
        for key, slot in zip(keys, self.table.reserve(keys), strict=True):
            assert slot not in self.pins
            evicted = [other for other, taken in self.slot_of.items() if taken == slot]
            if evicted:
                assert evicted == [other for other, taken in self.slot_of.items() if taken not in self.pins][:1]
                del self.slot_of[evicted[0]]
                self.num_evicted += 1
            self.slot_of[key] = slot
            self.pins.append(slot)
        # Pinned ones that an eviction meets on its way count as used then; which it meets is the table's own affair.
        self.slot_of = {key: self.slot_of[key] for key in self.table._slots}

    @rule(keys=KEYS)
    def discard(self, keys):
        self.table.discard(keys)
        for key in keys:
            self.slot_of.pop(key, None)

    @rule(data=st.data())
    def unpin(self, data):
        if self.pins:
            slot = data.draw(st.sampled_from(self.pins))
            self.pins.remove(slot)
            self.table.unpin([slot])

    @invariant()
    def counts_add_up(self):
        assert len(self.table) == len(self.slot_of)
        assert len(set(self.slot_of.values())) == len(self.slot_of), "two images in one slot"
        assert self.table.num_available() == NUM_SLOTS - len(set(self.pins))
        assert self.table.num_evicted == self.num_evicted


TestSlotTableAgainstAModel = SlotTableAgainstAModel.TestCase
TestSlotTableAgainstAModel.settings = settings(max_examples=60, stateful_step_count=40)
