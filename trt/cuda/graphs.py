"""Captures work that is always the same on the same memory as a CUDA graph, and replays the graph.

Capturing uses cuda-bindings, because pycuda has no calls for it. Knows nothing of the work itself.
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
    """Repeatable work on one stream, replayed as a CUDA graph if it can be captured."""

    def __init__(self, name: str, enqueue: Callable[[], None], stream: cuda.Stream) -> None:
        """`enqueue` puts the work on the stream; each call has the same effect.

        Runs the work once and waits, because libraries initialise themselves in the first run; then captures it.
        """
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
                raise EngineBroken(f"the device failed to replay a CUDA graph: {result.name}")


def captured(enqueue: Callable[[], None], stream: cuda.Stream) -> Any:
    """Return the work that `enqueue` puts on the stream as an executable graph, without running it.

    Other threads may use the device during the capture: only this thread may not synchronise. Raises `CaptureFailed`.
    """
    handle = driver.CUstream(stream.handle)
    _checked(driver.cuStreamBeginCapture(handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    reason: Exception | None = None
    try:
        enqueue()
    except (cuda.Error, EngineError) as error:
        reason = error
    # A capture must be ended also after an error; otherwise the stream stays unusable.
    result, graph = driver.cuStreamEndCapture(handle)
    if reason is not None:
        raise CaptureFailed(str(reason)) from reason
    if result != driver.CUresult.CUDA_SUCCESS:
        raise CaptureFailed(result.name)
    executable = _checked(driver.cuGraphInstantiate(graph, 0))
    _checked(driver.cuGraphDestroy(graph))
    return executable


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return the value of a driver call. Raises `CaptureFailed` if the call failed."""
    result, *values = answer
    if result != driver.CUresult.CUDA_SUCCESS:
        raise CaptureFailed(result.name)
    return values[0] if values else None
