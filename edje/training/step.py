"""One step's losses: the module that is differentiated, and that several devices wrap as one.

Holds the model, the first stage and what only training needs (the vocabulary head, the text recovery). Which pairs are
scored was decided before (`edje.training.batches.sampling`); only masked words and patches are drawn at random here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje.config import JointConfig
from edje.data.dataset import GroundingRole
from edje.first_stage.dual_encoder import FirstStageModel
from edje.model.edje import Edje
from edje.model.late_fusion import ApartEncoder
from edje.recipe import Phase
from edje.training.all_gather import gathered, gathered_texts
from edje.training.losses import (
    contrastive_loss,
    distillation_loss,
    grounding_loss,
    itm_loss,
    mlm_loss,
    regions_loss,
    text_recovery_loss,
)

_MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a `Plan` names, as tensors on the device."""

    text_ids: Tensor  # (W, T)
    text_lengths: Tensor  # (W,)
    text_states: Tensor | None  # (W, T, d): of frozen text layers, computed long ago
    images: Tensor  # (U, S, D) patch tokens, or uint8 (U, 3, H, W) for a tower in training
    pooled: Tensor | None  # (U, E) of a frozen tower
    own_caption: Tensor  # (B,)
    own_image: Tensor  # (B,)
    pair_caption: Tensor  # (P,), -1 where there is no pair
    pair_image: Tensor  # (P,)
    pair_score: Tensor  # (P,) of the first stage
    images_of_own: Tensor  # bool (B, G); see `Plan`
    captions_of_own: Tensor  # bool (B, G)
    first: int
    first_stage_texts: Tensor | None  # (B, e) the first stage's embeddings of the samples' captions
    num_negatives: int
    labels: Tensor | None = None  # (U, R, labels) of the images' regions, where they are known
    beside: Tensor | None = None  # (B,) samples beside whose images captions are read as well
    claims: Tensor | None = None  # (M, 4) of these 2 B pairs: pair, place of a piece, role, value; see `Claims`


class TrainingHeads(nn.Module):
    """What only training needs: words from states (its last map is the word table), the recovered text, what stands in
    each region of a picture, and what words say of them."""

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
        self.claims = nn.ModuleList(nn.Linear(joint.dim, size) for size in values if num_regions)

    def regions(self, patches: Tensor, grid: int) -> list[Tensor]:
        """(N, S, D) -> for each label (N, grid * grid, values): patches averaged over each region of a square grid."""
        side = math.isqrt(patches.shape[1])
        square = patches.transpose(1, 2).reshape(*patches.shape[::2], side, side)
        regions = functional.adaptive_avg_pool2d(square, grid).flatten(2).transpose(1, 2)
        return [label(regions) for label in self.labels]

    def words(self, states: Tensor, table: Tensor) -> Tensor:  # (M, d), (V, d) -> (M, V)
        hidden = self.norm(functional.gelu(self.transform(states)))
        return functional.linear(hidden, table, self.word_bias)


