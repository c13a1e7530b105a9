"""The module that is differentiated: computes the losses of one batch.

Contains the model, the first stage and the training heads. The batch plan (`edje.training.batches.plan`) has chosen the
pairs; only masked words and dropped patches are drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje.config import JointConfig
from edje.data.dataset import GroundingRole
from edje.first_stage.dual_encoder import DualEncoder
from edje.model.edje import Edje
from edje.model.late_fusion import LateFusionEncoder
from edje.recipe import PAIR_LOSSES, TEACHER_LOSSES, Phase
from edje.training.batches.batch import Batch
from edje.training.devices import all_gather, all_gather_texts
from edje.training.losses import (
    contrastive_loss,
    distillation_loss,
    grounding_loss,
    itm_loss,
    kl_loss,
    margin_mse_loss,
    mlm_loss,
    regions_loss,
    text_recovery_loss,
)

_MAX_LOG_SCALE = math.log(100.0)


class TrainingHeads(nn.Module):
    """Heads that only training needs: masked words, the recovered text embedding, region and grounding labels."""

    def __init__(
        self,
        joint: JointConfig,
        first_stage_dim: int,
        vision_dim: int = 0,
        label_sizes: tuple[int, ...] = (),
        num_regions: int = 0,
    ) -> None:
        super().__init__()
        self.transform = nn.Linear(joint.dim, joint.dim)
        self.norm = nn.LayerNorm(joint.dim, eps=joint.norm_eps)
        self.word_bias = nn.Parameter(torch.zeros(joint.vocab_size))
        self.recover = nn.Linear(joint.dim, first_stage_dim)
        self.labels = nn.ModuleList(nn.Linear(vision_dim, size) for size in label_sizes)
        values = [2 if role == GroundingRole.HOLDS else num_regions for role in GroundingRole]
        self.grounding = nn.ModuleList(nn.Linear(joint.dim, size) for size in values if num_regions)

    def region_logits(self, patches: Tensor, grid: int) -> list[Tensor]:
        """Patches (N, S, D), averaged over each cell of a square grid -> for each label (N, grid * grid, values)."""
        side = math.isqrt(patches.shape[1])
        square = patches.transpose(1, 2).reshape(*patches.shape[::2], side, side)
        regions = functional.adaptive_avg_pool2d(square, grid).flatten(2).transpose(1, 2)
        return [label(regions) for label in self.labels]

    def word_logits(self, states: Tensor, word_table: Tensor) -> Tensor:
        """States (M, d) and the word table (V, d) -> (M, V)."""
        hidden = self.norm(functional.gelu(self.transform(states)))
        return functional.linear(hidden, word_table, self.word_bias)


class TrainingStep(nn.Module):
    """Computes the losses of a batch: by name, each a scalar."""

    def __init__(
        self, model: Edje, first_stage: DualEncoder | None, heads: TrainingHeads, special_ids: tuple[int, int, int]
    ) -> None:
        """`special_ids` are the ids of [CLS], [SEP] and [MASK]."""
        super().__init__()
        self.model = model
        self.first_stage = first_stage
        self.heads = heads
        self._cls_id, self._sep_id, self._mask_id = special_ids
        self._phase: Phase | None = None
        self._teacher: Edje | None = None

    def set_phase(self, phase: Phase, teacher: Edje | None) -> None:
        """Set the losses of the next steps. The teacher is not a submodule: it is neither trained nor saved."""
        self._phase = phase
        object.__setattr__(self, "_teacher", teacher)

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Limit learned temperatures, as CLIP does."""
        for name, parameter in self.named_parameters():
            if name.endswith("log_scale"):
                parameter.clamp_(max=_MAX_LOG_SCALE)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of the phase by name."""
        phase = self._phase
        assert phase is not None  # `set_phase` comes first
        wanted = phase.losses
        losses: dict[str, Tensor] = {}
        patches, pooled = self._patches(batch)
        patches = _drop_patches(patches, phase.token_dropout, self.training)
        visual = self.model.encode_patches(patches)
        if batch.text_states is None or phase.word_dropout:
            text = self._encode_text(self._mask_words(batch, phase.word_dropout)[0], batch.text_lengths)
        else:
            text = batch.text_states
        if PAIR_LOSSES & wanted.keys():
            losses |= self._pair_losses(text, visual, patches, batch, phase)
        if "late_interaction" in wanted:
            losses["late_interaction"] = self._late_interaction_loss(text, visual, batch)
        if "mlm" in wanted:
            losses["mlm"] = self._masked_words_loss(batch, visual, phase.mask_share)
        if "text_recovery" in wanted:
            losses["text_recovery"] = self._text_recovery_loss(batch)
        if "regions" in wanted:
            assert batch.region_labels is not None  # the recipe ensures it
            region_logits = self.heads.region_logits(patches, math.isqrt(batch.region_labels.shape[1]))
            losses["regions"] = regions_loss(region_logits, batch.region_labels)
        if "grounding" in wanted:
            losses["grounding"] = self._grounding_loss(text, visual, batch)
        if "first_stage" in wanted:
            losses["first_stage"] = self._first_stage_loss(batch, pooled)
        return losses

    def _pair_losses(
        self, text: Tensor, visual: Tensor, patches: Tensor, batch: Batch, phase: Phase
    ) -> dict[str, Tensor]:
        num_samples, num_negatives = len(batch.sample_caption), batch.num_negatives
        logits = self._pair_logits(self.model, text, visual, batch)
        by_direction = _by_direction(logits, num_samples, num_negatives)
        losses: dict[str, Tensor] = {}
        if "itm" in phase.losses:
            losses["itm"] = itm_loss(*by_direction)
        if not TEACHER_LOSSES & phase.losses.keys():
            return losses
        targets = phase.teacher_scale * self._teacher_scores(patches, batch)
        if "distillation" in phase.losses:
            blocks = [num_samples] + 2 * [num_samples * num_negatives]
            losses["distillation"] = distillation_loss(torch.split(logits, blocks), torch.split(targets, blocks))
        targets_by_direction = _by_direction(targets, num_samples, num_negatives)
        if "margin_mse" in phase.losses:
            losses["margin_mse"] = margin_mse_loss(by_direction, targets_by_direction)
        if "kl" in phase.losses:
            losses["kl"] = kl_loss(by_direction, targets_by_direction)
        return losses

    def _patches(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        is_pixels = batch.images.dtype == torch.uint8
        return self.model.run_tower(batch.images) if is_pixels else (batch.images, batch.pooled)

    def _encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode_queries(ids, lengths)

    def _mask_words(self, batch: Batch, share: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids with a share of the words replaced by [MASK], and the mask: (W, T), bool (W, T)."""
        ids = batch.text_ids if rows is None else batch.text_ids[rows]
        lengths = batch.text_lengths if rows is None else batch.text_lengths[rows]
        is_word = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        is_word &= (ids != self._cls_id) & (ids != self._sep_id)
        is_masked = is_word & (torch.rand(ids.shape, device=ids.device) < (share if self.training else 0.0))
        return ids.masked_fill(is_masked, self._mask_id), is_masked

    def _pair_logits(self, model: Edje, text: Tensor, visual: Tensor, batch: Batch) -> Tensor:
        """The logits of the pairs (P,), -inf for pairs that do not exist."""
        exists = batch.pair_caption >= 0
        captions, images = batch.pair_caption[exists], batch.pair_image[exists]
        lengths = batch.text_lengths[captions]
        logits = model.score(text[captions], visual[images], lengths).float()
        return logits.new_full(exists.shape, -torch.inf).masked_scatter(exists, logits)

    @torch.no_grad()
    def _teacher_scores(self, patches: Tensor, batch: Batch) -> Tensor:
        """The teacher's logits of the pairs (P,), or its scores in the data; not finite where unknown."""
        teacher = self._teacher
        if teacher is None:
            assert batch.teacher_scores is not None  # `PhaseData` ensures it
            return batch.teacher_scores
        text = teacher.encode_queries(batch.text_ids, batch.text_lengths)
        return self._pair_logits(teacher, text, teacher.encode_patches(patches), batch)

    def _late_interaction_loss(self, text: Tensor, visual: Tensor, batch: Batch) -> Tensor:
        joint = self.model.joint
        assert isinstance(joint, LateFusionEncoder)  # the recipe ensures it
        captions, lengths = text[batch.sample_caption], batch.text_lengths[batch.sample_caption]
        images = visual[batch.sample_image]
        to_images = joint.similarity(captions, all_gather(images), lengths)
        if len(to_images) == to_images.shape[1]:
            return _contrast(to_images, to_images.T, batch)  # one device: both directions have the same products
        all_captions, all_lengths = all_gather_texts(captions, lengths)
        return _contrast(to_images, joint.similarity(all_captions, images, all_lengths).T, batch)

    def _masked_words_loss(self, batch: Batch, visual: Tensor, share: float) -> Tensor:
        samples = batch.sample_caption
        ids, is_masked = self._mask_words(batch, share, samples)
        lengths = batch.text_lengths[samples]
        read = self.model.joint.text_states(self._encode_text(ids, lengths), visual[batch.sample_image], lengths)
        states = read[is_masked].to(self.heads.transform.weight.dtype)
        logits = self.heads.word_logits(states, self.model.joint.words.weight)
        return mlm_loss(logits, batch.text_ids[samples][is_masked])

    def _grounding_loss(self, text: Tensor, visual: Tensor, batch: Batch) -> Tensor:
        """The mean over all layers but the last, whose word states no layer reads."""
        assert batch.other_sample is not None  # the recipe ensures it
        assert batch.grounding_labels is not None
        captions = batch.sample_caption.repeat(2)
        images = torch.cat((batch.sample_image, batch.sample_image[batch.other_sample]))
        *states, _ = self.model.joint.text_states_by_layer(text[captions], visual[images], batch.text_lengths[captions])
        losses = []
        for layer_states in states:
            by_role = []
            for role, head in enumerate(self.heads.grounding):
                labels = batch.grounding_labels[batch.grounding_labels[:, 2] == role]
                pair, position, _, value = labels.unbind(1)
                by_role.append((head(layer_states[pair, position].to(self.heads.transform.weight.dtype)), value))
            losses.append(grounding_loss(by_role))
        return torch.stack(losses).mean()

    def _text_recovery_loss(self, batch: Batch) -> Tensor:
        samples = batch.sample_caption
        lengths = batch.text_lengths[samples]
        cls_state = self.model.joint.text_states(self._encode_text(batch.text_ids[samples], lengths), None, lengths)[
            :, 0
        ]
        assert batch.caption_embeddings is not None  # the recipe ensures it
        return text_recovery_loss(self.heads.recover(cls_state), batch.caption_embeddings)

    def _first_stage_loss(self, batch: Batch, pooled: Tensor | None) -> Tensor:
        first_stage = self.first_stage
        assert first_stage is not None  # the recipe ensures it
        assert pooled is not None  # stored for a frozen tower, computed by one in training
        samples = batch.sample_caption
        texts = first_stage.embed_texts(batch.text_ids[samples], batch.text_lengths[samples])
        images = first_stage.embed_images(pooled[batch.sample_image])
        scale = first_stage.log_scale.exp()
        return _contrast(scale * texts @ all_gather(images).T, scale * images @ all_gather(texts).T, batch)


