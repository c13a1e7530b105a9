"""Bootstrap intervals: clusters, paired differences, seeds, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.evaluation.bootstrap import bootstrap_intervals


def hits(rate, shape, seed):
    return (np.random.default_rng(seed).random(shape) < rate).astype(np.float64)


def test_the_interval_depends_on_the_seed_alone():
    columns = hits(0.3, (200, 1), 0)

    def interval(seed):
        return bootstrap_intervals(columns, np.arange(200), seed=seed)

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 1)), min_size=1, max_size=40))
def test_a_resample_is_a_mean_over_whole_clusters(queries):
    cluster, values = np.array([number for number, _ in queries]), np.array([value for _, value in queries])
    cluster_means = [values[cluster == number].mean() for number in set(cluster)]

    [interval] = bootstrap_intervals(values[:, None], cluster, num_resamples=50)

    assert interval.value == pytest.approx(values.mean())
    assert min(cluster_means) - 1e-9 <= interval.low <= interval.high <= max(cluster_means) + 1e-9


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    columns = hits(0.3, (2_000, 1), 0)
    half = 1.96 * columns.std() / np.sqrt(2_000)

    [interval] = bootstrap_intervals(columns, np.arange(2_000), num_resamples=4_000)

    assert interval.low == pytest.approx(interval.value - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.1 * half)


def test_95_of_100_intervals_cover_the_true_rate_if_captions_share_images():
    generator = np.random.default_rng(7)
    num_images, num_captions, num_trials = 100, 5, 400
    cluster = np.repeat(np.arange(num_images), num_captions)
    covered = covered_if_independent = 0
    for trial in range(num_trials):
        easiness = generator.beta(1.0, 1.0, num_images)  # an easy image is easy for all its captions; the mean is 0.5
        columns = (generator.random((num_images, num_captions)) < easiness[:, None]).astype(np.float64).reshape(-1, 1)
        [by_image] = bootstrap_intervals(columns, cluster, num_resamples=200, seed=trial)
        [by_caption] = bootstrap_intervals(columns, np.arange(len(columns)), num_resamples=200, seed=trial)
        covered += by_image.low <= 0.5 <= by_image.high
        covered_if_independent += by_caption.low <= 0.5 <= by_caption.high

    assert 0.91 <= covered / num_trials <= 0.98
    assert covered_if_independent / num_trials < 0.88  # what the clusters are for


def test_the_interval_of_a_difference_is_that_of_the_paired_differences():
    before = hits(0.5, (1_000,), 0)
    after = np.maximum(before, hits(0.02, (1_000,), 1))  # only ever better

    first, second, difference = bootstrap_intervals(np.stack((before, after, after - before), axis=1), np.arange(1_000))

    assert difference.low > 0
    assert first.high > second.low  # which the two intervals alone would not show


def test_with_one_cluster_the_interval_has_no_width():
    [interval] = bootstrap_intervals(np.array([[0.0], [1.0]]), np.array([4, 4]))

    assert (interval.low, interval.value, interval.high) == (0.5, 0.5, 0.5)


def test_drawing_in_parts_gives_the_same_resamples(monkeypatch):
    columns = hits(0.3, (60, 2), 0)
    whole = bootstrap_intervals(columns, np.arange(60), num_resamples=100)

    monkeypatch.setattr("edje.evaluation.bootstrap._CHUNK_DRAWS", 130)

    assert bootstrap_intervals(columns, np.arange(60), num_resamples=100) == pytest.approx(whole)


@pytest.mark.parametrize(("num_resamples", "confidence"), [(0, 0.95), (10, 0.0), (10, 1.0)])
def test_no_resamples_and_an_impossible_confidence_are_refused(num_resamples, confidence):
    with pytest.raises(ValueError, match="no interval"):
        bootstrap_intervals(np.ones((2, 1)), np.arange(2), num_resamples=num_resamples, confidence=confidence)
