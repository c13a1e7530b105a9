"""Which captions, images and pairs a step works on: a pure function of seed, phase, step and device.

Nothing is remembered between steps, so a run that is resumed at a step goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.training.negatives import NONE, Truth, draw, mine

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one step on one device. Captions and images are named once each, pairs by their places in these.

    Pairs come in three blocks: the B positives, then for each caption its n images (row by row), then for each image
    its n captions. A pair that does not exist has `NONE` for both places.
    """

    captions: Ints  # (W,) numbers in the corpus
    images: Ints  # (U,)
    own_caption: Ints  # (B,) places of the samples' own
    own_image: Ints  # (B,)
    pair_caption: Ints  # (B + 2 B n,)
    pair_image: Ints  # (B + 2 B n,)
    images_of_own: NDArray[np.bool_]  # (B, G): of which of all devices' samples the image is one of an own caption
    captions_of_own: NDArray[np.bool_]  # (B, G): of which of them the caption is one of an own image
    first: int  # where the own samples stand among those of all devices
    num_negatives: int  # n; 0 where no pairs are wanted


class Epochs:
    """The order in which captions are shown: every one once an epoch, on exactly one device.

    With `groups` (C,), captions of one group stand together, one of each image: what was made to be confused then meets
    in a batch, and whatever learns by contrast has to tell it apart.
    """

    def __init__(
        self, num_captions: int, global_batch: int, seed: int, images: Ints | None = None, groups: Ints | None = None
    ) -> None:
        if num_captions < global_batch:
            raise ValueError(f"{num_captions} captions do not fill a batch of {global_batch}")
        self._num_captions = num_captions
        self._images = images
        self._groups = groups
        self._kept: tuple[int, Ints] | None = None  # the order of the epoch that was asked for last
        self._global_batch = global_batch
        self._seed = seed
        self.steps_per_epoch = num_captions // global_batch

    def batch(self, step: int) -> Ints:
        """The captions of this step on all devices together; what does not fill a batch is left out of an epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._order(np.random.default_rng([self._seed, epoch]))
        return self._kept[1][place * self._global_batch : (place + 1) * self._global_batch]

    def _order(self, rng: np.random.Generator) -> Ints:
        shuffled = rng.permutation(self._num_captions)
        if self._images is None or self._groups is None:
            return shuffled
        # An image's captions come in rounds, one in each; within a round groups come in an order of their own.
        images, groups = self._images[shuffled], self._groups[shuffled]
        by_image = np.argsort(images, kind="stable")
        _, starts, counts = np.unique(images[by_image], return_index=True, return_counts=True)
        rounds = np.empty_like(shuffled)
        rounds[by_image] = np.arange(len(shuffled)) - np.repeat(starts, counts)
        places = rng.random((rounds.max() + 1, groups.max() + 1))[rounds, groups]
        return shuffled[np.lexsort((places, rounds))]


#: For captions and images of a batch, the negatives of each: (images for each caption, captions for each image).
Miner = Callable[[Ints, Ints, np.random.Generator], tuple[Ints, Ints]]


def plan_step(
    batch: Ints,
    images_of: Ints,
    truth: Truth,
    rank: int,
    num_devices: int,
    miner: Miner | None,
    num_negatives: int,
    rng: np.random.Generator,
) -> Plan:
    """The share of device `rank` in a global batch. The generator must be in the same state on every device."""
    images = images_of[batch]
    image_negatives = caption_negatives = np.empty((len(batch), 0), np.int64)
    if miner is not None:
        image_negatives, caption_negatives = miner(batch, images, rng)
    share = slice(rank * len(batch) // num_devices, (rank + 1) * len(batch) // num_devices)
    own_captions, own_images = batch[share], images[share]
    image_negatives, caption_negatives = image_negatives[share], caption_negatives[share]
    all_captions = _named(own_captions, caption_negatives)
    all_images = _named(own_images, image_negatives)
    own_caption, own_image = np.searchsorted(all_captions, own_captions), np.searchsorted(all_images, own_images)
    num = image_negatives.shape[1]
    pair_caption = np.concatenate((own_caption, np.repeat(own_caption, num), _places(all_captions, caption_negatives)))
    pair_image = np.concatenate((own_image, _places(all_images, image_negatives), np.repeat(own_image, num)))
    missing = (pair_caption == NONE) | (pair_image == NONE)
    pair_caption[missing] = pair_image[missing] = NONE
    return Plan(
        captions=all_captions,
        images=all_images,
        own_caption=own_caption,
        own_image=own_image,
        pair_caption=pair_caption,
        pair_image=pair_image,
        images_of_own=truth.of(own_captions, images),
        captions_of_own=truth.of(batch, own_images).T,
        first=share.start,
        num_negatives=num if miner else 0,
    )


def batch_miner(
    similarity: Callable[[Ints, Ints], NDArray[np.float32]], truth: Truth, per_sample: int, top_k: int
) -> Miner:
    """Negatives from the batch itself, by the first stage's similarity of its captions and images."""

    def negatives(captions: Ints, images: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        compared = similarity(captions, images)
        positive = truth.of(captions, images)
        columns = mine(compared, positive, per_sample=per_sample, top_k=top_k, rng=rng)
        rows = mine(compared.T, positive.T, per_sample=per_sample, top_k=top_k, rng=rng)
        return np.where(columns == NONE, NONE, images[columns]), np.where(rows == NONE, NONE, captions[rows])

    return negatives


def corpus_miner(
    best_images: Ints, best_captions: Ints, finds: tuple[NDArray[np.bool_], NDArray[np.bool_]], per_sample: int
) -> Miner:
    """Negatives from lists of the first stage's best mistakes, (C, M) images and (N, M) captions.

    `finds` says for each caption (C,) whether its image, and whether it itself, is handed over with them; see
    `handed_over`. If not, there are none.
    """
    finds_image, finds_caption = finds

    def negatives(captions: Ints, images: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        others, texts = draw(best_images[captions], per_sample, rng), draw(best_captions[images], per_sample, rng)
        others[~finds_image[captions]] = NONE
        texts[~finds_caption[captions]] = NONE
        return others, texts

    return negatives


def _named(own: Ints, negatives: Ints) -> Ints:
    return np.unique(np.concatenate((own, negatives[negatives != NONE])))


def _places(names: Ints, wanted: Ints) -> Ints:
    """Where the wanted ones stand in the sorted names, row by row in one array."""
    flat = wanted.reshape(-1)
    return np.where(flat == NONE, NONE, np.searchsorted(names, flat))
