"""Signal, noise and direction of gradients from independent units, without bias, and their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile interval; None where it cannot be told.

    Attributes:
        value: The estimate; unbiased ones may be negative, and none is clamped.
        low: Lower end of the interval, minus infinity if unbounded.
        high: Upper end, infinity if unbounded.
    """

    value: float | None
    low: float | None
    high: float | None

    @property
    def resolved(self) -> bool:
        """Whether there is a value with a bounded interval."""
        return all(x is not None and math.isfinite(x) for x in (self.value, self.low, self.high))


class Resampling:
    """Bootstrap weights over units and probes; the first replicate is the sample itself.

    A unit drawn twice must not be multiplied with itself: products are of pairs of distinct units, weighted
    by how often both were drawn.
    """

    def __init__(self, units: int, probes: int, *, replicates: int = 1000, seed: int = 0) -> None:
        """Draw how often each unit and each probe occurs in each replicate."""
        generator = torch.Generator().manual_seed(seed)
        self.units = _counts(units, replicates, generator)  # [R, M]
        self.probes = _counts(probes, replicates, generator)  # [R, K]

    def product(self, a: Float[Tensor, "M J K"], b: Float[Tensor, "M J K"]) -> Float[Tensor, " R"]:
        """Estimate `E a . E b`: the mean of `a_i . b_j` over pairs of distinct units.

        `(sum_i w_i a_i . sum_i w_i b_i - sum_i w_i^2 a_i . b_i) / ((sum w)^2 - sum w^2)`, J averaged first.
        """
        a, b, w = a.mean(1), b.mean(1), self.units
        sums = (self.probes * (w @ a) * (w @ b)).sum(-1)
        own = (w.square() * (self.probes @ (a * b).T)).sum(-1)
        return (sums - own) / self._pairs()

    def variance(self, a: Float[Tensor, "M J K"]) -> Float[Tensor, " R"]:
        """Estimate the trace of the covariance of one of the J: `E|a|^2 - |E a|^2`, without bias."""
        w = self.units
        squares = self.probes @ a.square().mean(1).T  # [R, M]
        total = w.sum(-1, keepdim=True)
        return (w * (total - w) * squares).sum(-1) / self._pairs() - self.product(a, a)

    def _pairs(self) -> Float[Tensor, " R"]:
        return self.units.sum(-1).square() - self.units.square().sum(-1)


def _counts(n: int, replicates: int, generator: torch.Generator) -> Tensor:
    """How often each of n occurs among n drawn with replacement [1 + replicates, n]; first, once each."""
    drawn = torch.randint(0, n, (replicates, n), generator=generator)
    counts = torch.zeros(replicates, n, dtype=torch.double).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.double)
    )
    return torch.cat([torch.ones(1, n, dtype=torch.double), counts])


def interval(replicates: Float[Tensor, " R"], level: float = 0.95) -> Estimate:
    """Bias-corrected percentile interval; replicates that are nan (not defined) leave the number untold.

    The quantiles are `Phi(2 z0 -+ z)` with z0 the normal quantile of the share of replicates below the
    estimate (Efron 1987, Better bootstrap confidence intervals, with a = 0): ratios and cosines are skewed,
    and their plain percentiles miss to one side. What the sample does not contain, such as a rare completion
    of large score, is in no interval.

    Args:
        replicates: The estimate first, then its bootstrap replicates.
        level: Share of repetitions in which the truth should be inside.
    """
    first, rest = replicates[0], replicates[1:]
    if not bool(replicates.isfinite().all()):
        return untold(replicates)
    share = ((rest < first).double() + 0.5 * (rest == first).double()).mean()
    z0 = torch.special.ndtri(share.clamp(1 / len(rest), 1 - 1 / len(rest)))
    z = torch.special.ndtri(torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.double))
    low, high = torch.quantile(rest, torch.special.ndtr(2 * z0 + z)).tolist()
    return Estimate(float(first), low, high)


def untold(replicates: Float[Tensor, " R"]) -> Estimate:
    """Keep the estimate without an interval: a ratio whose denominator may be 0 has none."""
    value = float(replicates[0])
    return Estimate(value if math.isfinite(value) else None, None, None)


def reciprocal(snr: Estimate) -> Estimate:
    """Noise from signal to noise; unbounded above where the latter may be 0, untold where it may not be > 0.

    The ends change places. An interval of the signal that covers 0 says only that the noise exceeds 1/high.
    """
    if snr.low is None or snr.high is None or snr.value is None or snr.high <= 0:
        return Estimate(None, None, None)
    value = 1 / snr.value if snr.value > 0 else None
    return Estimate(value, 1 / snr.high, 1 / snr.low if snr.low > 0 else math.inf)


def cosine(cross: Tensor, first: Tensor, second: Tensor, *, resolved: bool) -> Estimate:
    """`<a, b> / sqrt(|a|^2 |b|^2)` from unbiased estimates of all three; untold when a length may be 0.

    Not clamped: an estimate may exceed 1.
    """
    found = cross / (first * second).sqrt()
    if not resolved:
        return untold(found)
    usable = (first > 0) & (second > 0)  # of a resolved length 97.5 % are, the rest say nothing
    return interval(torch.cat([found[:1], found[1:][usable[1:]]]))
