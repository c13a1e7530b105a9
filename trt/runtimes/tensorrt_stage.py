"""One graph of an engine at the few sizes it is run at: a context and a CUDA graph for each, made when first needed.

A captured graph needs a context of its own, because contexts keep what depends on the size beside the device's memory
(NVIDIA's developer guide, "CUDA Graphs"); contexts share their scratch memory, since one stream runs one at a time.
Called with the device current. Knows nothing of queries and pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pycuda.driver as cuda

from trt.cuda.graphs import ReplayedWork
from trt.cuda.memory import device_memory
from trt.graphs import GraphSpec
from trt.profiles import Profile, pick
from trt.runtimes.static_shapes import Buckets
from trt.runtimes.tensorrt_plan import Plan

_NO_MEMORY = "no memory for what the plans read and write: ask for fewer slots, or build for fewer pairs or images"


class Stage:
    """Has memory for every tensor of its graph, at addresses that stay."""

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
        """`largest` is the most of every dimension, `scratch` memory that all stages of the stream share.

        Raises `EngineUnavailable` if there is no memory for the tensors.
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
        """Where a tensor lies, from its first value on and without gaps, whatever the sizes."""
        return int(self._memory[name])

    def work(self, sizes: Mapping[str, int], before: Callable[[], None] | None = None) -> ReplayedWork:
        """A run at these sizes, which name every dimension of the graph.

        `before` enqueues what comes ahead of the plan; it is the same at every call of the same sizes.
        """
        key = tuple(sizes[name] for name in self._spec.dimensions)
        if key not in self._works:
            self._works[key] = self._make(sizes, before)
        return self._works[key]

    @property
    def num_sizes(self) -> int:
        """Sizes that have been prepared."""
        return len(self._works)

    @property
    def num_uncaptured(self) -> int:
        """Sizes that are enqueued kernel by kernel, because they could not be captured."""
        return sum(not work.is_captured for work in self._works.values())

    def _make(self, sizes: Mapping[str, int], before: Callable[[], None] | None) -> ReplayedWork:
        shapes = {each.name: each.sized(sizes) for each in self._spec.inputs}
        addresses = {name: int(memory) for name, memory in self._memory.items()}
        stream = int(self._stream.handle)
        context = self._plan.context(pick(self._profiles, sizes), shapes, addresses, int(self._scratch), stream)

        def enqueue() -> None:
            if before is not None:
                before()
            context.enqueue(stream)

        said = ", ".join(f"{sizes[name]} {name.replace('_', ' ')}" for name in self._spec.dimensions)
        return ReplayedWork(f"{self._spec.name} at {said}", enqueue, self._stream)


@dataclass(frozen=True, slots=True)
class Stages:
    """The three graphs, and the sizes they are run at."""

    image: Stage
    query: Stage
    pair: Stage
    images: Buckets
    queries: Buckets  # of the query graph; the pair graph always takes the largest
    text_tokens: Buckets
    pairs: Buckets
