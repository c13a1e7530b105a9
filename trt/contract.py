"""The contract of every engine: encode images, encode queries, score pairs.

Knows shapes, limits and errors; knows nothing of torch, TensorRT, Kafka or Redis.
Calls are synchronous: one at a time, on a thread that the engine's owner chooses. Only the slab may be filled from
another thread at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NewType, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

#: The result of `encode_queries`, passed to `score_pairs` of the same engine; only that engine reads it.
QueryStates = NewType("QueryStates", object)


class EngineError(Exception):
    """Root of the errors that an engine raises; any other exception is a bug."""


class LimitExceeded(EngineError):
    """The call has more pairs, a longer text or a higher slot number than the engine accepts."""


class EngineBroken(EngineError):
    """The device or the engine does not recover (out of memory, sticky error): end the process."""


class EngineUnavailable(EngineError):
    """The requested runtime or device is missing here; the message says what to install or to change."""


class EngineMismatch(EngineError):
    """Checkpoint, engine file and runtime do not fit together; the message says what to rebuild."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Identity and limits of an engine; read once, after loading."""

    runtime: str  # "torch", "tensorrt", "onnx" or "constant"
    model_digest: str  # of the checkpoint: content, not file names
    engine_digest: str  # of what computes the scores: checkpoint, runtime, precision, device
    num_visual_tokens: int  # m
    token_dim: int  # d_lang
    storage: str  # how the slab holds tokens: "fp16", "bf16", "int8" or "int4"
    image_size: int  # pixels are (3, image_size, image_size)
    max_text_tokens: int  # [CLS] and [SEP] of the caption included
    max_images: int  # in one `encode_images`
    max_pairs: int  # in one `score_pairs`
    num_slots: int  # of the token slab; 0 for an engine that only encodes images
    resample: Literal["bilinear", "bicubic"] = "bilinear"  # how images are resized to `image_size`


class TokenSlab(Protocol):
    """Fixed-size slots of stored tokens on the engine's own device.

    One thread fills slots while another scores. The owner does not write a slot while a pair that reads it is scored.
    """

    def stage(self, slots: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[int]]:
        """Return host memory to decode blobs into.

        Returns `(tokens, scales, rows)`: byte arrays `(n, token bytes)` and `(n, scale bytes)`, and for each slot the
        row of both arrays to write. On a CPU the rows are the slots themselves, elsewhere rows of a staging buffer.
        """
        ...

    def publish(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Make the staged rows the content of the slots for every later `score_pairs`."""
        ...


class ImageEncoder(Protocol):
    """The offline half: pixels to visual tokens."""

    @property
    def info(self) -> EngineInfo: ...

    def warm_up(self) -> None:
        """Run and capture every size that a call can have: afterwards no call compiles or captures."""
        ...

    def encode_images(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`(n, 3, size, size)` RGB bytes -> visual tokens `(n, m, d)` and the tower's pooled embedding `(n, e)`.

        Raises `LimitExceeded` for more than `max_images`.
        """
        ...


class PairScorer(Protocol):
    """The online half: queries and slots to logits."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def slab(self) -> TokenSlab: ...

    def warm_up(self) -> None:
        """Run and capture every size that a call can have: afterwards no call compiles or captures."""
        ...

    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> QueryStates:
        """Compute the part of the score that depends on the text alone, once per query; ids include [CLS] and [SEP].

        Raises `LimitExceeded` for a text longer than `max_text_tokens`.
        """
        ...

    def score_pairs(
        self,
        queries: QueryStates,
        pair_query: NDArray[np.int32],
        pair_slot: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Return one logit per pair. Pair i is query number `pair_query[i]` with the image in slot `pair_slot[i]`.

        Raises `LimitExceeded` for more than `max_pairs` or a slot the slab does not have.
        """
        ...


@dataclass(frozen=True, slots=True)
class DeviceCopies:
    """Time that one call spent on copies between host and device."""

    to_device_s: float
    to_host_s: float


@runtime_checkable
class ReportsCopies(Protocol):
    """A scorer that times its copies; called on the thread that scores, after each call."""

    def last_copies(self) -> DeviceCopies | None:
        """The copies of the last `score_pairs`; None where host and device share memory."""
        ...


@dataclass(frozen=True, slots=True)
class GraphCounts:
    """Number of batch sizes with a captured CUDA graph, and of those without."""

    captured: int
    uncaptured: int


@runtime_checkable
class ReportsGraphs(Protocol):
    """A scorer that captures CUDA graphs when it warms up."""

    def graph_counts(self) -> GraphCounts | None:
        """Return the counts so far; None on a device without graphs."""
        ...


@runtime_checkable
class ExplainsPairs(Protocol):
    """A scorer that can return the similarities behind a late interaction."""

    def can_explain(self) -> bool:
        """Whether the loaded model has a late interaction."""
        ...

    def token_similarities(
        self, text_ids: Sequence[Sequence[int]], pair_query: NDArray[np.int32], pair_slot: NDArray[np.int32]
    ) -> list[NDArray[np.float32]]:
        """Return for each pair the cosines of its text tokens with its visual tokens, `(text tokens, m)`.

        Raises `LimitExceeded` like `score_pairs`.
        """
        ...


class Engine(ImageEncoder, PairScorer, Protocol):
    """Both halves over one checkpoint."""


def check_images(info: EngineInfo, pixels: NDArray[Any]) -> None:
    """Raise `LimitExceeded` unless the pixels are a batch of images of this engine's size."""
    expected = (3, info.image_size, info.image_size)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
        raise LimitExceeded(
            f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 (n, {', '.join(map(str, expected))})"
        )
    if len(pixels) > info.max_images:
        raise LimitExceeded(f"{len(pixels)} images in one call; this engine takes {info.max_images}")


def check_texts(info: EngineInfo, text_ids: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise `LimitExceeded` for texts that the model has no positions or no embedding for."""
    for ids in text_ids:
        if not 0 < len(ids) <= info.max_text_tokens:
            raise LimitExceeded(f"a text of {len(ids)} tokens; this engine takes 1 to {info.max_text_tokens}")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise LimitExceeded(f"a text has a token outside 0..{vocab_size - 1}")


def check_pairs(
    info: EngineInfo,
    pair_query: NDArray[Any],
    pair_slot: NDArray[Any],
    num_queries: int,
) -> None:
    """Raise `LimitExceeded` for pairs outside the slab or the queries; every runtime calls it."""
    if len(pair_query) != len(pair_slot):
        raise LimitExceeded(f"{len(pair_query)} query numbers for {len(pair_slot)} slots")
    if len(pair_query) > info.max_pairs:
        raise LimitExceeded(f"{len(pair_query)} pairs in one call; this engine takes {info.max_pairs}")
    if len(pair_query) == 0:
        return
    if pair_query.min() < 0 or pair_query.max() >= num_queries:
        raise LimitExceeded(f"a pair names a query outside 0..{num_queries - 1}")
    if pair_slot.min() < 0 or pair_slot.max() >= info.num_slots:
        raise LimitExceeded(f"a pair names a slot outside 0..{info.num_slots - 1}")
