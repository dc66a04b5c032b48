"""Intervals of the cluster bootstrap, against all resamples of tiny cases and the truth of simulated ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from icseg.evaluation.bootstrap import Interval, Sample, interval_of_mean, resampled_means


def clustered(rng: np.random.Generator, clusters: int = 40, each: int = 5) -> Sample:
    """Values of mean 0 whose clusters have means of their own."""
    labels = np.repeat(np.arange(clusters), each)
    return Sample(rng.normal(0, 1, clusters)[labels] + rng.normal(0, 0.5, len(labels)), labels)


def apart(sample: Sample) -> Sample:
    """The same values, each a cluster of its own."""
    return Sample(sample.values, np.arange(len(sample.values)))


def all_resamples(values: list[list[float]]) -> NDArray[np.float64]:
    """The means of every draw of as many clusters as there are."""
    draws = itertools.product(values, repeat=len(values))
    return np.array([np.mean([value for cluster in draw for value in cluster]) for draw in draws])


def test_the_interval_is_that_of_all_resamples() -> None:
    values = [[0.1, 0.2], [0.9], [0.4, 0.5, 0.6], [0.55]]
    sample = Sample(np.concatenate(values), np.repeat(["a", "b", "c", "d"], [len(v) for v in values]))
    every = all_resamples(values)  # 256
    found = interval_of_mean([[sample]])
    assert found.mean == pytest.approx(np.mean(sample.values))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])), abs=1e-12)


def test_draws_are_as_often_as_they_should_be() -> None:
    values = [[0.0], [1.0], [5.0, 7.0]]
    sample = Sample(np.concatenate(values), np.array([3, 5, 9, 9]))
    drawn = resampled_means([sample], resamples=27_000)[:, 0]
    every, expected = np.unique(all_resamples(values).round(9), return_counts=True)
    found, counts = np.unique(drawn.round(9), return_counts=True)
    assert np.array_equal(found, every)
    spread = np.sqrt(27_000 * (expected / 27) * (1 - expected / 27))
    assert (np.abs(counts - 1000 * expected) < 4 * spread).all()


def test_coverage_of_simulated_patients() -> None:
    rng = np.random.default_rng(0)
    whole, naive = [], []
    for _ in range(500):
        sample = clustered(rng, clusters=60, each=3)
        whole.append(interval_of_mean([[sample]], resamples=1000))
        naive.append(interval_of_mean([[apart(sample)]], resamples=200))

    def covered(intervals: list[Interval]) -> float:
        return float(np.mean([i.low <= 0 <= i.high for i in intervals]))

    assert 0.91 < covered(whole) < 0.97
    assert covered(naive) < 0.82  # what ignoring patients would claim


def test_whole_patients_give_wider_intervals() -> None:
    sample = clustered(np.random.default_rng(1))
    whole, naive = interval_of_mean([[sample]]), interval_of_mean([[apart(sample)]])
    assert whole.mean == naive.mean
    assert whole.high - whole.low > 1.5 * (naive.high - naive.low)


def test_classes_of_a_patient_are_drawn_together() -> None:
    """Two classes that are alike are worth one; in different data sets they are worth two."""
    sample = clustered(np.random.default_rng(2), clusters=200)
    one = interval_of_mean([[sample]])
    together = interval_of_mean([[sample, sample]])
    assert (together.mean, together.low, together.high) == pytest.approx((one.mean, one.low, one.high))
    separate = interval_of_mean([[sample], [sample]])
    assert separate.mean == pytest.approx(one.mean)
    assert separate.high - separate.low == pytest.approx((one.high - one.low) / 2**0.5, rel=0.1)


def test_classes_count_equally_and_may_lack_in_a_draw() -> None:
    common = Sample(np.zeros(6), np.arange(6))
    rare = Sample(np.array([1.0, 0.5]), np.array([0, 1]))
    drawn = resampled_means([common, rare], resamples=500)
    assert drawn.shape == (500, 2)
    assert (drawn[:, 0] == 0).all()
    lacking = np.isnan(drawn[:, 1]).mean()
    assert lacking == pytest.approx((4 / 6) ** 6, abs=0.04)
    found = interval_of_mean([[common, rare]])
    assert found.mean == pytest.approx(0.375)
    assert 0 <= found.low < found.mean < found.high <= 0.5


def test_the_same_again() -> None:
    sample = clustered(np.random.default_rng(4))
    assert interval_of_mean([[sample]]) == interval_of_mean([[sample]])
    assert np.array_equal(resampled_means([sample], seed=3), resampled_means([sample], seed=3))
    assert not np.array_equal(resampled_means([sample], seed=3), resampled_means([sample], seed=4))


def test_a_class_of_one_patient_does_not_take_the_interval_from_all() -> None:
    several = Sample(np.array([0.1, 0.5, 0.9]), np.array([0, 1, 2]))
    alone = Sample(np.array([0.3]), np.array([3]))
    assert interval_of_mean([[alone]]).low is None
    together = interval_of_mean([[several, alone]])
    assert together.mean == pytest.approx(0.4)
    assert together.low is not None
    assert together.low < 0.4 < together.high
    assert interval_of_mean([[several], [alone]]).low is None  # a data set of one patient


def test_one_patient_has_no_interval() -> None:
    found = interval_of_mean([[Sample(np.array([0.2, 0.4]), np.array(["a", "a"]))]])
    assert found == Interval(pytest.approx(0.3), None, None)
    assert str(found) == "0.300 [-]"
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
