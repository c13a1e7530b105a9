"""How well two sets of logits agree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import kendalltau

from trt.parity import THRESHOLDS, ParityFailed, Thresholds, compare, kendall_tau, shortfalls

STRICT = Thresholds(top1=1.0, tau=1.0, max_error=1e-6)
few_values = st.integers(-3, 3).map(np.float32)


def logits(*rows):
    return np.array(rows, np.float32)


@given(pair=arrays(np.float32, (2, 6), elements=few_values))
def test_kendalls_tau_is_that_of_scipy(pair):
    one, other = pair

    expected = kendalltau(one, other).statistic

    if np.isnan(expected):  # one of them holds all candidates equal
        expected = float(np.ptp(one) == np.ptp(other) == 0)
    assert kendall_tau(one, other) == pytest.approx(expected)


def test_equal_logits_agree_in_everything():
    reference = logits([3, 2, 1], [1, 5, 2])

    found = compare(reference, reference.copy())

    assert (found.top1, found.tau, found.max_error) == (1.0, 1.0, 0.0)
    assert shortfalls(found, STRICT) == []


def test_a_shift_of_all_logits_is_an_error_that_moves_no_rank():
    reference = logits([3, 2, 1], [1, 5, 2])

    found = compare(reference, reference + np.float32(0.5))

    assert (found.top1, found.tau) == (1.0, 1.0)
    assert found.max_error == pytest.approx(0.5 / reference.std())


def test_each_missed_threshold_is_reported_with_its_query_and_candidate():
    reference = logits([3, 2, 1, 0], [4, 3, 2, 1], [0, 1, 2, 3])
    changed = logits([3, 2, 1, 0], [3, 4, 2, 1], [0, 1, 2, 3])

    sentences = shortfalls(compare(reference, changed), STRICT)

    assert len(sentences) == 3
    assert "look at queries 1" in sentences[0]
    assert "lowest (0.6667) in query 1" in sentences[1]
    assert "query 1 with candidate 0" in sentences[2]


def test_candidates_that_tie_in_the_reference_may_come_in_either_order():
    assert compare(logits([2, 2, 1]), logits([2, 2.001, 1])).top1 == 1.0
    assert compare(logits([2, 2, 1]), logits([1.9, 2, 2.1])).top1 == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["reference", "engine"])
def test_a_logit_that_is_not_finite_never_passes(value, where):
    good, bad = logits([1, 2], [3, 4]), logits([1, 2], [3, value])

    with pytest.raises(ParityFailed, match=f"the {where}'s logit of query 1 with candidate 1"):
        compare(*((bad, good) if where == "reference" else (good, bad)))


def test_a_reference_that_tells_no_pair_from_another_proves_nothing():
    with pytest.raises(ParityFailed, match="same logit"):
        compare(logits([1, 1]), logits([1, 1]))


@pytest.mark.parametrize("shape", [(2, 1), (0, 3), (3,), (2, 2, 2)])
def test_there_is_nothing_to_compare_without_queries_and_two_candidates(shape):
    with pytest.raises(ValueError, match="expected"):
        compare(np.ones(shape, np.float32), np.ones(shape, np.float32))


def test_logits_of_other_pairs_are_refused():
    with pytest.raises(ValueError, match="expected"):
        compare(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32))


def test_the_coarser_the_precision_the_more_is_allowed():
    fp32, fp16, bf16 = (THRESHOLDS[name] for name in ("fp32", "fp16", "bf16"))

    assert fp32.tau > fp16.tau > bf16.tau
    assert fp32.max_error < fp16.max_error < bf16.max_error
