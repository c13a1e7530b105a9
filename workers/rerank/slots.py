"""The bookkeeping of the token slab: which image lies in which slot, what is in use, what goes next.

Pure: the memory belongs to the engine, and whether a blob has arrived in its slot is for the one who fills it to know.
A slot is *pinned* from its reservation on while a pair that needs it is in work, and otherwise free to be taken for
another image, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class SlotTable:
    """Image key to slot number, with pins and least-recently-used eviction."""

    def __init__(self, num_slots: int) -> None:
        if num_slots <= 0:
            raise ValueError("a token slab needs at least one slot")
        self.num_slots = num_slots
        self.num_evicted = 0
        self._slots: OrderedDict[str, int] = OrderedDict()  # oldest use first
        self._free = list(range(num_slots - 1, -1, -1))
        self._pins = [0] * num_slots
        self._num_pinned = 0
        self._orphans: set[int] = set()  # discarded while pinned: free as soon as the last pin goes

    def __len__(self) -> int:
        return len(self._slots)

    def num_available(self) -> int:
        """Slots that a new image could have now: the free ones and those that nothing in work needs."""
        return self.num_slots - self._num_pinned

    def pin_present(self, keys: Sequence[str]) -> tuple[list[int | None], list[str]]:
        """Pin every key that has a slot; returns a slot or None per key, and the keys without.

        Keys are distinct. What is pinned stays until `unpin`.
        """
        slots, absent = [], []
        table, pins = self._slots, self._pins
        for key in keys:
            slot = table.get(key)
            slots.append(slot)
            if slot is None:
                absent.append(key)
                continue
            table.move_to_end(key)
            if pins[slot] == 0:
                self._num_pinned += 1
            pins[slot] += 1
        return slots, absent

    def reserve(self, keys: Sequence[str]) -> list[int]:
        """Give each key (none of which has a slot) a pinned slot, evicting where needed.

        Raises `IndexError` when fewer than `len(keys)` slots are available; ask `num_available` first.
        """
        if len(keys) > self.num_available():
            raise IndexError(f"{len(keys)} slots wanted, {self.num_available()} available")
        slots = []
        for key in keys:
            slot = self._free.pop() if self._free else self._evict()
            self._slots[key] = slot
            self._pins[slot] = 1
            self._num_pinned += 1
            slots.append(slot)
        return slots

    def _evict(self) -> int:
        """Free the least recently used slot without a pin; pinned ones met on the way count as used now."""
        while True:
            key, slot = self._slots.popitem(last=False)
            if self._pins[slot] == 0:
                self.num_evicted += 1
                return slot
            self._slots[key] = slot

    def discard(self, keys: Iterable[str]) -> None:
        """These images are not to be had: their slots are free again once nobody pins them.

        The slots leave the table at once, so that the next request asks the store again.
        """
        for key in keys:
            slot = self._slots.pop(key, None)
            if slot is not None and self._pins[slot] == 0:
                self._free.append(slot)
            elif slot is not None:
                self._orphans.add(slot)

    def unpin(self, slots: Iterable[int]) -> None:
        """Take back one pin of each slot."""
        pins = self._pins
        for slot in slots:
            pins[slot] -= 1
            if pins[slot] == 0:
                self._num_pinned -= 1
                if slot in self._orphans:
                    self._orphans.remove(slot)
                    self._free.append(slot)
