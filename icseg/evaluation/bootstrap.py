"""Intervals of means by the cluster bootstrap: whole patients are drawn with replacement, with all of their targets.

Targets of one patient are alike, so drawing targets one by one would give intervals that are too narrow. Within a
patient nothing is drawn again: that would count the spread inside patients twice (Field and Welsh 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Sample:
    """Values [T] of a class's targets, and the clusters [T] that they belong to (any labels)."""

    values: NDArray[np.float64]
    clusters: NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval; None where a data set has one cluster, which tells nothing of others."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f} {self.bounds()}"

    def bounds(self, form: str = ".3f") -> str:
        """Both in brackets."""
        return "[-]" if self.low is None or self.high is None else f"[{self.low:{form}}, {self.high:{form}}]"


def resampled_means(
    samples: Sequence[Sample], *, resamples: int = RESAMPLES, seed: int | Sequence[int] = SEED
) -> NDArray[np.float64]:
    """Means of each sample over its values, [resamples, len(samples)], in draws of as many clusters as there are.

    One draw serves all samples: a patient is drawn with all classes. NaN where a draw has none of a sample's clusters.
    """
    names = np.unique(np.concatenate([sample.clusters for sample in samples]))
    count = len(names)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)  # [resamples, count]
    means = np.full((resamples, len(samples)), np.nan)
    for column, sample in zip(means.T, samples, strict=True):
        index = np.searchsorted(names, sample.clusters)
        totals = times @ np.bincount(index, sample.values, count)
        targets = times @ np.bincount(index, minlength=count)
        np.divide(totals, targets, out=column, where=targets > 0)
    return means


def interval_of_mean(groups: Sequence[Sequence[Sample]], *, resamples: int = RESAMPLES) -> Interval:
    """The mean over all samples' means, with its percentile interval.

    groups: samples whose clusters are drawn together, those of a data set; different data sets are drawn on their own.
    """
    samples = [sample for group in groups for sample in group]
    mean = float(np.mean([sample.values.mean() for sample in samples]))
    if any(len(np.unique(np.concatenate([sample.clusters for sample in group]))) < 2 for group in groups):
        return Interval(mean, None, None)
    drawn = [resampled_means(group, resamples=resamples, seed=(SEED, i)) for i, group in enumerate(groups)]
    low, high = np.quantile(np.nanmean(np.hstack(drawn), 1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))
