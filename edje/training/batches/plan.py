"""Which captions, images and pairs a batch contains: a pure function of seed, phase, batch number and device.

Nothing is remembered between batches, so a resumed run continues exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.training.batches.negatives import MISSING, Ints, NegativeSampler, Positives


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The content of one batch on one device, as indices.

    A batch has B samples: a caption and its image. `captions` and `images` list each index once; all other index arrays
    are positions in these two. Pairs form three blocks: B positives, then n images for each caption, then n captions
    for each image. A pair that does not exist is `MISSING` in both arrays. G is the number of samples of all devices.
    """

    captions: Ints  # (W,) indices in the corpus
    images: Ints  # (U,)
    sample_caption: Ints  # (B,)
    sample_image: Ints  # (B,)
    pair_caption: Ints  # (B + 2 B n,)
    pair_image: Ints  # (B + 2 B n,)
    image_is_positive: NDArray[np.bool_]  # (B, G): whether the image of a global sample is positive for this caption
    caption_is_positive: NDArray[np.bool_]  # (B, G): whether the caption of a global sample is positive for this image
    sample_offset: int  # position of this device's first sample among all samples
    num_negatives: int  # n; 0 without pairs


class CaptionOrder:
    """The order of captions: each once per epoch, on exactly one device.

    A step uses the same captions on any number of devices, if the number of captions per step is the same.

    With `groups` (C,), captions of one group are adjacent, one caption of each image, so that a batch contains images
    together with their confusers.
    """

    def __init__(
        self,
        num_captions: int,
        captions_per_step: int,
        seed: int,
        images: Ints | None = None,
        groups: Ints | None = None,
        batches_per_step: int = 1,
    ) -> None:
        """`images` (C,) and `groups` (C,) belong to the captions. Raises `ValueError` if no step can be filled."""
        if num_captions < captions_per_step:
            raise ValueError(f"{num_captions} captions do not fill a step of {captions_per_step}")
        self._images = images
        self._groups = groups
        self._latest: tuple[int, Ints] | None = None  # the latest epoch and its order
        self._seed = seed
        self.batches_per_step = batches_per_step
        self.num_captions = num_captions
        self.captions_per_step = captions_per_step
        self.steps_per_epoch = num_captions // captions_per_step

    def batch(self, number: int) -> Ints:
        """The captions of this batch on all devices. An epoch leaves out the last captions that do not fill a step."""
        step, part = divmod(number, self.batches_per_step)
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._order(np.random.default_rng([self._seed, epoch]))
        size = self.captions_per_step // self.batches_per_step
        start = position * self.captions_per_step + part * size
        return self._latest[1][start : start + size]

    def _order(self, rng: np.random.Generator) -> Ints:
        shuffled = rng.permutation(self.num_captions)
        if self._images is None or self._groups is None:
            return shuffled
        # Round r contains the r-th caption of every image; within a round, groups have a random order.
        images, groups = self._images[shuffled], self._groups[shuffled]
        by_image = np.argsort(images, kind="stable")
        _, starts, counts = np.unique(images[by_image], return_index=True, return_counts=True)
        rounds = np.empty_like(shuffled)
        rounds[by_image] = np.arange(len(shuffled)) - np.repeat(starts, counts)
        group_order = rng.random((rounds.max() + 1, groups.max() + 1))[rounds, groups]
        return shuffled[np.lexsort((group_order, rounds))]


def plan_batch(
    batch: Ints,
    images_of: Ints,
    positives: Positives,
    rank: int,
    num_devices: int,
    sampler: NegativeSampler | None,
    rng: np.random.Generator,
) -> BatchPlan:
    """The share of device `rank` in a global batch of captions. The generator has the same state on every device."""
    images = images_of[batch]
    negative_images = negative_captions = np.empty((len(batch), 0), np.int64)
    if sampler is not None:
        negative_images, negative_captions = sampler(batch, images, rng)
    share = slice(rank * len(batch) // num_devices, (rank + 1) * len(batch) // num_devices)
    own_captions, own_images = batch[share], images[share]
    negative_images, negative_captions = negative_images[share], negative_captions[share]
    all_captions = _distinct(own_captions, negative_captions)
    all_images = _distinct(own_images, negative_images)
    sample_caption, sample_image = np.searchsorted(all_captions, own_captions), np.searchsorted(all_images, own_images)
    num = negative_images.shape[1]
    pair_caption = np.concatenate(
        (sample_caption, np.repeat(sample_caption, num), _positions(all_captions, negative_captions))
    )
    pair_image = np.concatenate((sample_image, _positions(all_images, negative_images), np.repeat(sample_image, num)))
    is_missing = (pair_caption == MISSING) | (pair_image == MISSING)
    pair_caption[is_missing] = pair_image[is_missing] = MISSING
    return BatchPlan(
        captions=all_captions,
        images=all_images,
        sample_caption=sample_caption,
        sample_image=sample_image,
        pair_caption=pair_caption,
        pair_image=pair_image,
        image_is_positive=positives.matrix(own_captions, images),
        caption_is_positive=positives.matrix(batch, own_images).T,
        sample_offset=share.start,
        num_negatives=num,
    )


def _distinct(samples: Ints, negatives: Ints) -> Ints:
    return np.unique(np.concatenate((samples, negatives[negatives != MISSING])))


def _positions(indices: Ints, wanted: Ints) -> Ints:
    """Positions of the wanted indices in the sorted `indices`, flattened row by row."""
    flat = wanted.reshape(-1)
    return np.where(flat == MISSING, MISSING, np.searchsorted(indices, flat))
