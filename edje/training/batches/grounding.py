"""What the words of a batch's captions say beside its images, where the data knows it: what `grounding` is taught from.

A claim that is true teaches little without one that is not, so each caption is also read beside an image of another
sample, one of which something that it says is false if there is one close by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edje.data.dataset import GroundingLabel, GroundingRole, LabelledSource
from edje.text import Tokenizer
from edje.training.corpus import Captions, Ints

#: So many samples after a caption's own are asked; a group of scenes has three others.
_NUM_CLOSE = 3


@dataclass(frozen=True, slots=True)
class Claims:
    """The pairs of a batch that are read: first every sample's caption with its own image, then with another's."""

    beside: Ints  # (B,) the samples whose images are the others
    rows: Ints  # (M, 4): pair, place of the piece in the caption, role, value


class ClaimReader:
    """Reads captions of the corpus beside its images."""

    def __init__(self, source: LabelledSource, captions: Captions, tokenizer: Tokenizer) -> None:
        self._source = source
        self._captions = captions
        self._tokenizer = tokenizer

    def __call__(self, captions: Ints, images: Ints) -> Claims:
        """Of samples: numbers of captions and of their images, both (B,)."""
        num = len(captions)
        beside = np.zeros(num, np.int64)
        found: list[list[GroundingLabel]] = []
        texts = [self._captions.texts[number] for number in captions]
        read = [self._tokenizer.as_read(text) for text in texts]
        for sample, text in enumerate(read):
            close = [(sample + step) % num for step in range(1, 1 + _NUM_CLOSE)]
            said = {other: self._source.grounding_labels(int(images[other]), text) for other in reversed(close)}
            beside[sample] = next((other for other in close if _is_false(said[other])), close[0])
            found.append(said[int(beside[sample])])
        own = [self._source.grounding_labels(int(image), text) for image, text in zip(images, read, strict=True)]
        rows = [
            (pair, place, claim.role, claim.value)
            for pair, (text, claims) in enumerate(zip(texts + texts, own + found, strict=True))
            for place, claim in zip(self._tokenizer.pieces_at(text, [c.char for c in claims]), claims, strict=True)
            if place is not None  # else it was cut off
        ]
        return Claims(beside, np.array(rows, np.int64).reshape(-1, 4))


def _is_false(claims: list[GroundingLabel]) -> bool:
    return any(claim.role == GroundingRole.HOLDS and not claim.value for claim in claims)
