"""Work that is always the same on the same memory: enqueued once, captured as a CUDA graph, and replayed from then on.

Capturing goes through cuda-bindings, because pycuda has no calls for it. Knows nothing of what the work is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pycuda.driver as cuda
from cuda.bindings import driver

from trt.contract import EngineBroken, EngineError

log = logging.getLogger(__name__)


class CaptureFailed(EngineError):
    """The work cannot be captured; it can still be enqueued."""


class ReplayedWork:
    """Work on one stream: `enqueue` puts it there, as often as it is called, always to the same effect."""

    def __init__(self, name: str, enqueue: Callable[[], None], stream: cuda.Stream) -> None:
        """Runs the work once and waits, because libraries set themselves up at the first run; then captures it."""
        self._enqueue = enqueue
        self._stream = stream
        enqueue()
        stream.synchronize()
        self._graph: Any = None
        try:
            self._graph = captured(enqueue, stream)
        except CaptureFailed as error:
            log.warning("%s runs without a CUDA graph: %s", name, error)

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def launch(self) -> None:
        """Put the work on its stream. Raises `EngineBroken`."""
        if self._graph is None:
            self._enqueue()
        else:
            (result,) = driver.cuGraphLaunch(self._graph, driver.CUstream(self._stream.handle))
            if result != driver.CUresult.CUDA_SUCCESS:
                raise EngineBroken(f"the device does not replay a CUDA graph: {result.name}")


def captured(enqueue: Callable[[], None], stream: cuda.Stream) -> Any:
    """What `enqueue` puts on the stream, as an executable graph, without running it. Raises `CaptureFailed`.

    Other threads may go on meanwhile: only what this thread calls is forbidden to wait.
    """
    handle = driver.CUstream(stream.handle)
    _checked(driver.cuStreamBeginCapture(handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    reason: Exception | None = None
    try:
        enqueue()
    except (cuda.Error, EngineError) as error:
        reason = error
    # A capture has to be ended whatever came of it, or the stream can never be used again.
    result, graph = driver.cuStreamEndCapture(handle)
    if reason is not None:
        raise CaptureFailed(str(reason)) from reason
    if result != driver.CUresult.CUDA_SUCCESS:
        raise CaptureFailed(result.name)
    executable = _checked(driver.cuGraphInstantiate(graph, 0))
    _checked(driver.cuGraphDestroy(graph))
    return executable


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the driver gave besides its result."""
    result, *values = answer
    if result != driver.CUresult.CUDA_SUCCESS:
        raise CaptureFailed(result.name)
    return values[0] if values else None
