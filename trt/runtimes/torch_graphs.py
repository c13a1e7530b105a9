"""Scoring in torch with CUDA graphs: the work of each size is recorded once and then replayed.

Below some hundred pairs, launching the kernels of a forward pass takes longer than computing them. A graph has fixed
shapes and addresses: texts are padded to a length bucket and masked, and the numbers of texts and pairs are rounded up
to one of a few sizes. A call uploads and downloads once. Recording is an argument (`TorchDevice`), so that all other
code can be tested on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trt.contract import EngineBroken, GraphCounts
from trt.runtimes.static_shapes import Buckets, TextBlock, halving_buckets, padded_texts, pair_pieces, text_blocks
from trt.runtimes.torch_device import TorchDevice, Transfers
from trt.runtimes.torch_model import ServedModel, TextRows
from trt.text_lengths import lengths_up_to

log = logging.getLogger(__name__)

#: Numbers of texts and pairs in every run with fixed sizes.
FIXED_TEXTS, FIXED_PAIRS = 8, 64
#: Largest number of texts in one run of the text layers: a micro-batch has some tens of requests.
MAX_TEXTS = 64
MIN_PAIRS = 16


@dataclass(frozen=True, slots=True)
class GraphedBlock:
    """The texts of a block on the device, and their lengths."""

    layout: TextBlock
    texts: TextRows  # (texts, text tokens, ...)
    lengths: Tensor  # int32 (texts,)


@dataclass(frozen=True, slots=True)
class GraphedQueries:
    """The texts of one call."""

    blocks: list[GraphedBlock]
    num_texts: int


class GraphedScoring:
    """Encodes texts and scores pairs at a few fixed sizes. Used from one thread, with the device current."""

    def __init__(
        self,
        model: ServedModel,
        device: TorchDevice,
        transfers: Transfers,
        *,
        max_pairs: int,
        max_text_tokens: int,
        fixed: bool,
    ) -> None:
        """`fixed` uses one number of texts and one of pairs, so that a logit does not depend on the batch."""
        assert device.record is not None, "only for a device that records"
        self._model = model
        self._record = device.record
        self._transfers = transfers
        largest = min(max_pairs, model.num_hot_images or max_pairs)
        self._text_tokens = Buckets(lengths_up_to(max_text_tokens))
        self._texts = Buckets((FIXED_TEXTS,)) if fixed else halving_buckets(1, min(max_pairs, MAX_TEXTS))
        self._pairs = Buckets((min(FIXED_PAIRS, largest),)) if fixed else halving_buckets(MIN_PAIRS, largest)
        self._replays: dict[tuple[str, int, int], Callable[[], None]] = {}
        self._num_uncaptured = 0

        def numbers(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=model.device)

        longest, most = self._text_tokens.largest, self._pairs.largest
        # Inputs and outputs of the text graphs.
        self._ids, self._id_lengths = numbers(self._texts.largest * longest), numbers(self._texts.largest) + 1
        self._encoded = model.empty_texts(1, self._texts.largest * longest)
        # Inputs and outputs of the pair graphs. Every pair may have a different text.
        self._read_texts, self._read_lengths = model.empty_texts(1, most * longest), numbers(most) + 1
        self._rows, self._slots, self._hot_rows = numbers(most), numbers(most), numbers(most)
        self._logits = torch.zeros(most, device=model.device)
        self._all_logits = torch.zeros(max_pairs, device=model.device)

    def graph_counts(self) -> GraphCounts:
        return GraphCounts(len(self._replays) - self._num_uncaptured, self._num_uncaptured)

    def warm_up(self) -> None:
        """Record every size that a call can have. Raises `EngineBroken` if the graphs do not fit in memory."""
        for text_tokens in self._text_tokens.sizes:
            for num_texts in self._texts.sizes:
                self._text_work(text_tokens, num_texts)
            for num_pairs in self._pairs.sizes:
                self._pair_work(text_tokens, num_pairs)

    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> GraphedQueries:
        lengths = np.array([len(ids) for ids in text_ids], np.int64)
        layouts = text_blocks(lengths, self._text_tokens, self._texts.largest)
        padded = [padded_texts(text_ids, each, self._texts.smallest_for(len(each.texts))) for each in layouts]
        if not layouts:
            return GraphedQueries([], 0)
        uploaded = self._transfers.upload(np.concatenate([part.reshape(-1) for pair in padded for part in pair]))
        blocks, start = [], 0
        for layout, (ids, _) in zip(layouts, padded, strict=True):
            num_rows, num_texts = len(ids), len(layout.texts)
            middle, stop = start + ids.size, start + ids.size + num_rows
            self._ids[: ids.size].copy_(uploaded[start:middle])
            self._id_lengths[:num_rows].copy_(uploaded[middle:stop])
            self._text_work(layout.text_tokens, num_rows)()
            texts = _views(self._encoded, num_texts, layout.text_tokens).map(Tensor.clone)
            blocks.append(GraphedBlock(layout, texts, uploaded[middle : middle + num_texts]))
            start = stop
        return GraphedQueries(blocks, len(text_ids))

    def score_pairs(
        self,
        queries: GraphedQueries,
        pair_query: NDArray[np.int32],
        pair_slot: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        self._model.derive_match_rows(pair_slot)
        layouts = [block.layout for block in queries.blocks]
        pieces = list(pair_pieces(layouts, queries.num_texts, pair_query, self._pairs.largest))
        logits = np.empty(len(pair_query), np.float32)
        if not pieces:
            return logits
        order = np.concatenate([piece.pairs for piece in pieces])
        rows = np.concatenate([piece.rows for piece in pieces])
        uploaded = self._transfers.upload(np.stack([rows, pair_slot[order]]))
        num_scored, loaded = 0, -1
        for piece in pieces:
            block, num_pairs = queries.blocks[piece.block], len(piece.pairs)
            if piece.block != loaded:
                self._load(block)
                loaded = piece.block
            part = slice(num_scored, num_scored + num_pairs)
            # The padding keeps its previous values, which are valid; its logits are not read.
            self._rows[:num_pairs].copy_(uploaded[0, part])
            self._slots[:num_pairs].copy_(uploaded[1, part])
            if self._model.num_hot_images:
                hot_rows = self._model.derive_keys_values(pair_slot[piece.pairs])
                self._hot_rows[:num_pairs].copy_(self._transfers.upload(hot_rows))
            self._pair_work(block.layout.text_tokens, self._pairs.smallest_for(num_pairs))()
            self._all_logits[part].copy_(self._logits[:num_pairs])
            num_scored += num_pairs
        logits[order] = self._transfers.download(self._all_logits[:num_scored])
        return logits

    def _load(self, block: GraphedBlock) -> None:
        """Copy a block's texts to the input memory of the pair graphs."""
        num_texts = len(block.layout.texts)
        views = _views(self._read_texts, num_texts, block.layout.text_tokens)
        for target, source in zip(views.tensors, block.texts.tensors, strict=True):
            target.copy_(source)
        self._read_lengths[:num_texts].copy_(block.lengths)

    def _text_work(self, text_tokens: int, num_texts: int) -> Callable[[], None]:
        ids = self._ids[: num_texts * text_tokens].view(num_texts, text_tokens)
        targets = _views(self._encoded, num_texts, text_tokens)

        def encode() -> None:
            rows = self._model.encode_texts(ids, self._id_lengths[:num_texts])
            for target, source in zip(targets.tensors, rows.tensors, strict=True):
                target.copy_(source)

        return self._recorded(("texts", text_tokens, num_texts), encode)

    def _pair_work(self, text_tokens: int, num_pairs: int) -> Callable[[], None]:
        texts = _views(self._read_texts, self._pairs.largest, text_tokens)
        rows = self._rows[:num_pairs]

        def score() -> None:
            picked = texts.map(lambda tensor: tensor.index_select(0, rows))
            logits = self._model.score(
                picked,
                self._slots[:num_pairs],
                self._read_lengths.index_select(0, rows),
                self._hot_rows[:num_pairs] if self._model.num_hot_images else None,
            )
            self._logits[:num_pairs].copy_(logits)

        return self._recorded(("pairs", text_tokens, num_pairs), score)

    def _recorded(self, size: tuple[str, int, int], work: Callable[[], None]) -> Callable[[], None]:
        """Return the replay of a size's graph, or the work itself if it cannot be recorded."""
        if size not in self._replays:
            unit, text_tokens, number = size
            try:
                self._replays[size] = self._record(work)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                if isinstance(error, torch.OutOfMemoryError) or "out of memory" in reason:
                    raise EngineBroken(
                        f"no memory for the CUDA graph of {number} {unit} of {text_tokens} text tokens: ask for fewer "
                        f"slots or fewer pairs in a batch ({reason})"
                    ) from error
                log.warning("%d %s of %d text tokens run without a CUDA graph: %s", number, unit, text_tokens, reason)
                self._replays[size] = work
                self._num_uncaptured += 1
        return self._replays[size]


def _views(flat: TextRows, num_texts: int, num_tokens: int) -> TextRows:
    """View the first rows of flat memory (1, n, width) as texts (num_texts, num_tokens, width)."""
    return flat.map(lambda rows: rows[0, : num_texts * num_tokens].view(num_texts, num_tokens, -1))