class TrainingStep(nn.Module):
    """Batch in, losses by name out, each a scalar, and the logits of the pairs."""

    def __init__(
        self, model: Edje, first_stage: FirstStageModel | None, heads: TrainingHeads, special_ids: tuple[int, int, int]
    ) -> None:
        """`special_ids` are those of [CLS], [SEP] and [MASK]."""
        super().__init__()
        self.model = model
        self.first_stage = first_stage
        self.heads = heads
        self._cls_id, self._sep_id, self._mask_id = special_ids
        self._phase: Phase | None = None
        self._teacher: Edje | None = None

    def begin(self, phase: Phase, teacher: Edje | None) -> None:
        """The losses of the steps that follow. The teacher is no part of this module: neither trained nor saved."""
        self._phase = phase
        object.__setattr__(self, "_teacher", teacher)

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep learned temperatures from running away, as CLIP does."""
        for name, parameter in self.named_parameters():
            if name.endswith("log_scale"):
                parameter.clamp_(max=_MAX_LOG_SCALE)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        phase = self._phase
        assert phase is not None  # `begin` comes first
        wanted = phase.losses
        losses: dict[str, Tensor] = {}
        patches, pooled = self._see(batch)
        patches = _dropped(patches, phase.token_dropout, self.training)
        visual = self.model.encode_patches(patches)
        if batch.text_states is None or phase.word_dropout:
            text = self._read(self._hidden(batch, phase.word_dropout)[0], batch.text_lengths)
        else:
            text = batch.text_states
        if "itm" in wanted or "distillation" in wanted:
            student = self._score(self.model, text, visual, batch, phase.score_dropout)
            if "itm" in wanted:
                losses["itm"] = itm_loss(*_by_direction(student, len(batch.own_caption), batch.num_negatives))
            if "distillation" in wanted:
                taught = self._taught(patches, batch)
                blocks = [len(batch.own_caption)] + 2 * [len(batch.own_caption) * batch.num_negatives]
                losses["distillation"] = distillation_loss(torch.split(student, blocks), torch.split(taught, blocks))
        if "late_interaction" in wanted:
            losses["late_interaction"] = self._late_interaction(text, visual, batch)
        if "mlm" in wanted:
            losses["mlm"] = self._masked_words(batch, visual, phase.mask_share)
        if "text_recovery" in wanted:
            losses["text_recovery"] = self._recovered(batch)
        if "regions" in wanted:
            assert batch.labels is not None  # the recipe was checked
            said = self.heads.regions(patches, math.isqrt(batch.labels.shape[1]))
            losses["regions"] = regions_loss(said, batch.labels)
        if "grounding" in wanted:
            losses["grounding"] = self._grounded(text, visual, batch)
        if "first_stage" in wanted:
            losses["first_stage"] = self._first_stage(batch, pooled)
        return losses

    def _see(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        is_pixels = batch.images.dtype == torch.uint8
        return self.model.extract(batch.images) if is_pixels else (batch.images, batch.pooled)

    def _read(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode_queries(ids, lengths)

    def _hidden(self, batch: Batch, share: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids with a share of the words replaced by [MASK], and where: (W, T), bool (W, T)."""
        ids = batch.text_ids if rows is None else batch.text_ids[rows]
        lengths = batch.text_lengths if rows is None else batch.text_lengths[rows]
        is_word = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        is_word &= (ids != self._cls_id) & (ids != self._sep_id)
        hidden = is_word & (torch.rand(ids.shape, device=ids.device) < (share if self.training else 0.0))
        return ids.masked_fill(hidden, self._mask_id), hidden

    def _score(self, model: Edje, text: Tensor, visual: Tensor, batch: Batch, score_dropout: float) -> Tensor:
        """Logits of the pairs, (P,); -inf for those that do not exist."""
        exists = batch.pair_caption >= 0
        captions, images = batch.pair_caption[exists], batch.pair_image[exists]
        scores = batch.pair_score[exists]
        if self.training and score_dropout:
            scores = scores.masked_fill(torch.rand_like(scores) < score_dropout, torch.nan)
        lengths = batch.text_lengths[captions]
        logits = model.score(text[captions], visual[images], lengths, scores).float()
        return logits.new_full(exists.shape, -torch.inf).masked_scatter(exists, logits)

    @torch.no_grad()
    def _taught(self, patches: Tensor, batch: Batch) -> Tensor:
        teacher = self._teacher
        assert teacher is not None  # the recipe was checked
        text = teacher.encode_queries(batch.text_ids, batch.text_lengths)
        return self._score(teacher, text, teacher.encode_patches(patches), batch, 0.0)

    def _late_interaction(self, text: Tensor, visual: Tensor, batch: Batch) -> Tensor:
        joint = self.model.joint
        assert isinstance(joint, ApartEncoder)  # the recipe was checked
        captions, lengths = text[batch.own_caption], batch.text_lengths[batch.own_caption]
        images = visual[batch.own_image]
        to_images = joint.similarity(captions, gathered(images), lengths)
        if len(to_images) == to_images.shape[1]:
            return _contrast(to_images, to_images.T, batch)  # one device: both ways are the same products
        all_captions, all_lengths = gathered_texts(captions, lengths)
        return _contrast(to_images, joint.similarity(all_captions, images, all_lengths).T, batch)

    def _masked_words(self, batch: Batch, visual: Tensor, share: float) -> Tensor:
        own = batch.own_caption
        ids, hidden = self._hidden(batch, share, own)
        lengths = batch.text_lengths[own]
        read = self.model.joint.read(self._read(ids, lengths), visual[batch.own_image], lengths)
        states = read[hidden].to(self.heads.transform.weight.dtype)
        return mlm_loss(self.heads.words(states, self.model.joint.words.weight), batch.text_ids[own][hidden])

    def _grounded(self, text: Tensor, visual: Tensor, batch: Batch) -> Tensor:
        """The mean over all layers whose words another layer reads."""
        assert batch.beside is not None  # the recipe was checked
        assert batch.claims is not None
        captions = batch.own_caption.repeat(2)
        images = torch.cat((batch.own_image, batch.own_image[batch.beside]))
        *states, _ = self.model.joint.read_by_layer(text[captions], visual[images], batch.text_lengths[captions])
        losses = []
        for each in states:
            by_role = []
            for role, head in enumerate(self.heads.claims):
                pair, place, _, value = batch.claims[batch.claims[:, 2] == role].unbind(1)
                by_role.append((head(each[pair, place].to(self.heads.transform.weight.dtype)), value))
            losses.append(grounding_loss(by_role))
        return torch.stack(losses).mean()

    def _recovered(self, batch: Batch) -> Tensor:
        own = batch.own_caption
        lengths = batch.text_lengths[own]
        alone = self.model.joint.read(self._read(batch.text_ids[own], lengths), None, lengths)[:, 0]
        assert batch.first_stage_texts is not None  # the run gives them with this loss
        return text_recovery_loss(self.heads.recover(alone), batch.first_stage_texts)

    def _first_stage(self, batch: Batch, pooled: Tensor | None) -> Tensor:
        first_stage = self.first_stage
        assert first_stage is not None  # the recipe was checked
        assert pooled is not None  # known of a frozen tower, computed by one in training
        own = batch.own_caption
        texts = first_stage.embed_texts(batch.text_ids[own], batch.text_lengths[own])
        images = first_stage.embed_images(pooled[batch.own_image])
        scale = first_stage.log_scale.exp()
        return _contrast(scale * texts @ gathered(images).T, scale * images @ gathered(texts).T, batch)


