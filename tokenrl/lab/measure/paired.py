"""Estimators compared on the same rows: signal, noise, direction, and what the size of the groups does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from tokenrl.core import Estimator
from tokenrl.core.effects import EXACT
from tokenrl.errors import Refused
from tokenrl.lab.measure.contributions import Contributions, contributions
from tokenrl.lab.measure.projections import Projections
from tokenrl.lab.measure.rollouts import Samples
from tokenrl.lab.measure.unit_statistics import Estimate, Resampling, cosine, interval, reciprocal, untold


@dataclass(frozen=True)
class Measurement:
    """One estimator; g is the ascent gradient of one step.

    Attributes:
        estimator: Its name.
        declared: Its `bias_status`.
        coupled: Whether it couples the prompts of a step, so that steps are the independent units.
        units: How many of them.
        signal: `|E g|^2`.
        variance: Trace of the covariance of g.
        snr: `|E g|^2 / variance`.
        noise: The reciprocal, `variance / |E g|^2`; no constant factor of the loss changes it.
        cosine: Of the angle between E g and that of RLOO.
        variance_ratio: Variance over that without a baseline; a factor of the loss counts.
        quieter: How many times less noise than without a baseline.
    """

    estimator: str
    declared: str
    coupled: bool
    units: int
    signal: Estimate
    variance: Estimate
    snr: Estimate
    noise: Estimate
    cosine: Estimate
    variance_ratio: Estimate
    quieter: Estimate


@dataclass(frozen=True)
class GroupSize:
    """An estimator with smaller groups, at the same number of completions a step.

    Attributes:
        estimator: Its name.
        group_size: Completions a prompt.
        noise: Of a step of the full number of completions, spread over more prompts.
        quieter: How many times less noise than with groups half as large; None for the smallest.
    """

    estimator: str
    group_size: int
    noise: Estimate
    quieter: Estimate | None


def compare(
    samples: Samples,
    projections: Projections,
    estimators: Mapping[str, Estimator],
    *,
    prompts_per_step: int,
    seed: int = 0,
    replicates: int = 1000,
) -> tuple[Measurement, ...]:
    """Measure estimators on the same rows.

    Everything is made of products of distinct units, so nothing is biased by a unit's own noise, and the
    direction is compared with RLOO's from other rows. Estimators declared exact have RLOO's expectation: for
    their signal to noise RLOO's signal is taken, which is known best. Intervals are of 95 %, by resampling
    units and probes together; with fewer than some 20 units they are a little too narrow.
    """
    step = prompts_per_step
    reference = contributions(Estimator(), samples, projections, prompts_per_step=step, coupled=False)
    nothing = contributions(
        Estimator(baseline="none"), samples, projections, prompts_per_step=step, coupled=False
    )
    probes = projections.logprobs.shape[-1]

    @cache
    def resampling(units: int) -> Resampling:
        return Resampling(units, probes, replicates=replicates, seed=seed)

    found = []
    for name, estimator in estimators.items():
        mine = contributions(estimator, samples, projections, prompts_per_step=step)
        draw = resampling(len(mine.values))
        rloo, none = (_like(mine, other) for other in (reference, nothing))
        found.append(_measured(name, estimator, mine, rloo, none, draw, mine.groups / step))
    return tuple(found)


def _measured(
    name: str,
    estimator: Estimator,
    mine: Contributions,
    rloo: Tensor,
    none: Tensor,
    draw: Resampling,
    share: float,
) -> Measurement:
    """One row of `compare`; `share` is a unit's share of a step."""
    own, of_rloo = draw.product(mine.values, mine.values), draw.product(rloo, rloo)
    variance, without = draw.variance(mine.values) * share, draw.variance(none) * share
    same = same_expectation(estimator)
    known = of_rloo if same else own
    signal, snr = interval(own), interval(known / variance)
    sure = surely_positive(own) and surely_positive(of_rloo)
    quieter = without / variance * (1 if same else own / of_rloo)
    return Measurement(
        estimator=name,
        declared=estimator.bias_status,
        coupled=mine.coupled,
        units=len(mine.values),
        signal=signal,
        variance=interval(variance),
        snr=snr,
        noise=reciprocal(snr),
        cosine=cosine(draw.product(mine.values, rloo), own, of_rloo, resolved=sure),
        variance_ratio=interval(variance / without),
        quieter=interval(quieter) if same or sure else untold(quieter),
    )


def surely_positive(replicates: Tensor) -> bool:
    """Whether the whole interval lies above 0."""
    low = interval(replicates).low
    return low is not None and low > 0


def same_expectation(estimator: Estimator) -> bool:
    """Whether E g is that of plain RLOO: declared exact, with nothing added to the objective."""
    added = estimator.needs_kl or estimator.needs_entropy or estimator.overlong_buffer > 0
    return estimator.bias_status == EXACT and not added


def _like(mine: Contributions, other: Contributions) -> Tensor:
    """The values [M, 1, K] of an estimator whose units are groups, in the units of another."""
    units = len(mine.values)
    return other.values[: units * mine.groups].reshape(units, mine.groups, *other.values.shape[1:]).mean(1)


def compare_group_sizes(
    samples: Samples,
    projections: Projections,
    estimators: Mapping[str, Estimator],
    *,
    prompts_per_step: int,
    seed: int = 0,
    replicates: int = 1000,
) -> tuple[GroupSize, ...]:
    """Divide the groups into smaller ones and compare the noise of equally many completions.

    With groups of g a step of N completions has N/g prompts, so its variance is that of one group times g/N.
    """
    groups, probes = len(samples.mask) // samples.group_size, projections.logprobs.shape[-1]
    draw = Resampling(groups, probes, replicates=replicates, seed=seed)
    whole = contributions(Estimator(), samples, projections, prompts_per_step=prompts_per_step, coupled=False)
    of_rloo = draw.product(whole.values, whole.values)
    found = []
    sizes = [2**k for k in range(1, samples.group_size.bit_length())]
    for name, estimator in estimators.items():
        if not estimator.needs_groups:
            continue
        before: tuple[Tensor, Tensor] | None = None
        for size in sizes:
            mine = _in_groups_of(size, estimator, samples, projections, prompts_per_step)
            if mine is None:
                continue
            known = of_rloo if same_expectation(estimator) else draw.product(mine.values, mine.values)
            variance = draw.variance(mine.values) * size / (prompts_per_step * samples.group_size)
            gain = None if before is None else _gain(before, (known, variance))
            found.append(GroupSize(name, size, reciprocal(interval(known / variance)), gain))
            before = known, variance
    return tuple(found)


def _in_groups_of(
    size: int, estimator: Estimator, samples: Samples, projections: Projections, prompts_per_step: int
) -> Contributions | None:
    """Contributions with smaller groups; None for those too small, and where steps are the units."""
    try:
        mine = contributions(
            estimator, samples, projections, prompts_per_step=prompts_per_step, group_size=size
        )
    except Refused:  # such as a deviation of the others in a group of two
        return None
    return None if mine.coupled else mine


def _gain(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Estimate:
    """Noise before over noise after, each given as signal and variance."""
    ratio = (after[0] / before[0]) * (before[1] / after[1])
    if after[0] is before[0]:  # a signal known otherwise cancels, resolved or not
        return interval(before[1] / after[1])
    return interval(ratio) if surely_positive(before[0]) else untold(ratio)
