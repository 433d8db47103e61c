"""Estimates signal, noise and direction of gradients from independent units without bias, with intervals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenrl.core.statistics import Interval

LEVEL = 0.95
"""Probability with which an interval should contain the true value."""


class Resampling:
    """Bootstrap weights for units and probes; the first replicate is the sample itself.

    A unit that is drawn twice must not be multiplied by itself, which would add its own noise to the signal.
    So products are of pairs of distinct units, weighted by how often both were drawn.
    """

    def __init__(self, units: int, probes: int, *, replicates: int = 1000, seed: int = 0) -> None:
        """Draw how often each unit and each probe occurs in each replicate."""
        generator = torch.Generator().manual_seed(seed)
        self.units = _counts(units, replicates, generator)  # [R, M]
        self.probes = _counts(probes, replicates, generator)  # [R, K]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Estimate `E a . E b` in each replicate [R]: the mean of `a_i . b_j` [M, K] over pairs of distinct units.

        It is `(sum_i w_i a_i . sum_i w_i b_i - sum_i w_i^2 a_i . b_i) / ((sum w)^2 - sum w^2)`. With w = 1 it
        is the U-statistic of the product of means.
        """
        w = self.units
        sums = (self.probes * (w @ a) * (w @ b)).sum(-1)
        squares = (w.square() * (self.probes @ (a * b).T)).sum(-1)
        return (sums - squares) / self._pairs()

    def variance(self, a: Tensor) -> Tensor:
        """Estimate without bias the trace of the covariance of a gradient, `E|a|^2 - |E a|^2` [R]."""
        w = self.units
        squares = self.probes @ a.square().T  # [R, M]
        total = w.sum(-1, keepdim=True)
        moments = (w * (total - w) * squares).sum(-1) / self._pairs()
        return moments - self.product(a, a)

    def _pairs(self) -> Tensor:
        return self.units.sum(-1).square() - self.units.square().sum(-1)


def _counts(n: int, replicates: int, generator: torch.Generator) -> Tensor:
    """Return how often each of n is drawn in n draws with replacement [1 + replicates, n]; once in row 0."""
    drawn = torch.randint(0, n, (replicates, n), generator=generator)
    counts = torch.zeros(replicates, n, dtype=torch.double)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones_like(counts[:1]), counts])


def interval(replicates: Tensor, *, resolved: bool = True) -> Interval:
    """Return the bias-corrected 95 % percentile interval; no ends if a replicate is not finite.

    The quantiles are `Phi(2 z0 -+ z)`, with z0 the normal quantile of the share of replicates below the
    estimate (Efron 1987, Better bootstrap confidence intervals, with a = 0). The correction is needed because
    ratios and cosines are skewed, and plain percentiles miss to one side. The interval does not account for
    what the sample does not contain, such as a rare completion with a large score.

    Args:
        replicates: The estimate first, then its bootstrap replicates [R].
        resolved: False for a ratio whose denominator may be 0: it has no ends either.
    """
    estimate = float(replicates[0])
    rest = replicates[1:]
    if not math.isfinite(estimate):
        estimate = math.nan
    if not (resolved and replicates.isfinite().all()):
        return Interval(estimate, math.nan, math.nan)
    ties = 0.5 * (rest == estimate)
    share_below = ((rest < estimate).double() + ties).mean()
    smallest = 1 / len(rest)
    z0 = torch.special.ndtri(share_below.clamp(smallest, 1 - smallest))
    ends = torch.tensor([0.5 - LEVEL / 2, 0.5 + LEVEL / 2], dtype=torch.double)
    z = torch.special.ndtri(ends)
    quantiles = torch.special.ndtr(2 * z0 + z)
    low, high = torch.quantile(rest, quantiles).tolist()
    return Interval(estimate, low, high)


def reciprocal(x: Interval) -> Interval:
    """Return 1/x with the ends of the interval exchanged: the noise from a signal-to-noise ratio x.

    If the interval of x contains 0, all that is known is that 1/x exceeds 1/high, so the upper end is
    infinite. If x has no interval, or none that reaches above 0, nothing is known of 1/x.
    """
    if not x.high > 0:
        return Interval(math.nan, math.nan, math.nan)
    value = 1 / x.value if x.value > 0 else math.nan
    high = 1 / x.low if x.low > 0 else math.inf
    return Interval(value, 1 / x.high, high)


def cosine(cross: Tensor, first: Tensor, second: Tensor, *, resolved: bool) -> Interval:
    """Return `<a, b> / sqrt(|a|^2 |b|^2)` from unbiased estimates of all three.

    It has no interval unless `resolved`, that is, unless both lengths are known to be positive. It is not
    clamped, so an estimate may exceed 1.
    """
    cosines = cross / (first * second).sqrt()
    usable = (first > 0) & (second > 0)  # at least 97.5 % of the replicates of a resolved length
    usable[0] = True  # the estimate itself
    return interval(cosines[usable], resolved=resolved)