def total(losses: Mapping[str, Tensor], phase: Phase) -> Tensor:
    """The weighted sum that is differentiated."""
    return torch.stack([phase.losses[name] * value for name, value in losses.items()]).sum()  # type: ignore[index]


def _contrast(to_images: Tensor, to_captions: Tensor, batch: Batch) -> Tensor:
    """Both directions, (B, G) each: own captions with the images of all devices, own images with their captions."""
    with_images = contrastive_loss(to_images, batch.images_of_own, batch.first)
    return (with_images + contrastive_loss(to_captions, batch.captions_of_own, batch.first)) / 2


def _by_direction(logits: Tensor, num_samples: int, num_negatives: int) -> tuple[Tensor, Tensor]:
    """(B + 2 B n,) -> (B, 1 + n) of captions with images, (B, 1 + n) of images with captions."""
    own = logits[:num_samples, None]
    images, captions = logits[num_samples:].view(2, num_samples, num_negatives)
    return torch.cat((own, images), dim=1), torch.cat((own, captions), dim=1)


def _dropped(patches: Tensor, share: float, is_training: bool) -> Tensor:
    """Patches with a share of them blank; places keep their meaning."""
    if not share or not is_training:
        return patches
    return patches * (torch.rand(patches.shape[:2], device=patches.device) >= share)[..., None]
