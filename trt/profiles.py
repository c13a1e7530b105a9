"""Optimisation profiles: the ranges of sizes that a plan is tuned for, and which of them a call takes.

A plan has one set of kernels for each profile, so several narrow ones beat one wide one: texts are padded to a length
bucket, and pairs come in a few sizes. Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trt.contract import LimitExceeded
from trt.graphs import IMAGES, PAIRS, QUERIES, TEXT_TOKENS, GraphName

#: A call a quarter as large is worth kernels of its own; so is one a sixteenth as large.
_STEP = 4
_NUM_STEPS = 3
#: Requests whose pairs share a micro-batch, as a rule.
_USUAL_QUERIES = 8

Size = Annotated[int, Field(ge=1)]


class Range(BaseModel):
    """The sizes of a dimension that a profile takes, and the one it is tuned for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Size
    opt: Size
    max: Size

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"a range goes from min over opt to max, not {self.min}, {self.opt}, {self.max}")
        return self

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


class Profile(BaseModel):
    """A range for every named dimension of a graph. `name` says for whom: "text 17-32, pairs 65-256"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    ranges: dict[str, Range]

    def takes(self, sizes: Mapping[str, int]) -> bool:
        """Whether a call of these sizes fits; `sizes` names every dimension of the profile."""
        return all(sizes[name] in span for name, span in self.ranges.items())

    def sizes(self, which: str) -> dict[str, int]:
        """Every dimension at its "min", "opt" or "max"."""
        return {name: getattr(span, which) for name, span in self.ranges.items()}


def pick(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """The number of the narrowest profile that takes a call of these sizes.

    Raises `LimitExceeded` with the sizes asked for and the largest there are.
    """
    fitting = [number for number, profile in enumerate(profiles) if profile.takes(sizes)]
    if not fitting:
        largest = {name: max(profile.ranges[name].max for profile in profiles) for name in profiles[0].ranges}
        raise LimitExceeded(
            f"no profile of this engine takes {_said(sizes)}; they go up to {_said(largest)}: "
            "send less at once, or build the engine anew for more"
        )
    return min(fitting, key=lambda number: math.prod(profiles[number].sizes("max").values()))


def profiles_of(
    *, max_text_tokens: int, length_buckets: Sequence[int], max_pairs: int, max_queries: int, max_images: int
) -> dict[GraphName, tuple[Profile, ...]]:
    """The profiles of the three graphs.

    Length buckets are upper ends. One that reaches past `max_text_tokens` is cut there, and the last one always ends
    there: an engine takes every text that its model takes. Images, queries and pairs come in up to three steps each,
    the last of which ends at the largest number; how many queries a call of pairs has is of no weight.
    """
    lengths = _spans([*(bucket for bucket in length_buckets if bucket < max_text_tokens), max_text_tokens])
    images, queries, pairs = map(_steps, (max_images, max_queries, max_pairs))
    any_queries = Range(min=1, opt=min(_USUAL_QUERIES, max_queries), max=max_queries)
    return {
        "image": tuple(Profile(name=f"images {span.min}-{span.max}", ranges={IMAGES: span}) for span in images),
        "query": tuple(
            Profile(
                name=f"text {length.min}-{length.max}, queries {span.min}-{span.max}",
                ranges={QUERIES: span, TEXT_TOKENS: length},
            )
            for length in lengths
            for span in queries
        ),
        "pair": tuple(
            Profile(
                name=f"text {length.min}-{length.max}, pairs {span.min}-{span.max}",
                ranges={QUERIES: any_queries, TEXT_TOKENS: length, PAIRS: span},
            )
            for length in lengths
            for span in pairs
        ),
    }


def _steps(largest: int) -> list[Range]:
    return _spans([largest // _STEP**power for power in range(_NUM_STEPS)])


def _spans(ends: Sequence[int]) -> list[Range]:
    """Ranges side by side from 1 to the largest end, each tuned for its largest size."""
    ordered = sorted({end for end in ends if end > 0})
    starts = [1, *(end + 1 for end in ordered[:-1])]
    return [Range(min=start, opt=end, max=end) for start, end in zip(starts, ordered, strict=True)]


def _said(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} {name.replace('_', ' ')}" for name, size in sizes.items())
