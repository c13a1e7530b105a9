"""The TensorRT runtime: implements the engine contract with three stages and a slab on one GPU.

One stream runs in order: the upload of the inputs from pinned memory, the gather of the slots, the plan, and the
download of the logits to pinned memory. The host waits once, at the end. A second stream fills the slab at the same
time. Knows the layout of a call; `trt.runtimes.tensorrt_load` opens the plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pycuda.driver as cuda
from numpy.typing import NDArray
from pycuda.tools import DeviceMemoryPool

from trt.contract import DeviceCopies, EngineInfo, GraphCounts, QueryStates, check_images, check_pairs, check_texts
from trt.cuda.context import CudaDevice, StreamEvent
from trt.cuda.copy_clock import CopyClock
from trt.cuda.graphs import ReplayedWork
from trt.cuda.memory import UploadRing, device_memory, pinned_memory
from trt.graphs import IMAGES, PAIRS, QUERIES, TEXT_TOKENS
from trt.runtimes.static_shapes import PairPiece, TextBlock, padded_texts, pair_pieces, text_blocks
from trt.runtimes.tensorrt_stage import Stages
from trt.slab.device import CudaSlab

_NO_MEMORY = "no memory for uploads and downloads: ask for fewer pairs or images in one call"
#: Size of the upload ring, as a multiple of the largest upload.
_UPLOADS_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class DeviceBlock:
    """The texts of a block on the device."""

    layout: TextBlock
    states: Any  # of the memory pool: (texts, text tokens, d)
    lengths: Any  # of the memory pool: int32 (texts,)


@dataclass(frozen=True, slots=True)
class DeviceQueries:
    """The texts of one `encode_queries`."""

    blocks: list[DeviceBlock]
    num_texts: int


class TensorRtEngine:
    """Runs the plans; a call of more pairs, texts or images than a plan accepts is split into several runs."""

    def __init__(
        self,
        info: EngineInfo,
        device: CudaDevice,
        stream: cuda.Stream,
        slab: CudaSlab,
        stages: Stages,
        *,
        vocab_size: int,
        pooled_dim: int,
        state_bytes: int,
    ) -> None:
        """`stream` is the stream of the stages; `state_bytes` is the size of one token's state."""
        self.info = info
        self.slab = slab
        self._device = device
        self._stream = stream
        self._stages = stages
        self._vocab_size = vocab_size
        self._state_bytes = state_bytes
        self._copies = CopyClock(lambda: StreamEvent(stream))
        with device.current():
            self._pool = DeviceMemoryPool()
            self._slots = device_memory(stages.pairs.largest * 4, _NO_MEMORY)
            self._logits = pinned_memory((info.max_pairs,), np.float32, _NO_MEMORY).array
            shapes = (info.num_visual_tokens, info.token_dim), (pooled_dim,)
            self._image_results = [
                pinned_memory((stages.images.largest, *shape), np.float32, _NO_MEMORY).array for shape in shapes
            ]
            largest_upload = max(
                stages.images.largest * 3 * info.image_size**2,
                stages.queries.largest * stages.text_tokens.largest * 4,
                stages.pairs.largest * 4,
            )
            self._ring = UploadRing(_UPLOADS_IN_FLIGHT * largest_upload, stream)

    def warm_up(self) -> None:
        """Run and capture every size that a call can have."""
        with self._device.current():
            for num_images in self._stages.images.sizes:
                self._stages.image.work({IMAGES: num_images})
            if self.info.num_slots == 0:
                return
            for text_tokens in self._stages.text_tokens.sizes:
                for num_queries in self._stages.queries.sizes:
                    self._stages.query.work({QUERIES: num_queries, TEXT_TOKENS: text_tokens})
                for num_pairs in self._stages.pairs.sizes:
                    self._pair_work(text_tokens, num_pairs)

    def graph_counts(self) -> GraphCounts:
        """Return the numbers of sizes with and without a CUDA graph; failed captures are logged with their reason."""
        stages = (self._stages.image, self._stages.query, self._stages.pair)
        uncaptured = sum(stage.num_uncaptured for stage in stages)
        return GraphCounts(sum(stage.num_sizes for stage in stages) - uncaptured, uncaptured)

    def encode_images(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        check_images(self.info, pixels)
        tokens, pooled = (np.empty((len(pixels), *each.shape[1:]), np.float32) for each in self._image_results)
        stage, buckets = self._stages.image, self._stages.images
        with self._device.current():
            for start in range(0, len(pixels), buckets.largest):
                piece = pixels[start : start + buckets.largest]
                self._ring.upload(piece, stage.address("pixels"))
                stage.work({IMAGES: buckets.smallest_for(len(piece))}).launch()
                for result, name in zip(self._image_results, ("tokens", "pooled"), strict=True):
                    cuda.memcpy_dtoh_async(result[: len(piece)], stage.address(name), self._stream)
                self._stream.synchronize()
                for result, target in zip(self._image_results, (tokens, pooled), strict=True):
                    target[start : start + len(piece)] = result[: len(piece)]
        return tokens, pooled

    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> QueryStates:
        """Enqueue the encoding and return without waiting: later work on the same stream reads the states."""
        check_texts(self.info, text_ids, self._vocab_size)
        lengths = np.array([len(ids) for ids in text_ids], np.int64)
        blocks = text_blocks(lengths, self._stages.text_tokens, self._stages.queries.largest)
        with self._device.current():
            encoded = [self._encode(block, text_ids) for block in blocks]
        return QueryStates(DeviceQueries(encoded, len(text_ids)))

    def _encode(self, block: TextBlock, text_ids: Sequence[Sequence[int]]) -> DeviceBlock:
        stage, num_texts = self._stages.query, len(block.texts)
        num_rows = self._stages.queries.smallest_for(num_texts)
        ids, lengths = padded_texts(text_ids, block, num_rows)
        self._ring.upload(ids, stage.address("text_ids"))
        self._ring.upload(lengths, stage.address("text_lengths"))
        stage.work({QUERIES: num_rows, TEXT_TOKENS: block.text_tokens}).launch()
        states = self._copied(stage.address("states"), num_texts * block.text_tokens * self._state_bytes)
        return DeviceBlock(block, states, self._copied(stage.address("text_lengths"), num_texts * 4))

    def _copied(self, address: int, num_bytes: int) -> Any:
        """Return a copy of device memory; the copy returns to the pool when its last reference is gone.

        The pool may reuse it at once, because all reads and writes are on one stream.
        """
        memory = self._pool.allocate(num_bytes)
        cuda.memcpy_dtod_async(int(memory), address, num_bytes, self._stream)
        return memory

    def score_pairs(
        self,
        queries: QueryStates,
        pair_query: NDArray[np.int32],
        pair_slot: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        encoded = cast(DeviceQueries, queries)
        check_pairs(self.info, pair_query, pair_slot, encoded.num_texts)
        logits = np.empty(len(pair_query), np.float32)
        layouts = [block.layout for block in encoded.blocks]
        pieces = list(pair_pieces(layouts, encoded.num_texts, pair_query, self._stages.pairs.largest))
        with self._device.current():
            self._copies.start()
            self.slab.wait_for_published(self._stream)
            num_scored, loaded = 0, -1
            for piece in pieces:
                if piece.block != loaded:
                    self._load(encoded.blocks[piece.block])
                    loaded = piece.block
                self._score(piece, encoded.blocks[piece.block], pair_slot, num_scored)
                num_scored += len(piece.pairs)
            self._stream.synchronize()
        if pieces:
            logits[np.concatenate([piece.pairs for piece in pieces])] = self._logits[:num_scored]
        return logits

    def last_copies(self) -> DeviceCopies | None:
        """Return the copy times of the last call, measured by events of the stream."""
        with self._device.current():
            return self._copies.copies()

    def _load(self, block: DeviceBlock) -> None:
        """Copy a block's texts to the input memory of the pair graph."""
        stage, num_texts = self._stages.pair, len(block.layout.texts)
        num_bytes = num_texts * block.layout.text_tokens * self._state_bytes
        cuda.memcpy_dtod_async(stage.address("states"), int(block.states), num_bytes, self._stream)
        cuda.memcpy_dtod_async(stage.address("text_lengths"), int(block.lengths), num_texts * 4, self._stream)

    def _score(
        self,
        piece: PairPiece,
        block: DeviceBlock,
        pair_slot: NDArray[np.int32],
        num_scored: int,
    ) -> None:
        """Enqueue the scoring of a piece; its logits go to the pinned memory from index `num_scored` on."""
        stage, num_real = self._stages.pair, len(piece.pairs)
        num_pairs = self._stages.pairs.smallest_for(num_real)
        inputs: list[tuple[Any, NDArray[Any]]] = [
            (self._slots, pair_slot[piece.pairs]),
            (stage.address("pair_query"), piece.rows),
        ]
        with self._copies.to_device():
            for address, numbers in inputs:
                # Padded with slot 0, query 0 and score 0; the logits of the padding are not read.
                self._ring.upload(np.pad(numbers, (0, num_pairs - num_real)), int(address))
        self._pair_work(block.layout.text_tokens, num_pairs).launch()
        with self._copies.to_host():
            logits = self._logits[num_scored : num_scored + num_real]
            cuda.memcpy_dtoh_async(logits, stage.address("logits"), self._stream)

    def _pair_work(self, text_tokens: int, num_pairs: int) -> ReplayedWork:
        """Return the work that gathers the slots and then runs the plan."""
        stage = self._stages.pair

        def gather() -> None:
            scales = stage.address("scales") if self.slab.layout.scale_bytes > 0 else 0
            self.slab.gather(int(self._slots), num_pairs, stage.address("tokens"), scales, self._stream)

        sizes = {QUERIES: self._stages.queries.largest, TEXT_TOKENS: text_tokens, PAIRS: num_pairs}
        return stage.work(sizes, before=gather)
