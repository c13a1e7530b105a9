"""A batch as tensors, and its construction from a plan, the captions, the images and the first stage's scores.

Every device makes the same plan and builds its share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edje.data.dataset import LabelledSource
from edje.training.batches.corpus import Captions, ImageSource
from edje.training.batches.embeddings import FirstStageEmbeddings
from edje.training.batches.grounding import GroundingLabeller
from edje.training.batches.judged import JudgedPairs
from edje.training.batches.negatives import Ints, NegativeSampler, Positives
from edje.training.batches.plan import BatchPlan, CaptionOrder, plan_batch
from edje.training.batches.text_states import TextStates


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch on the device. See `BatchPlan` for samples, pairs and the letters of the shapes."""

    text_ids: Tensor  # (W, T)
    text_lengths: Tensor  # (W,)
    text_states: Tensor | None  # (W, T, d), cached output of frozen text layers
    images: Tensor  # (U, S, D) patch tokens, or uint8 (U, 3, H, W) pixels
    pooled: Tensor | None  # (U, E) of a frozen tower
    sample_caption: Tensor  # (B,)
    sample_image: Tensor  # (B,)
    pair_caption: Tensor  # (P,), -1 where the pair does not exist
    pair_image: Tensor  # (P,)
    teacher_scores: Tensor | None  # (P,) from the data, NaN where unknown
    image_is_positive: Tensor  # bool (B, G)
    caption_is_positive: Tensor  # bool (B, G)
    sample_offset: int
    num_negatives: int
    caption_embeddings: Tensor | None  # (B, e) the first stage's embeddings of the samples' captions
    region_labels: Tensor | None = None  # (U, R, labels)
    other_sample: Tensor | None = None  # (B,) see `GroundingBatch`
    grounding_labels: Tensor | None = None  # (M, 4) see `GroundingBatch`


@dataclass(frozen=True, slots=True)
class BatchBuilder:
    """The data of one phase; builds its batches by number."""

    captions: Captions
    positives: Positives
    order: CaptionOrder
    images: ImageSource
    embeddings: FirstStageEmbeddings | None  # None while the first stage is trained
    text_states: TextStates | None  # None where the text layers are trained
    sampler: NegativeSampler | None  # None without pairs
    judged: JudgedPairs | None  # None where the data has no teacher's scores
    rank: int
    num_devices: int
    device: torch.device
    region_labels: LabelledSource | None = None  # None without the loss `regions`
    grounding: GroundingLabeller | None = None  # None without the loss `grounding`

    def __call__(self, number: int, rng: np.random.Generator) -> Batch:
        """This device's share of batch `number`. The generator has the same state on every device."""
        batch = self.order.batch(number)
        plan = plan_batch(batch, self.captions.images, self.positives, self.rank, self.num_devices, self.sampler, rng)
        return self._build(plan, rng.integers(0, self.images.num_views, len(plan.images)))

    def _build(self, plan: BatchPlan, views: Ints) -> Batch:
        device = self.device
        ids, lengths = self.captions.padded(plan.captions)
        images, pooled = self.images.batch(plan.images, views)
        caption_embeddings = None
        if self.embeddings is not None:
            wanted = self.embeddings.captions[plan.captions[plan.sample_caption]]
            caption_embeddings = torch.from_numpy(wanted).to(device)
        other_sample, grounding_labels = self._grounding(plan)
        return Batch(
            text_ids=ids.to(device),
            text_lengths=lengths.to(device),
            text_states=None if self.text_states is None else self.text_states.padded(plan.captions).to(device),
            images=images.to(device),
            pooled=None if pooled is None else pooled.to(device),
            sample_caption=torch.from_numpy(plan.sample_caption).to(device),
            sample_image=torch.from_numpy(plan.sample_image).to(device),
            pair_caption=torch.from_numpy(plan.pair_caption).to(device),
            pair_image=torch.from_numpy(plan.pair_image).to(device),
            teacher_scores=self._teacher_scores(plan),
            image_is_positive=torch.from_numpy(plan.image_is_positive).to(device),
            caption_is_positive=torch.from_numpy(plan.caption_is_positive).to(device),
            sample_offset=plan.sample_offset,
            num_negatives=plan.num_negatives,
            caption_embeddings=caption_embeddings,
            region_labels=self._region_labels(plan),
            other_sample=other_sample,
            grounding_labels=grounding_labels,
        )

    def _teacher_scores(self, plan: BatchPlan) -> Tensor | None:
        if self.judged is None:
            return None
        scores = np.full(len(plan.pair_caption), np.nan, np.float32)
        exists = plan.pair_caption >= 0
        captions, images = plan.captions[plan.pair_caption[exists]], plan.images[plan.pair_image[exists]]
        scores[exists] = self.judged.scores(captions, images)
        return torch.from_numpy(scores).to(self.device)

    def _region_labels(self, plan: BatchPlan) -> Tensor | None:
        if self.region_labels is None:
            return None
        labels = np.stack([self.region_labels.labels(int(index)) for index in plan.images])
        return torch.from_numpy(labels).to(self.device)

    def _grounding(self, plan: BatchPlan) -> tuple[Tensor | None, Tensor | None]:
        if self.grounding is None:
            return None, None
        found = self.grounding(plan.captions[plan.sample_caption], plan.images[plan.sample_image])
        return torch.from_numpy(found.other_sample).to(self.device), torch.from_numpy(found.labels).to(self.device)
