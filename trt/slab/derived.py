"""Derived rows: values that depend on a slot's tokens alone, computed once instead of for every pair.

    match        unit vectors of the visual tokens for late interaction; one row per slot
    keys_values  keys and values of the visual tokens in every layer of a `minimal` encoder; a limited number of rows,
                 because a row is several times as large as a slot; the least recently used row is replaced

A row is computed when a pair first needs it, and again after new content of its slot was published.
Decides which rows exist and which must be computed; the memory and the computation belong to a runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.config import EdjeConfig
from trt.contract import LimitExceeded

#: float16 has an error of 2e-4 for a component of a unit vector: logits move by 1e-3 of their standard deviation, ranks
#: do not change.
MATCH_DTYPE = "float16"
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class DerivedRow:
    """Shape and type of one row."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def match_row(config: EdjeConfig) -> DerivedRow | None:
    """Return the row of a late interaction; None for an encoder without late interaction."""
    if not config.joint.match_dim:
        return None
    return DerivedRow("match", (config.adapter.num_tokens, config.joint.match_dim), MATCH_DTYPE)


def keys_values_row(config: EdjeConfig, dtype: str) -> DerivedRow | None:
    """Return the row of visual keys and values in the layers' type; None if the layers update visual tokens."""
    if config.joint.kind != "minimal":
        return None
    return DerivedRow("keys_values", (config.joint.num_layers, 2, config.adapter.num_tokens, config.joint.dim), dtype)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Rows for the slots of some pairs, and the rows that must be computed before they are read."""

    rows: NDArray[np.int32]  # (pairs,)
    new_slots: NDArray[np.int32]
    new_rows: NDArray[np.int32]


class RowTable:
    """Assigns rows to slots. Used only from the thread that scores."""

    def __init__(self, num_slots: int, num_rows: int) -> None:
        """With as many rows as slots, each slot has a fixed row; with fewer, the most recently used slots have rows."""
        self.num_rows = num_rows
        self._is_full = num_rows == num_slots
        self._row_of_slot = np.arange(num_slots, dtype=np.int32) if self._is_full else np.zeros(num_slots, np.int32)
        self._slot_of_row = np.arange(num_rows, dtype=np.int32) if self._is_full else np.full(num_rows, -1, np.int32)
        self._version_of_row = np.full(num_rows, -1, np.int64)
        self._last_use = np.zeros(num_rows, np.int64)
        self._num_calls = 0

    def assign(self, slots: NDArray[np.int32], versions: NDArray[np.uint32]) -> Assignment:
        """Assign a row to every slot; `versions` counts the publications of every slot of the slab.

        The caller computes `new_rows` before it reads them. Raises `LimitExceeded` for more different slots than rows.
        """
        wanted = np.unique(slots)
        if len(wanted) > self.num_rows:
            raise LimitExceeded(
                f"{len(wanted)} images in one step, but only {self.num_rows} derived rows: configure more rows"
            )
        rows = self._row_of_slot[wanted]
        is_current = (self._slot_of_row[rows] == wanted) & (self._version_of_row[rows] == versions[wanted])
        new_slots = wanted[~is_current]
        if not self._is_full:
            self._num_calls += 1
            self._last_use[rows[is_current]] = self._num_calls
            if len(new_slots):
                oldest = np.argpartition(self._last_use, len(new_slots) - 1)[: len(new_slots)].astype(np.int32)
                self._row_of_slot[new_slots] = oldest
                self._slot_of_row[oldest] = new_slots
                self._last_use[oldest] = self._num_calls
        new_rows = self._row_of_slot[new_slots]
        self._version_of_row[new_rows] = versions[new_slots]
        return Assignment(self._row_of_slot[slots], new_slots, new_rows)
