"""The torch runtime: the reference implementation, on a CPU or a CUDA device.

Tower, adapter and the joint encoder's layers compute in `dtype`; pixels, embeddings, the matching head and the late
interaction in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edje.model.weights import Checkpoint
from trt.contract import DeviceCopies, EngineBroken, QueryStates, check_images, check_pairs, check_texts
from trt.cuda.copy_clock import CopyClock
from trt.identity import engine_digest, engine_info
from trt.runtimes.dequantize import dequantise
from trt.runtimes.grouping import fixed_groups, groups_by_length
from trt.runtimes.static_shapes import Buckets
from trt.runtimes.torch_graphs import CudaRecorder, GraphedScoring, Record, pair_buckets
from trt.slab.host import GatherSlab

#: Pairs in one forward pass on a CPU: 8 to 32 measured alike, and this bounds what the activations take.
CPU_GROUP_PAIRS = 32
#: Pairs in every forward pass with fixed shapes. One at a time on a CPU: the place of a row in a product decides which
#: thread's block it falls into, and with two threads that alone moved logits by 8e-7.
FIXED_GROUP_PAIRS = {"cpu": 1, "cuda": 64}


@dataclass(frozen=True, slots=True)
class EncodedQueries:
    """Captions of one `encode_queries` after all that reads the text alone, padded to the longest; true lengths."""

    states: Tensor  # (Q, T, d)
    lengths: NDArray[np.int64]  # (Q,)


class TorchEngine:
    """Both halves of the contract over a loaded checkpoint.

    Takes the checkpoint's model over and converts its weights in place. The slab lies on `device`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        slab: GatherSlab,
        max_pairs: int,
        max_images: int,
        device: torch.device,
        dtype: torch.dtype,
        fixed_buckets: bool = False,
        record: Record | None = None,
    ) -> None:
        """`fixed_buckets`: a pair's logit is the same to the last bit whatever else is in the call.

        `record` makes CUDA graphs of the scoring; on a CUDA device they are made without being asked for.
        """
        config = checkpoint.config
        self._layout = slab.layout
        self._device = device
        self._dtype = dtype
        self._config = config
        with _broken_device():
            self._model = checkpoint.model.to(device)
            self._model.vision.to(dtype)
            self._model.adapter.to(dtype)
            for part in self._model.joint.children():
                if isinstance(part, nn.ModuleList):  # the layers: of text, of image, of both
                    part.to(dtype)
        self.slab = slab
        self._copies = CopyClock(_timing_event) if device.type == "cuda" else None
        self._is_fixed = fixed_buckets
        self._group_pairs = CPU_GROUP_PAIRS if device.type == "cpu" else max_pairs
        with _broken_device():
            if record is None and device.type == "cuda" and slab.num_slots:
                record = CudaRecorder(device)
            self._graphs = None if record is None else self._graphed(record)
        self.info = engine_info(
            config,
            slab.layout,
            runtime="torch",
            model_digest=checkpoint.digest,
            engine_digest=engine_digest(
                checkpoint.digest,
                "torch",
                str(dtype),
                slab.layout.storage,
                torch.__version__,
                device_name(device),
                *(("fixed buckets",) if fixed_buckets else ()),
            ),
            max_images=max_images,
            max_pairs=max_pairs,
            num_slots=slab.num_slots,
        )

    def _graphed(self, record: Record) -> GraphedScoring:
        fixed_pairs = FIXED_GROUP_PAIRS[self._device.type]
        return GraphedScoring(
            self._score,
            record,
            buckets=Buckets((fixed_pairs,)) if self._is_fixed else pair_buckets(self._group_pairs),
            max_text_tokens=self._config.preprocess.max_text_tokens,
            token_dim=self._layout.token_dim,
            device=self._device,
            record_at=1 if self._is_fixed else 2,  # fixed: never once by other means than all the other times
        )

    def warm_up(self) -> None:
        """One full batch through each half, with the shortest and the longest text."""
        size = self.info.image_size
        self.encode_images(np.zeros((self.info.max_images, 3, size, size), np.uint8))
        if self.info.num_slots == 0:
            return
        num_pairs = min(self.info.max_pairs, self._group_pairs)
        slots = np.zeros(num_pairs, np.int32)
        for num_text in (2, self.info.max_text_tokens):
            self.score_pairs(self.encode_queries([[self._config.joint.sep_id] * num_text]), slots, slots)

    @torch.inference_mode()
    def encode_images(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        check_images(self.info, pixels)
        with _broken_device():
            tokens, pooled = self._model.encode_images(torch.tensor(pixels).to(self._device))
            return _to_host(tokens), _to_host(pooled)

    @torch.inference_mode()
    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> QueryStates:
        check_texts(self.info, text_ids, self._config.joint.vocab_size)
        lengths = np.array([len(ids) for ids in text_ids], np.int64)
        shape = (len(text_ids), int(lengths.max(initial=0)), self._layout.token_dim)
        with _broken_device():
            states = torch.zeros(shape, device=self._device)
            # By length and not padded: attention under a mask rounds otherwise, which in bf16 moves logits by 0.03.
            for rows in self._texts_together(lengths):
                length = int(lengths[rows[0]])
                text = torch.tensor([text_ids[row] for row in rows.tolist()], device=self._device)
                states[self._on_device(rows), :length] = self._model.encode_queries(text).float()
        return QueryStates(EncodedQueries(states, lengths))

    @torch.inference_mode()
    def score_pairs(
        self,
        queries: QueryStates,
        pair_query: NDArray[np.int32],
        pair_slot: NDArray[np.int32],
        first_stage: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        encoded = cast(EncodedQueries, queries)
        check_pairs(self.info, pair_query, pair_slot, len(encoded.lengths), first_stage)
        if not self.info.reads_first_stage:
            first_stage = None
        if self._copies is not None:
            self._copies.start()
        logits = np.empty(len(pair_query), np.float32)
        lengths = encoded.lengths[pair_query]
        with _broken_device():
            for group, num_real in self._groups(lengths):
                scores = None if first_stage is None else first_stage[group]
                scored = self._score_group(encoded.states, pair_query[group], pair_slot[group], lengths[group], scores)
                with self._copies.to_host() if self._copies is not None else nullcontext():
                    logits[group[:num_real]] = _to_host(scored)[:num_real]
        return logits

    def _texts_together(self, lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Texts that are encoded in one pass: of one length, and each alone where company must not matter."""
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            yield from np.split(rows, len(rows)) if self._is_fixed else (rows,)

    def _groups(self, lengths: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Pairs that are scored in one pass, and how many of them count."""
        if self._is_fixed:
            yield from fixed_groups(lengths, FIXED_GROUP_PAIRS[self._device.type])
        else:
            for group in groups_by_length(lengths, self._group_pairs):
                yield group, len(group)

    @property
    def num_graphs(self) -> int:
        """Sizes of scoring that are replayed by a CUDA graph."""
        return 0 if self._graphs is None else self._graphs.num_recorded

    def last_copies(self) -> DeviceCopies | None:
        """By events of the device; None on a CPU, which copies nothing."""
        return None if self._copies is None else self._copies.copies()

    def _score_group(
        self,
        states: Tensor,
        queries: NDArray[np.int32],
        slots: NDArray[np.int32],
        lengths: NDArray[np.int64],
        first_stage: NDArray[np.float32] | None,
    ) -> Tensor:
        text, rows, on_device = states[:, : int(lengths.max())], self._on_device(queries), self._on_device(slots)
        scores = None if first_stage is None else self._on_device(first_stage)
        if (lengths != lengths[0]).any():
            return self._score(text.index_select(0, rows), on_device, scores, self._on_device(lengths))
        if self._graphs is not None:
            return self._graphs(text, rows, on_device, scores)
        return self._score(text.index_select(0, rows), on_device, scores)

    def _score(
        self, text: Tensor, slots: Tensor, first_stage: Tensor | None, text_lengths: Tensor | None = None
    ) -> Tensor:
        """(B, T, d) texts against (B,) slots of the slab, (B,) logits; `text_lengths` None: all of each text counts."""
        visual = dequantise(self._layout, *self.slab.gather(slots))
        return self._model.score(text, visual, text_lengths, first_stage)

    def _on_device(self, numbers: NDArray[Any]) -> Tensor:
        with self._copies.to_device() if self._copies is not None else nullcontext():
            return torch.tensor(numbers).to(self._device)


def device_name(device: torch.device) -> str:
    """What the engine digest says of the device: models differ in rounding, not in number or place."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it in hardware, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    in_hardware = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if in_hardware else torch.float32


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _to_host(tensor: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", tensor.float().cpu().numpy())


@contextmanager
def _broken_device() -> Iterator[None]:
    """A device out of memory or in a sticky error stays so: the process has to end."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        raise EngineBroken(f"the device failed: {str(error).splitlines()[0]}") from error
