"""Scoring in torch on a CPU, without recording: pairs whose texts have equal lengths are computed together, unpadded.

Masked attention rounds differently and moves logits in bf16 by 0.03, so texts are padded only if a group would be too
small. Uses the device only through the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trt.runtimes.grouping import groups_by_length
from trt.runtimes.torch_device import Transfers
from trt.runtimes.torch_model import ServedModel, TextRows

#: Pairs in one forward pass: 8 to 32 are equally fast, and the limit bounds the memory of the activations.
GROUP_PAIRS = 32
#: Pairs in one step of a late interaction, which has no layers and needs little memory.
MATCH_GROUP_PAIRS = 256
#: Number of texts whose rows are cached: a large request is scored in several batches, and popular queries repeat.
KEPT_TEXTS = 256


@dataclass(frozen=True, slots=True)
class DirectQueries:
    """The texts of one call, padded with zeros to the longest, and their lengths."""

    texts: TextRows
    lengths: NDArray[np.int64]  # (Q,)


class DirectScoring:
    """Encodes texts and scores pairs in groups of one text length."""

    def __init__(self, model: ServedModel, transfers: Transfers, *, max_pairs: int, one_by_one: bool) -> None:
        """`one_by_one`: each text and each pair is computed alone, so that a logit does not depend on the batch.

        On a CPU the index of a row in a matrix product decides which thread computes the row; with two threads this
        alone moves logits by 8e-7.
        """
        self._model = model
        self._transfers = transfers
        self._one_by_one = one_by_one
        has_layers = model.config.joint.num_layers > 0
        self._group_pairs = min(max_pairs, GROUP_PAIRS if has_layers else MATCH_GROUP_PAIRS)
        if model.num_hot_images:
            self._group_pairs = min(self._group_pairs, model.num_hot_images)
        self._kept: OrderedDict[tuple[int, ...], TextRows] = OrderedDict()

    def warm_up(self, max_text_tokens: int, sep_id: int) -> None:
        """Score one group with the shortest and one with the longest text; nothing is compiled for particular sizes."""
        slots = np.zeros(self._group_pairs, np.int32)
        for num_tokens in (2, max_text_tokens):
            self.score_pairs(self.encode_queries([[sep_id] * num_tokens]), slots, slots)

    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> DirectQueries:
        lengths = np.array([len(ids) for ids in text_ids], np.int64)
        longest = int(lengths.max(initial=0))
        texts = self._model.empty_texts(len(text_ids), longest)
        for number, rows in self._rows_of(text_ids, lengths):
            for target, source in zip(texts.tensors, rows.tensors, strict=True):
                target[number, : lengths[number]] = source
        return DirectQueries(texts, lengths)

    def _rows_of(self, text_ids: Sequence[Sequence[int]], lengths: NDArray[np.int64]) -> Iterator[tuple[int, TextRows]]:
        """Yield the index and the rows, (T, d) and (T, k), of every text; computes the rows that are not cached."""
        missing: dict[tuple[int, ...], int] = {}
        for number, ids in enumerate(text_ids):
            kept = self._kept.get(tuple(ids))
            if kept is None:
                missing.setdefault(tuple(ids), number)
            else:
                self._kept.move_to_end(tuple(ids))
        numbers = np.array(list(missing.values()), np.int64)
        computed: dict[tuple[int, ...], TextRows] = {}
        for group in self._together(lengths[numbers]):
            texts = [tuple(text_ids[number]) for number in numbers[group]]
            rows = self._model.encode_texts(torch.tensor(texts, device=self._model.device))
            for row, text in enumerate(texts):
                computed[text] = rows.row(row)
        for number, ids in enumerate(text_ids):
            yield number, computed.get(tuple(ids)) or self._kept[tuple(ids)]
        self._kept.update(computed)
        while len(self._kept) > KEPT_TEXTS:
            self._kept.popitem(last=False)

    def _together(self, lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Yield the indices of texts to encode in one pass: all texts of one length, or each text alone."""
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            yield from np.split(rows, len(rows)) if self._one_by_one else (rows,)

    def score_pairs(
        self,
        queries: DirectQueries,
        pair_query: NDArray[np.int32],
        pair_slot: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        self._model.derive_match_rows(pair_slot)
        logits = np.empty(len(pair_query), np.float32)
        lengths = queries.lengths[pair_query]
        for group in self._groups(lengths):
            texts, slots, text_lengths = self._inputs(queries, pair_query[group], pair_slot[group])
            hot_rows = None
            if self._model.num_hot_images:
                hot_rows = self._transfers.upload(self._model.derive_keys_values(pair_slot[group]))
            scored = self._model.score(texts, slots, text_lengths, hot_rows)
            logits[group] = self._transfers.download(scored)
        return logits

    def match_pairs(
        self, queries: DirectQueries, pair_query: NDArray[np.int32], pair_slot: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Return the pairs' late-interaction scores, without the joint encoder's layers."""
        self._model.derive_match_rows(pair_slot)
        scores = np.empty(len(pair_query), np.float32)
        for group in groups_by_length(queries.lengths[pair_query], MATCH_GROUP_PAIRS):
            texts, slots, text_lengths = self._inputs(queries, pair_query[group], pair_slot[group])
            scores[group] = self._transfers.download(self._model.match(texts, slots, text_lengths))
        return scores

    def _groups(self, lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Yield the indices of pairs to score in one pass."""
        if self._one_by_one:
            yield from np.arange(len(lengths))[:, None]
        else:
            yield from groups_by_length(lengths, self._group_pairs)

    def _inputs(
        self, queries: DirectQueries, pair_query: NDArray[np.int32], pair_slot: NDArray[np.int32]
    ) -> tuple[TextRows, Tensor, Tensor | None]:
        """Return each pair's text without common padding, the slots, and the text lengths if they differ."""
        lengths = queries.lengths[pair_query]
        longest, rows = int(lengths.max()), self._transfers.upload(pair_query)
        picked = queries.texts.map(lambda tensor: tensor[:, :longest].index_select(0, rows))
        text_lengths = self._transfers.upload(lengths) if (lengths != longest).any() else None
        return picked, self._transfers.upload(pair_slot), text_lengths
