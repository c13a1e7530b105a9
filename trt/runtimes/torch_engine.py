"""The torch runtime: the reference implementation of the engine contract, on a CPU or a CUDA device.

Checks calls and makes the device current. `torch_model` computes; `torch_direct` (CPU) and `torch_graphs` (CUDA) lay
out the batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from edje.model.weights import Checkpoint
from trt.contract import DeviceCopies, GraphCounts, QueryStates, check_images, check_pairs, check_texts
from trt.identity import engine_digest, engine_info
from trt.runtimes.torch_device import TorchDevice, Transfers, broken_device, device_name, to_numpy
from trt.runtimes.torch_direct import DirectQueries, DirectScoring
from trt.runtimes.torch_graphs import GraphedQueries, GraphedScoring
from trt.runtimes.torch_model import ServedModel
from trt.slab.torch_slab import GatherSlab


class TorchEngine:
    """The engine contract over a loaded checkpoint, whose model it converts in place. The slab is on `device`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        slab: GatherSlab,
        max_pairs: int,
        max_images: int,
        device: TorchDevice,
        dtype: torch.dtype,
        fixed_buckets: bool = False,
        hot_images: int = 0,
    ) -> None:
        """`fixed_buckets`: a pair's logit does not depend on the other pairs of the call, to the last bit.

        `hot_images`: see `ServedModel`. Raises `EngineBroken` without memory for the model, and `EngineUnavailable` for
        hot images with an encoder that has no separate visual keys and values.
        """
        config = checkpoint.config
        self._config = config
        self._device = device
        self.slab = slab
        self.dtype = dtype
        self._transfers = Transfers(device)
        with self._on_device():
            self._model = ServedModel(checkpoint, slab, device, dtype, hot_images)
            self._scoring: DirectScoring | GraphedScoring
            if device.record is None:
                self._scoring = DirectScoring(
                    self._model, self._transfers, max_pairs=max_pairs, one_by_one=fixed_buckets
                )
            else:
                self._scoring = GraphedScoring(
                    self._model,
                    device,
                    self._transfers,
                    max_pairs=max_pairs,
                    max_text_tokens=config.preprocess.max_text_tokens,
                    fixed=fixed_buckets,
                )
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
                device_name(device.device),
                *(("fixed buckets",) if fixed_buckets else ()),
            ),
            max_images=max_images,
            max_pairs=max_pairs,
            num_slots=slab.num_slots,
        )

    def warm_up(self) -> None:
        """Run the largest sizes once; on a device that records, record every size.

        Raises `EngineBroken` if the recorded graphs do not fit in memory.
        """
        size = self.info.image_size
        self.encode_images(np.zeros((self.info.max_images, 3, size, size), np.uint8))
        if self.info.num_slots == 0:
            return
        with self._on_device():
            if isinstance(self._scoring, GraphedScoring):
                self._scoring.warm_up()
            else:
                self._scoring.warm_up(self.info.max_text_tokens, self._config.joint.sep_id)

    def encode_images(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        check_images(self.info, pixels)
        with self._on_device():
            tokens, pooled = self._model.encode_images(torch.tensor(pixels).to(self._device.device))
            return to_numpy(tokens), to_numpy(pooled)

    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> QueryStates:
        check_texts(self.info, text_ids, self._config.joint.vocab_size)
        with self._on_device():
            return QueryStates(self._scoring.encode_queries(text_ids))

    def score_pairs(
        self,
        queries: QueryStates,
        pair_query: NDArray[np.int32],
        pair_slot: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        encoded = cast(Any, queries)
        check_pairs(self.info, pair_query, pair_slot, _num_texts(encoded))
        with self._on_device():
            self._transfers.start_call()
            self.slab.wait_for_published()
            return self._scoring.score_pairs(encoded, pair_query, pair_slot)

    def match_pairs(
        self, queries: QueryStates, pair_query: NDArray[np.int32], pair_slot: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Return the pairs' late-interaction scores, the first step of a cascade. Only on a CPU."""
        encoded = cast(DirectQueries, queries)
        check_pairs(self.info, pair_query, pair_slot, _num_texts(encoded))
        assert isinstance(self._scoring, DirectScoring), "the late interaction alone is not recorded"
        with self._on_device():
            return self._scoring.match_pairs(encoded, pair_query, pair_slot)

    def can_explain(self) -> bool:
        return self._model.has_late_interaction

    def token_similarities(
        self, text_ids: Sequence[Sequence[int]], pair_query: NDArray[np.int32], pair_slot: NDArray[np.int32]
    ) -> list[NDArray[np.float32]]:
        check_texts(self.info, text_ids, self._config.joint.vocab_size)
        check_pairs(self.info, pair_query, pair_slot, len(text_ids))
        found: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * len(pair_query)
        with self._on_device():
            self.slab.wait_for_published()
            for number, ids in enumerate(text_ids):
                pairs = np.flatnonzero(pair_query == number)
                text = torch.tensor([list(ids)], device=self._device.device)
                slots = torch.tensor(pair_slot[pairs], device=self._device.device)
                for pair, cosines in zip(
                    pairs.tolist(), to_numpy(self._model.token_similarities(text, slots)), strict=True
                ):
                    found[pair] = cosines
        return found

    def last_copies(self) -> DeviceCopies | None:
        """Return the copy times of the last call, measured by events of the device; None on a CPU."""
        with self._device.current():
            return self._transfers.last_copies()

    def graph_counts(self) -> GraphCounts | None:
        """Return the numbers of sizes with and without a CUDA graph; None on a CPU."""
        return self._scoring.graph_counts() if isinstance(self._scoring, GraphedScoring) else None

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Compute on the engine's device, without gradients; raises `EngineBroken` if the device fails."""
        with broken_device(), self._device.current(), torch.inference_mode():
            yield


def _num_texts(queries: DirectQueries | GraphedQueries) -> int:
    return queries.num_texts if isinstance(queries, GraphedQueries) else len(queries.lengths)
