"""An engine that computes nothing, for tests of the service and for measuring the service without an engine.

Results are hashes: equal for equal inputs, different for different inputs, meaningless as a ranking. Reads the
checkpoint's configuration and digest, but no weights, and imports no torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edje.config import EdjeConfig
from trt.contract import QueryStates, check_images, check_pairs, check_texts
from trt.identity import engine_digest, engine_info
from trt.slab.host import HostSlab
from trt.slab.layout import SlotLayout

#: Odd 64-bit constants with well-mixed bits (the golden ratio, and splitmix64's second).
_MIX_SLOT = np.uint64(0x9E3779B97F4A7C15)
_MIX_BOTH = np.uint64(0xBF58476D1CE4E5B9)
#: Logits are in -8..8, where their sigmoids differ.
_LOGIT_RANGE = 16.0


class ConstantEngine:
    """Sleeps `ms_per_item` for every image encoded and every pair scored, to simulate a slow device."""

    def __init__(
        self,
        config: EdjeConfig,
        model_digest: str,
        *,
        storage: str,
        num_slots: int,
        max_pairs: int,
        max_images: int,
        ms_per_item: float = 0.0,
    ) -> None:
        layout = SlotLayout(storage, config.adapter.num_tokens, config.joint.dim)
        self.slab = HostSlab(layout, num_slots)
        self.info = engine_info(
            config,
            layout,
            runtime="constant",
            model_digest=model_digest,
            engine_digest=engine_digest(model_digest, "constant", storage),
            max_images=max_images,
            max_pairs=max_pairs,
            num_slots=num_slots,
        )
        self._vocab_size = config.joint.vocab_size
        self._pooled_dim = config.vision.pooled_dim
        self._s_per_item = ms_per_item / 1000

    def warm_up(self) -> None:
        """Nothing to warm."""

    def encode_images(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return pixels from the whole image, scaled to -1..1, as tokens and as the pooled embedding."""
        check_images(self.info, pixels)
        self._pass_time(len(pixels))
        flat = pixels.reshape(len(pixels), self.info.image_size**2 * 3)
        tokens = self._sample(flat, self.info.num_visual_tokens * self.info.token_dim)
        shape = (len(pixels), self.info.num_visual_tokens, self.info.token_dim)
        return tokens.reshape(shape), self._sample(flat, self._pooled_dim)

    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> QueryStates:
        check_texts(self.info, text_ids, self._vocab_size)
        digests = [hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).digest() for ids in text_ids]
        return QueryStates(np.frombuffer(b"".join(digests), np.uint64))

    def score_pairs(
        self,
        queries: QueryStates,
        pair_query: NDArray[np.int32],
        pair_slot: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Return hashes of each caption and the first eight bytes of its slot."""
        texts = cast("NDArray[np.uint64]", queries)
        check_pairs(self.info, pair_query, pair_slot, len(texts))
        self._pass_time(len(pair_query))
        images = self.slab.tokens[:, :8][pair_slot].view(np.uint64)[:, 0]
        mixed = (images * _MIX_SLOT ^ texts[pair_query]) * _MIX_BOTH
        return ((mixed >> np.uint64(40)) * np.float32(_LOGIT_RANGE / 2**24) - _LOGIT_RANGE / 2).astype(np.float32)

    @staticmethod
    def _sample(flat: NDArray[np.uint8], num_values: int) -> NDArray[np.float32]:
        columns = np.linspace(0, flat.shape[1] - 1, num_values).astype(np.int64)
        return flat[:, columns].astype(np.float32) / 127.5 - 1

    def _pass_time(self, num_items: int) -> None:
        if self._s_per_item > 0:
            time.sleep(num_items * self._s_per_item)
