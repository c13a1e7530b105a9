"""The losses of the paper (arXiv 2510.06820, section 3), and two contrastive ones; each a plain function of tensors.

Knows neither the model nor how the numbers came about. Every loss is a mean over its batch, so that a weight means the
same at every batch size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def itm_loss(with_images: Tensor, with_texts: Tensor) -> Tensor:
    """Image-text matching: softmax cross-entropy of the positive against its negatives, mean of both directions.

    `with_images` (B, 1 + n): logits of a caption with its own image first, then with n other images.
    `with_texts` (B, 1 + n): logits of an image with its own caption first, then with n other captions.
    Logits of -inf are negatives that could not be found.
    """
    return (_first_wins(with_images) + _first_wins(with_texts)) / 2


def mlm_loss(vocabulary_logits: Tensor, masked_ids: Tensor) -> Tensor:
    """Masked language modelling: (M, V) logits at the masked places against the (M,) words that stood there."""
    if len(masked_ids) == 0:
        return vocabulary_logits.sum()  # zero, with a gradient of zero
    return functional.cross_entropy(vocabulary_logits.float(), masked_ids)


def text_recovery_loss(recovered: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine between what the joint encoder makes of a text alone and the first stage's embedding of it; (B, e)."""
    return (1 - functional.cosine_similarity(recovered.float(), wanted.float(), dim=-1)).mean()


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of the student's logits against the teacher's probabilities.

    Blocks of pairs (positives, negatives of captions, negatives of images) count alike whatever their size. Logits of
    -inf stand for pairs that do not exist; a block without any pair does not count.
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        exists = torch.isfinite(ours) & torch.isfinite(theirs)
        if exists.any():
            wanted = theirs[exists].float().sigmoid()
            losses.append(functional.binary_cross_entropy_with_logits(ours[exists].float(), wanted))
    return torch.stack(losses).mean()


def regions_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of what is said to stand in each region: for each label (N, R, values) against (N, R, labels)."""
    losses = [
        functional.cross_entropy(each.flatten(0, 1).float(), labels[..., n].flatten()) for n, each in enumerate(logits)
    ]
    return torch.stack(losses).sum()


def grounding_loss(by_role: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Cross-entropy of what words are said to say: for each role (M, values) against (M,); summed over roles."""
    return torch.stack(
        [
            functional.cross_entropy(logits.float(), values) if len(values) else logits.sum()  # zero
            for logits, values in by_role
        ]
    ).sum()


def contrastive_loss(similarity: Tensor, positive: Tensor, first: int = 0) -> Tensor:
    """InfoNCE of scaled similarities (B, G), G at least B; `positive` (B, G) marks every true pair.

    Column `first + i` is row i's own; other true pairs (the same image, an equal caption) are neither rewarded nor
    punished. One direction: the other one is that of the columns.
    """
    rows = torch.arange(len(similarity), device=similarity.device)
    others = positive.clone()
    others[rows, first + rows] = False
    return functional.cross_entropy(similarity.float().masked_fill(others, -torch.inf), first + rows)


def _first_wins(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), logits.new_zeros(len(logits), dtype=torch.long))
