"""Each loss agrees with a plain implementation in float64, and its gradient with finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edje.training.losses import (
    contrastive_loss,
    distillation_loss,
    grounding_loss,
    itm_loss,
    kl_loss,
    margin_mse_loss,
    mlm_loss,
    text_recovery_loss,
)

Array = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))


def plain_itm(with_images: Array, with_texts: Array) -> float:
    return float(-(log_softmax(with_images)[:, 0].mean() + log_softmax(with_texts)[:, 0].mean()) / 2)


def plain_mlm(logits: Array, words: NDArray[np.int64]) -> float:
    return float(-log_softmax(logits)[np.arange(len(words)), words].mean())


def plain_recovery(recovered: Array, wanted: Array) -> float:
    products = (recovered * wanted).sum(axis=1)
    return float((1 - products / np.linalg.norm(recovered, axis=1) / np.linalg.norm(wanted, axis=1)).mean())


def plain_distillation(student: list[Array], teacher: list[Array]) -> float:
    means = []
    for ours, theirs in zip(student, teacher, strict=True):
        there = np.isfinite(ours) & np.isfinite(theirs)
        if there.any():
            wanted, probability = sigmoid(theirs[there]), sigmoid(ours[there])
            means.append(-(wanted * np.log(probability) + (1 - wanted) * np.log(1 - probability)).mean())
    return float(np.mean(means))


def plain_contrastive(similarity: Array, positive: NDArray[np.bool_]) -> float:
    terms = []
    for i in range(len(similarity)):
        for line, true in ((similarity[i], positive[i]), (similarity[:, i], positive[:, i])):
            rivals = [line[j] for j in range(len(line)) if j == i or not true[j]]
            terms.append(np.log(np.exp(np.array(rivals) - line[i]).sum()))
    return float(np.mean(terms))


def check(loss: Callable[..., torch.Tensor], plain: Callable[..., float], *inputs: Array) -> None:
    """Compare value and gradient, along a few directions, with the plain implementation."""
    tensors = [torch.from_numpy(each.astype(np.float32)).requires_grad_() for each in inputs]

    value = loss(*tensors)
    value.backward()

    assert value.item() == pytest.approx(plain(*inputs), rel=1e-5, abs=1e-6)
    rng = np.random.default_rng(0)
    for number, (tensor, given_input) in enumerate(zip(tensors, inputs, strict=True)):
        gradient = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.double().numpy()
        assert np.isfinite(gradient).all()
        for _ in range(3):
            step = 1e-5 * rng.normal(size=given_input.shape)
            step[~np.isfinite(given_input)] = 0.0
            ahead, behind = list(inputs), list(inputs)
            ahead[number], behind[number] = given_input + step, given_input - step
            slope = (plain(*ahead) - plain(*behind)) / 2
            assert (gradient * step).sum() == pytest.approx(slope, rel=2e-3, abs=2e-10)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, num_samples=st.integers(1, 5), num_negatives=st.integers(1, 4), missing=st.booleans())
def test_matching_is_a_softmax_over_a_positive_and_its_negatives_both_ways(seed, num_samples, num_negatives, missing):
    rng = np.random.default_rng(seed)
    logits = [3 * rng.normal(size=(num_samples, 1 + num_negatives)) for _ in range(2)]
    if missing:
        logits[0][0, -1] = -np.inf

    check(itm_loss, plain_itm, *logits)


def test_matching_without_any_negative_is_zero():
    alone = torch.full((2, 3), -torch.inf)
    alone[:, 0] = 1.0

    assert itm_loss(alone, alone).item() == 0.0


@settings(max_examples=15, deadline=None)
@given(seed=seeds, num_masked=st.integers(1, 6), num_words=st.integers(2, 9))
def test_masked_words_are_a_softmax_over_the_vocabulary(seed, num_masked, num_words):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, num_words, num_masked)

    check(
        lambda logits: mlm_loss(logits, torch.from_numpy(words)),
        lambda logits: plain_mlm(logits, words),
        rng.normal(size=(num_masked, num_words)),
    )


@settings(max_examples=15, deadline=None)
@given(seed=seeds, num_named=st.integers(1, 6), num_true=st.integers(1, 6))
def test_grounding_is_the_sum_over_roles_of_the_mean_cross_entropy(seed, num_named, num_true):
    rng = np.random.default_rng(seed)
    values = [rng.integers(0, 9, num_named), rng.integers(0, 2, num_true)]

    check(
        lambda *logits: grounding_loss(list(zip(logits, map(torch.from_numpy, values), strict=True))),
        lambda *logits: sum(plain_mlm(each, wanted) for each, wanted in zip(logits, values, strict=True)),
        rng.normal(size=(num_named, 9)),
        rng.normal(size=(num_true, 2)),
    )


@pytest.mark.parametrize("loss", [mlm_loss, lambda logits, values: grounding_loss([(logits, values)])])
def test_a_batch_without_labels_has_zero_loss_and_zero_gradient(loss):
    table = torch.ones(7, 4, requires_grad=True)

    loss = loss(torch.ones(0, 4) @ table.T, torch.zeros(0, dtype=torch.long))
    loss.backward()

    assert loss.item() == 0.0
    assert table.grad is not None
    assert not table.grad.any()


@settings(max_examples=15, deadline=None)
@given(seed=seeds, num_texts=st.integers(1, 5), dim=st.integers(2, 8))
def test_text_recovery_is_one_less_the_cosine(seed, num_texts, dim):
    rng = np.random.default_rng(seed)
    wanted = rng.normal(size=(num_texts, dim))

    check(
        lambda recovered: text_recovery_loss(recovered, torch.from_numpy(wanted)),
        lambda recovered: plain_recovery(recovered, wanted),
        rng.normal(size=(num_texts, dim)) + 0.1,
    )


@settings(max_examples=20, deadline=None)
@given(seed=seeds, sizes=st.lists(st.integers(0, 6), min_size=1, max_size=3), missing=st.booleans())
def test_distillation_weights_every_block_of_pairs_equally(seed, sizes, missing):
    rng = np.random.default_rng(seed)
    sizes = [3, *sizes]  # the positives always exist
    teacher = [2 * rng.normal(size=size) for size in sizes]
    student = [2 * rng.normal(size=size) for size in sizes]
    if missing and sizes[-1]:
        teacher[-1][0] = student[-1][0] = -np.inf

    check(
        lambda *ours: distillation_loss(ours, [torch.from_numpy(each) for each in teacher]),
        lambda *ours: plain_distillation(list(ours), teacher),
        *student,
    )


def plain_margin_mse(student: list[Array], teacher: list[Array]) -> float:
    errors = [
        ((ours[0] - ours[column]) - (theirs[0] - theirs[column])) ** 2
        for one, other in zip(student, teacher, strict=True)
        for ours, theirs in zip(one, other, strict=True)
        for column in range(1, len(ours))
        if np.isfinite([ours[0], ours[column], theirs[0], theirs[column]]).all()
    ]
    return float(np.mean(errors))


def plain_kl(student: list[Array], teacher: list[Array]) -> float:
    terms = []
    for one, other in zip(student, teacher, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            exists = np.isfinite(ours) & np.isfinite(theirs)
            if exists.sum() > 1:
                target = log_softmax(theirs[exists])
                terms.append((np.exp(target) * (target - log_softmax(ours[exists]))).sum())
    return float(np.mean(terms))


@pytest.mark.parametrize(("loss", "plain"), [(margin_mse_loss, plain_margin_mse), (kl_loss, plain_kl)])
@settings(max_examples=15, deadline=None)
@given(seed=seeds, num_samples=st.integers(1, 4), num_negatives=st.integers(1, 4), missing=st.booleans())
def test_losses_of_a_teacher_compare_margins_or_distributions_of_the_scored_pairs(
    loss, plain, seed, num_samples, num_negatives, missing
):
    rng = np.random.default_rng(seed)
    teacher = [2 * rng.normal(size=(num_samples, 1 + num_negatives)) for _ in range(2)]
    student = [2 * rng.normal(size=(num_samples, 1 + num_negatives)) for _ in range(2)]
    if missing:
        teacher[0][0, -1] = np.nan
        student[1][0, -1] = -np.inf
        if num_negatives == 1 and num_samples == 1:
            return  # nothing is left to compare; see below

    check(
        lambda *ours: loss(ours, [torch.from_numpy(each) for each in teacher]),
        lambda *ours: plain(list(ours), teacher),
        *student,
    )


@pytest.mark.parametrize("loss", [margin_mse_loss, kl_loss, distillation_loss])
def test_a_batch_without_a_scored_pair_has_zero_loss_and_zero_gradient(loss):
    student = torch.randn(3, 4).requires_grad_()
    unknown = torch.full((3, 4), torch.nan)

    value = loss([student, student], [unknown, unknown])
    value.backward()

    assert value.item() == 0.0
    assert not student.grad.any()


@pytest.mark.parametrize("loss", [margin_mse_loss, kl_loss])
def test_a_student_that_differs_by_a_constant_per_query_has_no_loss(loss):
    teacher = torch.randn(3, 4)

    assert loss([teacher + 2.5], [teacher]).item() == pytest.approx(0.0, abs=1e-6)


def test_distillation_is_least_where_the_student_agrees():
    teacher = [torch.tensor([2.0, -1.0]), torch.tensor([0.5])]
    student = torch.cat(teacher).requires_grad_()
    (slopes,) = torch.autograd.grad(distillation_loss([student[:2], student[2:]], teacher), student)

    torch.testing.assert_close(slopes, torch.zeros(3), atol=1e-6, rtol=0)


def both_ways(similarity, positive):
    return (contrastive_loss(similarity, positive) + contrastive_loss(similarity.T, positive.T)) / 2


@given(seed=seeds, num_rows=st.integers(1, 4), num_shares=st.integers(1, 3), share=st.floats(0, 1))
def test_the_contrast_of_shares_of_rows_is_the_contrast_of_all_rows(seed, num_rows, num_shares, share):
    rng = np.random.default_rng(seed)
    size = num_rows * num_shares
    similarity = torch.from_numpy(rng.normal(size=(size, size)))
    positive = torch.from_numpy((rng.random((size, size)) < share) | np.eye(size, dtype=bool))

    starts = range(0, size, num_rows)
    shares = [
        contrastive_loss(similarity[start : start + num_rows], positive[start : start + num_rows], start)
        for start in starts
    ]

    torch.testing.assert_close(torch.stack(shares).mean(), contrastive_loss(similarity, positive))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, num_samples=st.integers(1, 5), share=st.floats(0, 1))
def test_a_contrast_leaves_out_further_positives(seed, num_samples, share):
    rng = np.random.default_rng(seed)
    positive = (rng.random((num_samples, num_samples)) < share) | np.eye(num_samples, dtype=bool)

    check(
        lambda similarity: both_ways(similarity, torch.from_numpy(positive)),
        lambda similarity: plain_contrastive(similarity, positive),
        4 * rng.normal(size=(num_samples, num_samples)),
    )


@pytest.mark.parametrize("loss", [itm_loss, text_recovery_loss])
def test_losses_are_computed_in_float32_for_bf16_inputs(loss):
    one, other = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()

    assert loss(one, other).dtype == torch.float32
    assert loss(one, other).item() == pytest.approx(loss(one.float(), other.float()).item(), abs=1e-6)
