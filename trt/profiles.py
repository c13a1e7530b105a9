"""Optimisation profiles: the ranges of sizes for which a plan is tuned, and the choice of a profile for a call.

A plan has one set of kernels for each profile, so several narrow profiles are faster than one wide profile. Texts are
padded to a length bucket, and pairs to one of a few sizes. Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trt.contract import LimitExceeded
from trt.graphs import IMAGES, PAIRS, QUERIES, TEXT_TOKENS, GraphName

#: There are profiles for the largest call, for a quarter and for a sixteenth of its size.
_STEP = 4
_NUM_STEPS = 3
#: Usual number of requests in a micro-batch.
_USUAL_QUERIES = 8

Size = Annotated[int, Field(ge=1)]


class Range(BaseModel):
    """The sizes of a dimension that a profile accepts, and the size it is tuned for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Size
    opt: Size
    max: Size

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"a range needs min <= opt <= max, not {self.min}, {self.opt}, {self.max}")
        return self

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


class Profile(BaseModel):
    """A range for every named dimension of a graph. `name` describes it: "text 17-32, pairs 65-256"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    ranges: dict[str, Range]

    def takes(self, sizes: Mapping[str, int]) -> bool:
        """Whether a call of these sizes fits; `sizes` names every dimension of the profile."""
        return all(sizes[name] in span for name, span in self.ranges.items())

    def sizes(self, which: str) -> dict[str, int]:
        """Every dimension at its "min", "opt" or "max"."""
        return {name: getattr(span, which) for name, span in self.ranges.items()}


def narrowest_profile(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Return the index of the narrowest profile that accepts a call of these sizes.

    Raises `LimitExceeded`; the message names the requested and the largest sizes.
    """
    fitting = [number for number, profile in enumerate(profiles) if profile.takes(sizes)]
    if not fitting:
        largest = {name: max(profile.ranges[name].max for profile in profiles) for name in profiles[0].ranges}
        raise LimitExceeded(
            f"no profile of this engine accepts {_described(sizes)}; the largest is {_described(largest)}: "
            "send less in one call, or rebuild the engine for larger calls"
        )
    return min(fitting, key=lambda number: math.prod(profiles[number].sizes("max").values()))


def profiles_of(
    *, max_text_tokens: int, length_buckets: Sequence[int], max_pairs: int, max_queries: int, max_images: int
) -> dict[GraphName, tuple[Profile, ...]]:
    """Return the profiles of the three graphs.

    `length_buckets` are upper ends. Ends above `max_text_tokens` are dropped, and `max_text_tokens` is always the last
    end, so that an engine accepts every text that its model accepts. Images, queries and pairs have up to three ranges
    each; the last range ends at the largest number. The number of queries in a call of pairs has one wide range.
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
    """Return adjacent ranges from 1 to the largest end, each tuned for its largest size."""
    ordered = sorted({end for end in ends if end > 0})
    starts = [1, *(end + 1 for end in ordered[:-1])]
    return [Range(min=start, opt=end, max=end) for start, end in zip(starts, ordered, strict=True)]


def _described(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} {name.replace('_', ' ')}" for name, size in sizes.items())
