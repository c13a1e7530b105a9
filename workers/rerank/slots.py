"""Keeps track of the token slab's slots: the slot of each image, pins, and eviction.

Pure: the engine holds the memory, and `loading` knows whether a blob has arrived in its slot. A slot is
*pinned* from its reservation until no pair in work needs it; an unpinned slot can be given to another image, least
recently used first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

#: The value of an image without a slot in an array of slots.
NO_SLOT = -1


class SlotTable:
    """Maps image keys to slot numbers."""

    def __init__(self, num_slots: int) -> None:
        if num_slots <= 0:
            raise ValueError("a token slab needs at least one slot")
        self.num_slots = num_slots
        self.num_evicted = 0
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._free = list(range(num_slots - 1, -1, -1))
        self._pins = np.zeros(num_slots, np.int32)
        self._num_pinned = 0
        self._orphans: set[int] = set()  # discarded while pinned: free after the last unpin
        self._discarded_tables: list[
            OrderedDict[str, int]
        ] = []  # tables dropped by `discard_all`: their unpinned slots are free

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def slot_of(self, key: str) -> int:
        """Return the slot of an image, or `NO_SLOT`; it does not count as used."""
        return self._slots.get(key, NO_SLOT)

    def num_available(self) -> int:
        """Return the number of slots that new images can take."""
        return self.num_slots - self._num_pinned

    def pin_present(self, keys: Sequence[str]) -> NDArray[np.int32]:
        """Pin the slot of every key that has one; return the slot of each key, or `NO_SLOT`. Keys are distinct."""
        table = self._slots
        slots = np.fromiter(map(table.get, keys, repeat(NO_SLOT)), np.int32, len(keys))
        present = slots
        if len(slots) and slots.min() < 0:
            present = slots[slots >= 0]
            keys = [key for key in keys if key in table]
        deque(map(table.move_to_end, keys), maxlen=0)
        self._num_pinned += int(np.count_nonzero(self._pins[present] == 0))
        self._pins[present] += 1
        return slots

    def reserve(self, keys: Sequence[str]) -> NDArray[np.int32]:
        """Give each key a pinned slot, evicting others if necessary. The keys are distinct and have no slot.

        Raises `IndexError` if fewer slots are available than keys.
        """
        if len(keys) > self.num_available():
            raise IndexError(f"{len(keys)} slots wanted, {self.num_available()} available")
        slots = np.fromiter((self._take_slot() for _ in keys), np.int32, len(keys))
        self._slots.update(zip(keys, slots.tolist(), strict=True))
        self._pins[slots] = 1
        self._num_pinned += len(keys)
        return slots

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        while self._discarded_tables:
            table = self._discarded_tables[-1]
            while table:
                slot = table.popitem()[1]
                if self._pins[slot] == 0:
                    return slot
                self._orphans.add(slot)
            self._discarded_tables.pop()
        return self._evict()

    def _evict(self) -> int:
        """Free the least recently used unpinned slot; pinned slots found before it become the most recently used."""
        while True:
            key, slot = self._slots.popitem(last=False)
            if self._pins[slot] == 0:
                self.num_evicted += 1
                return slot
            self._slots[key] = slot

    def discard(self, key: str, slot: int | None = None) -> None:
        """Forget the slot of an image if it has one and, with `slot`, if it is this one.

        The next lookup finds no slot. The slot is free as soon as no pair in work needs it.
        """
        found = self._slots.get(key)
        if found is None or (slot is not None and found != slot):
            return
        del self._slots[key]
        if self._pins[found] == 0:
            self._free.append(found)
        else:
            self._orphans.add(found)

    def discard_all(self) -> None:
        """Forget the slots of all images, in constant time."""
        if self._slots:
            self._discarded_tables.append(self._slots)
            self._slots = OrderedDict()

    def unpin(self, slots: NDArray[np.int32]) -> None:
        """Remove one pin from each of these distinct slots."""
        self._pins[slots] -= 1
        unpinned = slots[self._pins[slots] == 0]
        self._num_pinned -= len(unpinned)
        if self._orphans:
            freed = self._orphans.intersection(unpinned.tolist())
            self._orphans -= freed
            self._free += freed
