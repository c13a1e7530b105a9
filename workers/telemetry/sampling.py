"""Decides which traces are recorded, by the rules of the SDK's six samplers.

Every message needs the decision, so it must be cheap; the SDK's takes as long as reading the headers
(docs/LOG.md). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

SamplerName = Literal[
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
]
_PARENT_BASED: Final = "parentbased_"
_ID_RANGE: Final = 1 << 64  # a ratio looks at the lower half of a trace's id, as the SDK's sampler does


@dataclass(frozen=True, slots=True)
class Sampling:
    """The rule of one sampler."""

    follows_parents: bool  # the producer's decision takes precedence
    bound: int  # ids below it are recorded

    @classmethod
    def named(cls, name: SamplerName, ratio: float) -> Sampling:
        """Return the rule for a sampler's name; `ratio` is used by the two ratio samplers."""
        share = {"always_on": 1.0, "always_off": 0.0}.get(name.removeprefix(_PARENT_BASED), ratio)
        return cls(name.startswith(_PARENT_BASED), round(share * _ID_RANGE))

    def takes(self, trace_id: int, *, parent_is_sampled: bool | None) -> bool:
        """Whether to record the trace; `parent_is_sampled` is None for a trace that begins here."""
        if self.follows_parents and parent_is_sampled is not None:
            return parent_is_sampled
        return trace_id % _ID_RANGE < self.bound
