"""One graph of an engine at the few sizes at which it runs, with a context and a CUDA graph for each size.

Contexts and CUDA graphs are created when first needed. Each CUDA graph needs its own context, because a context keeps
state that depends on the size (NVIDIA's developer guide, "CUDA Graphs"). Contexts share their scratch memory, because
the stream runs one at a time. All calls need the device to be current. Knows nothing of queries and pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pycuda.driver as cuda

from trt.cuda.graphs import ReplayedWork
from trt.cuda.memory import device_memory
from trt.graphs import GraphSpec
from trt.profiles import Profile, narrowest_profile
from trt.runtimes.static_shapes import Buckets
from trt.runtimes.tensorrt_plan import Plan

_NO_MEMORY = "no memory for the plans' inputs and outputs: ask for fewer slots, or build for fewer pairs or images"


class Stage:
    """A graph with memory for every tensor, at addresses that never change."""

    def __init__(
        self,
        spec: GraphSpec,
        plan: Plan,
        profiles: Sequence[Profile],
        *,
        largest: Mapping[str, int],
        scratch: cuda.DeviceAllocation,
        stream: cuda.Stream,
    ) -> None:
        """`largest` has the largest size of every dimension; all stages of the stream share `scratch`.

        Raises `EngineUnavailable` if the tensors do not fit in memory.
        """
        self._spec = spec
        self._plan = plan
        self._profiles = profiles
        self._memory = {
            each.name: device_memory(each.num_bytes(largest), _NO_MEMORY) for each in (*spec.inputs, *spec.outputs)
        }
        self._scratch = scratch
        self._stream = stream
        self._works: dict[tuple[int, ...], ReplayedWork] = {}

    def address(self, name: str) -> int:
        """Return the address of a tensor; at every size its values start there and have no gaps."""
        return int(self._memory[name])

    def work(self, sizes: Mapping[str, int], before: Callable[[], None] | None = None) -> ReplayedWork:
        """Return the work of a run at these sizes, which must include every dimension of the graph.

        `before` enqueues work ahead of the plan; it must be the same in every call with the same sizes.
        """
        key = tuple(sizes[name] for name in self._spec.dimensions)
        if key not in self._works:
            self._works[key] = self._make(sizes, before)
        return self._works[key]

    @property
    def num_sizes(self) -> int:
        """Number of prepared sizes."""
        return len(self._works)

    @property
    def num_uncaptured(self) -> int:
        """Number of sizes that run kernel by kernel because they could not be captured."""
        return sum(not work.is_captured for work in self._works.values())

    def _make(self, sizes: Mapping[str, int], before: Callable[[], None] | None) -> ReplayedWork:
        shapes = {each.name: each.sized(sizes) for each in self._spec.inputs}
        addresses = {name: int(memory) for name, memory in self._memory.items()}
        stream = int(self._stream.handle)
        context = self._plan.context(
            narrowest_profile(self._profiles, sizes), shapes, addresses, int(self._scratch), stream
        )

        def enqueue() -> None:
            if before is not None:
                before()
            context.enqueue(stream)

        size = ", ".join(f"{sizes[name]} {name.replace('_', ' ')}" for name in self._spec.dimensions)
        return ReplayedWork(f"{self._spec.name} at {size}", enqueue, self._stream)


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of the three graphs, and the sizes at which they run."""

    image: Stage
    query: Stage
    pair: Stage
    images: Buckets
    queries: Buckets  # of the query graph; the pair graph always uses the largest size
    text_tokens: Buckets
    pairs: Buckets