def total(losses: Mapping[str, Tensor], phase: Phase) -> Tensor:
    """The weighted sum of the losses."""
    return torch.stack([phase.losses[name] * value for name, value in losses.items()]).sum()  # type: ignore[index]


def _contrast(to_images: Tensor, to_captions: Tensor, batch: Batch) -> Tensor:
    """Both directions, (B, G) each: this device's captions with all images, its images with all captions."""
    with_images = contrastive_loss(to_images, batch.image_is_positive, batch.sample_offset)
    return (with_images + contrastive_loss(to_captions, batch.caption_is_positive, batch.sample_offset)) / 2


def _by_direction(logits: Tensor, num_samples: int, num_negatives: int) -> tuple[Tensor, Tensor]:
    """Pairs (B + 2 B n,) -> (B, 1 + n) of captions with images, (B, 1 + n) of images with captions."""
    positives = logits[:num_samples, None]
    images, captions = logits[num_samples:].view(2, num_samples, num_negatives)
    return torch.cat((positives, images), dim=1), torch.cat((positives, captions), dim=1)


def _drop_patches(patches: Tensor, share: float, is_training: bool) -> Tensor:
    """The patches with a share of them set to zero; positions stay the same."""
    if not share or not is_training:
        return patches
    return patches * (torch.rand(patches.shape[:2], device=patches.device) >= share)[..., None]
