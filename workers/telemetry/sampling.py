"""Which traces are recorded: the SDK's six samplers by their names, decided without its objects.

Every message is asked about, sampled or not, so that the answer has to cost next to nothing; theirs takes as long as
reading the headers (docs/LOG.md). Pure.
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
    """What decides about a trace."""

    follows_parents: bool  # the producer's say goes before ours
    bound: int  # ids below it are recorded

    @classmethod
    def named(cls, name: SamplerName, ratio: float) -> Sampling:
        """By OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG; `ratio` counts where the name says so."""
        share = {"always_on": 1.0, "always_off": 0.0}.get(name.removeprefix(_PARENT_BASED), ratio)
        return cls(name.startswith(_PARENT_BASED), round(share * _ID_RANGE))

    def takes(self, trace_id: int, *, parent_is_sampled: bool | None) -> bool:
        """Whether to record the trace; `parent_is_sampled` is None where nobody else has begun it."""
        if self.follows_parents and parent_is_sampled is not None:
            return parent_is_sampled
        return trace_id % _ID_RANGE < self.bound
