"""A checkpoint's model in the torch runtime: number types of its parts, stored tokens, derived rows, and scoring.

Tower, adapter and the encoder's layers compute in one type; pixel normalisation, embeddings, the matching head and the
late interaction in float32. Knows tensors on the device; `torch_direct` and `torch_graphs` lay out the batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edje.model.edje import Edje
from edje.model.late_fusion import LateFusionEncoder
from edje.model.weights import Checkpoint
from edje.towers.vit import VisionTower
from trt.contract import EngineUnavailable
from trt.runtimes.packed_linear import pack_last_layer, pack_linears
from trt.runtimes.torch_device import TorchDevice, Transfers
from trt.slab.derived import RowTable, keys_values_row, match_row
from trt.slab.layout import SlotLayout
from trt.slab.torch_slab import GatherSlab, dequantize

#: Number of slots whose derived rows are computed in one step: 256 images of 64 x 384 values are 25 MB in float32.
_DERIVED_STEP = 256


@dataclass(frozen=True, slots=True)
class TextRows:
    """Values that depend on texts alone: states (..., T, d), and unit vectors (..., T, k) for late interaction."""

    states: Tensor | None  # None if the encoder has no layers after the text layers
    match: Tensor | None  # None if the encoder has no late interaction

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are not None."""
        return tuple(tensor for tensor in (self.states, self.match) if tensor is not None)

    def row(self, number: int) -> TextRows:
        """Return a copy of one text's rows."""
        return self.map(lambda tensor: tensor[number].clone())

    def map(self, change: Callable[[Tensor], Tensor]) -> TextRows:
        """Apply a function to every tensor."""
        return TextRows(*(None if each is None else change(each) for each in (self.states, self.match)))


