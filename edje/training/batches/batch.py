"""What a step works on, as tensors: the plan of its number, filled with captions, features and first-stage scores.

Every device makes the same plan and fills its own share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from edje.data.dataset import LabelledSource
from edje.training.batches.grounding import ClaimReader
from edje.training.batches.sampling import Epochs, Miner, Plan, plan_step
from edje.training.batches.text_states import TextStates
from edje.training.corpus import Captions, ImageRows
from edje.training.devices import Devices
from edje.training.first_stage.pairs import FirstStageViews
from edje.training.negatives import Truth
from edje.training.step import Batch


@dataclass(frozen=True, slots=True)
class Batches:
    """All a phase shows, and in which order."""

    captions: Captions
    truth: Truth
    order: Epochs
    images: ImageRows
    views: FirstStageViews | None  # None while the first stage is being trained
    states: TextStates | None  # of frozen text layers
    miner: Miner | None  # None where no pairs are scored
    num_negatives: int
    devices: Devices
    labels: LabelledSource | None = None  # None where nobody learns what stands where
    claims: ClaimReader | None = None  # None where nobody learns what words say

    def __call__(self, number: int, rng: np.random.Generator) -> Batch:
        """This device's share of batch `number`; the generator must be in the same state on every device."""
        plan = plan_step(
            self.order.batch(number),
            self.captions.images,
            self.truth,
            self.devices.rank,
            self.devices.num_devices,
            self.miner,
            self.num_negatives if self.miner else 0,
            rng,
        )
        return self._filled(plan, rng.integers(0, self.images.num_views, len(plan.images)))

    def _filled(self, plan: Plan, view: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Batch:
        device = self.devices.device
        ids, lengths = self.captions.padded(plan.captions)
        images, pooled = self.images.rows(plan.images, view)
        scores = np.full(len(plan.pair_caption), np.nan, np.float32)
        texts = None
        if self.views is not None:
            exists = plan.pair_caption >= 0
            pairs = plan.captions[plan.pair_caption[exists]], plan.images[plan.pair_image[exists]]
            scores[exists] = self.views.of_pairs(*pairs)
            texts = torch.from_numpy(self.views.texts[plan.captions[plan.own_caption]]).to(device)
        numbers = (plan.own_caption, plan.own_image, plan.pair_caption, plan.pair_image)
        own_caption, own_image, pair_caption, pair_image = (torch.from_numpy(each).to(device) for each in numbers)
        beside, claims = self._claims(plan)
        return Batch(
            text_ids=ids.to(device),
            text_lengths=lengths.to(device),
            text_states=None if self.states is None else self.states.padded(plan.captions).to(device),
            images=images.to(device),
            pooled=None if pooled is None else pooled.to(device),
            own_caption=own_caption,
            own_image=own_image,
            pair_caption=pair_caption,
            pair_image=pair_image,
            pair_score=torch.from_numpy(scores).to(device),
            images_of_own=torch.from_numpy(plan.images_of_own).to(device),
            captions_of_own=torch.from_numpy(plan.captions_of_own).to(device),
            first=plan.first,
            first_stage_texts=texts,
            num_negatives=plan.num_negatives,
            labels=self._labels(plan),
            beside=beside,
            claims=claims,
        )

    def _labels(self, plan: Plan) -> torch.Tensor | None:
        if self.labels is None:
            return None
        labels = np.stack([self.labels.labels(int(number)) for number in plan.images])
        return torch.from_numpy(labels).to(self.devices.device)

    def _claims(self, plan: Plan) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.claims is None:
            return None, None
        claims = self.claims(plan.captions[plan.own_caption], plan.images[plan.own_image])
        device = self.devices.device
        return torch.from_numpy(claims.beside).to(device), torch.from_numpy(claims.rows).to(device)
