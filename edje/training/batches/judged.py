"""Judged pairs of a dataset as arrays: negatives from candidate lists, and the scores of a teacher."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edje.data.dataset import Dataset
from edje.text import canonical_caption
from edje.training.batches.corpus import Captions
from edje.training.batches.negatives import MISSING, Ints, NegativeSampler, Positives, corpus_negatives

#: Negatives that are kept of one query.
_MAX_NEGATIVES = 200


class JudgedPairs:
    """The judged pairs whose texts are captions of the corpus, by caption key and image index."""

    def __init__(self, dataset: Dataset, captions: Captions) -> None:
        key_of = {canonical_caption(text): int(key) for text, key in zip(captions.texts, captions.keys, strict=True)}
        index_of = {image.image_id: index for index, image in enumerate(dataset.images)}
        found = [
            (key_of[text], index_of[pair.image_id], np.nan if pair.score is None else pair.score)
            for pair in dataset.judged
            if (text := canonical_caption(pair.text)) in key_of
        ]
        self._num_images = len(dataset.images)
        self._captions = captions
        self._keys = np.array([each[0] for each in found], np.int64)
        self._images = np.array([each[1] for each in found], np.int64)
        scores = np.array([each[2] for each in found], np.float32)
        pairs = self._keys * self._num_images + self._images
        has_score = np.flatnonzero(np.isfinite(scores))
        # Of several scores of one pair the last counts.
        self._scored, last = np.unique(pairs[has_score][::-1], return_index=True)
        self._scores = scores[has_score][::-1][last]

    @property
    def has_scores(self) -> bool:
        """Whether a teacher has scored any pair."""
        return bool(len(self._scores))

    def scores(self, captions: Ints, images: Ints) -> NDArray[np.float32]:
        """The teacher's scores of pairs (P,), NaN where unknown."""
        scores = np.full(len(captions), np.nan, np.float32)
        if not self.has_scores:
            return scores
        wanted = self._captions.keys[captions] * self._num_images + images
        at = np.searchsorted(self._scored, wanted).clip(max=len(self._scored) - 1)
        is_known = self._scored[at] == wanted
        scores[is_known] = self._scores[at[is_known]]
        return scores

    def sampler(self, positives: Positives, per_sample: int) -> NegativeSampler:
        """A sampler of negatives from the lists: the judged pairs that are not positive."""
        first_caption: dict[int, int] = {}
        for index, key in enumerate(self._captions.keys.tolist()):
            first_caption.setdefault(key, index)
        images_of_key, captions_of_image = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
        for key, image in dict.fromkeys(zip(self._keys.tolist(), self._images.tolist(), strict=True)):
            caption = first_caption[key]
            if not positives.matrix(np.array([caption]), np.array([image]))[0, 0]:
                images_of_key[key].append(image)
                captions_of_image[image].append(caption)
        of_captions = _padded([images_of_key.get(key, []) for key in self._captions.keys.tolist()], per_sample)
        of_images = _padded([captions_of_image.get(image, []) for image in range(self._num_images)], per_sample)
        every = np.ones(len(self._captions), bool)
        return corpus_negatives(of_captions, of_images, (every, every), per_sample)


def _padded(lists: Sequence[list[int]], width: int) -> Ints:
    """Lists as rows of an array of at least this width, filled up with `MISSING`."""
    width = max(width, min(_MAX_NEGATIVES, max(map(len, lists), default=0)))
    rows = np.full((len(lists), width), MISSING, np.int64)
    for row, each in zip(rows, lists, strict=True):
        row[: len(each)] = each[:width]
    return rows