class ServedModel:
    """A checkpoint's model, whose weights are converted in place."""

    def __init__(
        self, checkpoint: Checkpoint, slab: GatherSlab, device: TorchDevice, dtype: torch.dtype, hot_images: int = 0
    ) -> None:
        """`hot_images`: number of images whose visual keys and values are kept; with 0 each pair computes them."""
        self.config = checkpoint.config
        self.device = device.device
        self._slab = slab
        model = checkpoint.model.to(self.device)
        model.vision.to(dtype)
        model.adapter.to(dtype)
        for part in model.joint.children():
            if isinstance(part, nn.ModuleList):  # the text, image and joint layers
                part.to(dtype)
        if self.device.type == "cpu":
            _pack(model)
        self.edje = model
        self._late = model.joint if isinstance(model.joint, LateFusionEncoder) else None
        self._match = self._late.match if self._late is not None else None
        self._transfers = Transfers(device)
        self._make_rows(str(dtype).removeprefix("torch."), hot_images)

    def _make_rows(self, dtype: str, hot_images: int) -> None:
        num_slots = self._slab.num_slots
        match, keys_values = match_row(self.config), keys_values_row(self.config, dtype)
        self._match_rows: Tensor | None = None
        self._keys_values: Tensor | None = None
        if match is not None and num_slots:
            self._match_table = RowTable(num_slots, num_slots)
            self._match_rows = self._zeros(num_slots, match.shape, match.dtype)
        if hot_images and num_slots:
            if keys_values is None:
                raise EngineUnavailable(
                    f"{hot_images} hot images are configured, but only an encoder of kind 'minimal' has visual keys "
                    f"and values to keep, not {self.config.joint.kind!r}: set the number of hot images to 0"
                )
            self._keys_values_table = RowTable(num_slots, min(hot_images, num_slots))
            self._keys_values = self._zeros(self._keys_values_table.num_rows, keys_values.shape, keys_values.dtype)

    def _zeros(self, num_rows: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.zeros((num_rows, *shape), dtype=getattr(torch, dtype), device=self.device)

    @property
    def layout(self) -> SlotLayout:
        return self._slab.layout

    @property
    def num_hot_images(self) -> int:
        """Number of images whose keys and values are kept; 0 if they are computed for each pair."""
        return 0 if self._keys_values is None else self._keys_values_table.num_rows

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # uint8 (n, 3, S, S) -> (n, m, d), (n, e)
        return self.edje.encode_images(pixels)

    def empty_texts(self, num_texts: int, num_tokens: int) -> TextRows:
        """Return zeros in the shapes of such texts' rows."""
        joint = self.config.joint
        widths = (joint.dim if joint.num_layers else 0, joint.match_dim)
        return TextRows(
            *(torch.zeros((num_texts, num_tokens, width), device=self.device) if width else None for width in widths)
        )

    def encode_texts(self, text_ids: Tensor, text_lengths: Tensor | None = None) -> TextRows:  # (Q, T), (Q,)
        """Return the rows of texts; `text_lengths` is None if no text is padded."""
        states = self.edje.encode_queries(text_ids, text_lengths).float()
        match = None if self._match is None else self._match.project_text(states)
        return TextRows(states if self.config.joint.num_layers else None, match)

    @property
    def has_late_interaction(self) -> bool:
        return self._match is not None

    def token_similarities(self, text_ids: Tensor, slots: Tensor) -> Tensor:  # (1, T), (P,) -> (P, T, m)
        """Return the cosines of one text's tokens with each slot's visual tokens; needs a late interaction."""
        assert self._match is not None, "the model has no late interaction"
        text = self._match.project_text(self.edje.encode_queries(text_ids, None).float())
        return text @ self._match.project_visual(self._tokens(slots)).transpose(1, 2)

    def derive_match_rows(self, slots: NDArray[np.int32]) -> None:
        """Compute the late-interaction rows of the slots whose content has changed."""
        if self._match_rows is None or not len(slots):
            return
        assert self._match is not None  # the model has match rows
        assignment = self._match_table.assign(slots, self._slab.versions)
        for start in range(0, len(assignment.new_slots), _DERIVED_STEP):
            new = self._transfers.upload(assignment.new_slots[start : start + _DERIVED_STEP])
            rows = self._match.project_visual(self._tokens(new))
            self._match_rows.index_copy_(0, new.long(), rows.to(self._match_rows.dtype))

    def derive_keys_values(self, slots: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return each slot's row of keys and values; computes missing rows. At most `num_hot_images` slots."""
        assert self._keys_values is not None, "only for hot images"
        assert self._late is not None
        assignment = self._keys_values_table.assign(slots, self._slab.versions)
        for start in range(0, len(assignment.new_slots), _DERIVED_STEP):
            part = slice(start, start + _DERIVED_STEP)
            tokens = self._tokens(self._transfers.upload(assignment.new_slots[part]))
            rows = self._transfers.upload(assignment.new_rows[part])
            self._keys_values.index_copy_(0, rows.long(), self._late.visual_keys_values(tokens))
        return assignment.rows

    def score(
        self,
        texts: TextRows,
        slots: Tensor,
        text_lengths: Tensor | None = None,
        hot_rows: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B,) of texts (B, T, ...), one per pair, with slots (B,).

        `text_lengths` is None if no text is padded. `hot_rows` (B,) are the indices of kept rows of keys and values.
        The caller has computed the derived rows of the slots.
        """
        if self._late is None:
            assert texts.states is not None
            return self.edje.score(texts.states, self._tokens(slots), text_lengths)
        match = None if self._match is None else self.match(texts, slots, text_lengths)
        if self._late.head is None:
            assert match is not None  # an encoder without layers has a late interaction
            return match
        keys_values = None
        if hot_rows is not None and self._keys_values is not None:
            keys_values = self._keys_values.index_select(0, hot_rows)
        visual = None if keys_values is not None else self._tokens(slots)
        assert texts.states is not None
        return self._late.score(texts.states, visual, text_lengths, match=match, keys_values=keys_values)

    def match(self, texts: TextRows, slots: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """Return the late-interaction scores of pairs, (B,)."""
        assert self._match is not None, "only for an encoder with a late interaction"
        assert texts.match is not None
        assert self._match_rows is not None
        visual = self._match_rows.index_select(0, slots).float()
        return self._match.compare(texts.match, visual, text_lengths)

    def _tokens(self, slots: Tensor) -> Tensor:  # (B,) -> float32 (B, m, d)
        return dequantize(self.layout, *self._slab.gather(slots))


def _pack(model: Edje) -> None:
    """Pack the linear layers, except in towers of other libraries, which may read their weights directly."""
    layers = [part for part in model.joint.children() if isinstance(part, nn.ModuleList)]
    if len(model.joint.layers):
        pack_last_layer(model.joint.layers[-1])
    towers = [model.vision] if isinstance(model.vision, VisionTower) else []
    for part in (*layers, model.adapter, *towers):
        pack_linears(part)
