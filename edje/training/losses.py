"""Loss functions of tensors: those of the paper (arXiv 2510.06820, section 3), contrast, region and grounding labels.

Every loss is a mean over its batch, so that its weight has the same effect for every batch size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def itm_loss(with_images: Tensor, with_texts: Tensor) -> Tensor:
    """Image-text matching: softmax cross-entropy of a positive among its negatives, averaged over both directions.

    `with_images` (B, 1 + n): logits of a caption with its image, then with n other images.
    `with_texts` (B, 1 + n): logits of an image with its caption, then with n other captions.
    A logit of -inf marks a negative that does not exist.
    """
    return (_first_wins(with_images) + _first_wins(with_texts)) / 2


def mlm_loss(vocabulary_logits: Tensor, masked_ids: Tensor) -> Tensor:
    """Masked language modelling: logits (M, V) at the masked positions against the original ids (M,)."""
    if len(masked_ids) == 0:
        return vocabulary_logits.sum()  # zero, with a gradient of zero
    return functional.cross_entropy(vocabulary_logits.float(), masked_ids)


def text_recovery_loss(recovered: Tensor, target: Tensor) -> Tensor:
    """1 - cosine between the joint encoder's embedding of a text alone and the first stage's embedding, (B, e) each."""
    return (1 - functional.cosine_similarity(recovered.float(), target.float(), dim=-1)).mean()


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of the student's logits against the teacher's probabilities.

    Blocks of pairs (positives, negatives of captions, negatives of images) have equal weight whatever their size. A
    logit of -inf marks a pair that does not exist; a block without pairs is ignored.
    """
    losses = []
    for student_logits, teacher_logits in zip(student, teacher, strict=True):
        exists = torch.isfinite(student_logits) & torch.isfinite(teacher_logits)
        if exists.any():
            target = teacher_logits[exists].float().sigmoid()
            losses.append(functional.binary_cross_entropy_with_logits(student_logits[exists].float(), target))
    return torch.stack(losses).mean() if losses else _mean_or_zero(student[0][:0], student)


def margin_mse_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error of the student's margins between positive and negatives against the teacher's (2010.02666).

    Each tensor is (B, 1 + n), a positive and its negatives. Pairs with a score that is not finite are left out; without
    any pair the loss is zero.
    """
    errors = []
    for student_logits, teacher_scores in zip(student, teacher, strict=True):
        exists = torch.isfinite(student_logits) & torch.isfinite(teacher_scores)
        exists = exists[:, 1:] & exists[:, :1]
        ours = (student_logits[:, :1] - student_logits[:, 1:])[exists].float()
        errors.append((ours - (teacher_scores[:, :1] - teacher_scores[:, 1:])[exists].float()).square())
    return _mean_or_zero(torch.cat(errors), student)


def kl_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """KL divergence of the student's distribution over the candidates of a query from the teacher's.

    Each tensor is (B, 1 + n), the candidates of a query. Pairs with a score that is not finite are left out, and
    queries with less than two candidates; without any query the loss is zero.
    """
    divergences = []
    for student_logits, teacher_scores in zip(student, teacher, strict=True):
        exists = torch.isfinite(student_logits) & torch.isfinite(teacher_scores)
        rows = exists.sum(dim=1) > 1
        exists = exists[rows]
        ours = _log_softmax(student_logits[rows].float(), exists)
        target = _log_softmax(teacher_scores[rows].float(), exists)
        divergences.append((target.exp() * (target - ours)).masked_fill(~exists, 0.0).sum(dim=1))
    return _mean_or_zero(torch.cat(divergences), student)


def regions_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of region labels: for each label, logits (N, R, values) against (N, R, labels); summed."""
    losses = [
        functional.cross_entropy(each.flatten(0, 1).float(), labels[..., n].flatten()) for n, each in enumerate(logits)
    ]
    return torch.stack(losses).sum()


def grounding_loss(by_role: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Cross-entropy of grounding labels: for each role, logits (M, values) against (M,); summed over roles."""
    return torch.stack(
        [
            functional.cross_entropy(logits.float(), values) if len(values) else logits.sum()  # zero
            for logits, values in by_role
        ]
    ).sum()


def contrastive_loss(similarity: Tensor, positive: Tensor, sample_offset: int = 0) -> Tensor:
    """InfoNCE of scaled similarities (B, G), G at least B, in one direction; `positive` (B, G) marks positive pairs.

    The target of row i is column `sample_offset + i`. Further positives of a row (the same image, an equal caption) are
    left out of the softmax.
    """
    rows = torch.arange(len(similarity), device=similarity.device)
    further = positive.clone()
    further[rows, sample_offset + rows] = False
    return functional.cross_entropy(similarity.float().masked_fill(further, -torch.inf), sample_offset + rows)


def _log_softmax(logits: Tensor, exists: Tensor) -> Tensor:
    """Log-probabilities over the existing columns of each row; any finite value in the others."""
    lowest = torch.finfo(logits.dtype).min
    return functional.log_softmax(torch.where(exists, logits, lowest), dim=1)


def _mean_or_zero(values: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """The mean of the values; without any, zero with a gradient of zero."""
    if len(values):
        return values.mean()
    return sum((each[torch.isfinite(each)].sum() * 0.0 for each in logits), torch.zeros((), device=values.device))


def _first_wins(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), logits.new_zeros(len(logits), dtype=torch.long))
