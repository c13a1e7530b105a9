"""Grounding labels of a batch, which are the targets of the loss `grounding`.

Labels of matching pairs alone are nearly all positive. Each caption is therefore also read with the image of another
sample, preferably one for which a relation in the caption does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edje.data.dataset import GroundingLabel, GroundingRole, LabelledSource
from edje.text import Tokenizer
from edje.training.batches.corpus import Captions
from edje.training.batches.negatives import Ints

#: The number of following samples whose images are tried; a group of scenes has three confusers.
_NUM_TRIED = 3


@dataclass(frozen=True, slots=True)
class GroundingBatch:
    """Grounding labels of 2 B pairs: first each sample's caption with its image, then with another sample's image."""

    other_sample: Ints  # (B,) the samples whose images the captions are read with the second time
    labels: Ints  # (M, 4): pair, token position in the caption, role, value


class GroundingLabeller:
    """Looks up the grounding labels of samples."""

    def __init__(self, source: LabelledSource, captions: Captions, tokenizer: Tokenizer) -> None:
        self._source = source
        self._captions = captions
        self._tokenizer = tokenizer

    def __call__(self, captions: Ints, images: Ints) -> GroundingBatch:
        """The labels of samples, given by their caption and image indices (B,) each."""
        num = len(captions)
        other_sample = np.zeros(num, np.int64)
        other_labels: list[list[GroundingLabel]] = []
        texts = [self._captions.texts[index] for index in captions]
        canonical = [self._tokenizer.normalise(text) for text in texts]
        for sample, text in enumerate(canonical):
            tried = [(sample + step) % num for step in range(1, 1 + _NUM_TRIED)]
            found = {other: self._source.grounding_labels(int(images[other]), text) for other in reversed(tried)}
            other_sample[sample] = next((other for other in tried if _has_false_relation(found[other])), tried[0])
            other_labels.append(found[int(other_sample[sample])])
        own_labels = [
            self._source.grounding_labels(int(image), text) for image, text in zip(images, canonical, strict=True)
        ]
        rows = [
            (pair, position, label.role, label.value)
            for pair, (text, labels) in enumerate(zip(texts + texts, own_labels + other_labels, strict=True))
            for position, label in zip(
                self._tokenizer.token_positions(text, [each.char for each in labels]), labels, strict=True
            )
            if position is not None  # else the caption is truncated before it
        ]
        return GroundingBatch(other_sample, np.array(rows, np.int64).reshape(-1, 4))


def _has_false_relation(labels: list[GroundingLabel]) -> bool:
    return any(label.role == GroundingRole.HOLDS and not label.value for label in labels)
