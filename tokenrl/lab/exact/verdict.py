"""Is what an estimator declares about its bias true? Measured on a handful of problems, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jaxtyping import Float
from torch import Tensor

from tokenrl.core import Estimator, effects
from tokenrl.errors import Refused
from tokenrl.lab.exact.control_problem import problem_of_mdp, random_mdp
from tokenrl.lab.exact.enumeration import Moments, exact_moments, proportional_step
from tokenrl.lab.exact.problems import Problem, tabular_problem

TOLERANCE = 1e-9
"""Relative; rounding leaves about 1e-15, and the smallest bias seen on these problems is some 1e-3."""


@dataclass(frozen=True)
class Measurement:
    """The numbers of one problem; `Moments` says what they are."""

    problem: str
    status: str
    cosine: float
    relative_bias: float
    scale: float
    variance: float
    mse: float
    noise: float


@dataclass(frozen=True)
class Verdict:
    """What was declared and what was found.

    Attributes:
        declared: The estimator's own `bias_status`.
        found: The worst status over the problems.
        measurements: One a problem that the estimator can be used on; the first is the main one.
    """

    declared: str
    found: str
    measurements: tuple[Measurement, ...]

    @property
    def ok(self) -> bool:
        """Whether the declaration holds, and is not 'biased' where no problem shows a bias."""
        if self.declared == effects.UNKNOWN:
            return True
        if self.declared == effects.BIASED:
            return self.found == effects.BIASED
        return effects.FROM_BEST_TO_WORST.index(self.found) <= effects.FROM_BEST_TO_WORST.index(self.declared)

    @property
    def cosine(self) -> float:
        """The lowest over the problems."""
        return min(m.cosine for m in self.measurements)

    @property
    def relative_bias(self) -> float:
        """The largest over the problems."""
        return max(m.relative_bias for m in self.measurements)

    @property
    def variance(self) -> float:
        """On the main problem."""
        return self.measurements[0].variance

    @property
    def noise(self) -> float:
        """On the main problem."""
        return self.measurements[0].noise


def measure_bias(estimator: Estimator, problems: Sequence[Problem] | None = None) -> Verdict:
    """Find what an estimator does to the expected gradient, whatever it declares.

    `exact`, `exact_up_to_scale` and `exact_per_prompt` are found when they hold on every problem, to a
    relative 1e-9. Otherwise the gradient of a step that holds every group in exact proportion, and of one
    four times as large, decides: `asymptotic` when its direction is that of the gradient of J or nears it as
    1/N, else `biased`. Finding is no proof: a bias that no problem shows is not seen.

    Args:
        estimator: Any; also one whose bias nobody has stated. What it calls must work under `torch.vmap`
            (no `.item()`, no branch on a value).
        problems: Instead of `default_problems()`; the first is the main one.

    Returns:
        The verdict, with the numbers of each problem.

    Raises:
        Refused: When the estimator can be used on none of the problems.

    Example:
        >>> from tokenrl import Estimator
        >>> from tokenrl.lab import measure_bias
        >>> measure_bias(Estimator(baseline="group_mean")).found
        'exact_up_to_scale'

        A baseline of your own, here half the mean of the group, has no declared status and gets a found one:

        >>> def half_mean(totals, *, group_size, mask, valid):
        ...     return totals.reshape(-1, group_size).mean(-1).repeat_interleave(group_size) / 2
        >>> verdict = measure_bias(Estimator(baseline=half_mean))
        >>> verdict.declared, verdict.found, round(verdict.measurements[0].scale, 3)
        ('unknown', 'exact_up_to_scale', 0.875)
    """
    measurements = []
    refusal = Refused("There is no problem to measure on; give at least one.")
    for problem in default_problems() if problems is None else problems:
        try:
            moments = exact_moments(estimator, problem)
        except Refused as error:
            refusal = error
            continue
        measurements.append(_measurement(problem.name, moments))
    if not measurements:
        raise refusal
    found = max((m.status for m in measurements), key=effects.FROM_BEST_TO_WORST.index)
    if found == effects.BIASED and tends_to_the_gradient(estimator):
        found = effects.ASYMPTOTIC
    return Verdict(estimator.bias_status, found, tuple(measurements))


def tends_to_the_gradient(estimator: Estimator) -> bool:
    """Say whether steps of ever more groups, each as small, take the direction of the gradient of J."""
    angles = []
    for problem in limit_problems():
        try:
            steps = [proportional_step(estimator, problem, copies) for copies in (1, 4)]
        except Refused:
            continue
        angles.append([_aside(m.mean.sum(0), m.target.sum(0)) for m in steps])
    # 1/N would leave a quarter; what does not vanish leaves all
    return bool(angles) and all(large < max(TOLERANCE, 0.3 * small) for small, large in angles)


def status_of(moments: Moments) -> str:
    """Return the best status that the numbers of one problem allow; 'biased' when none of the exact ones."""
    mean, target = moments.mean, moments.target  # [P, D]
    if float((mean - target).norm()) < TOLERANCE * float(target.norm()):
        return effects.EXACT
    if _aside(mean.flatten(), target.flatten()) < TOLERANCE:
        return effects.UP_TO_SCALE
    if all(_aside(m, t) < TOLERANCE for m, t in zip(mean, target, strict=True)):
        return effects.PER_PROMPT
    return effects.BIASED


def _aside(mean: Float[Tensor, " D"], target: Float[Tensor, " D"]) -> float:
    """Sine of the angle between the two; 2 when they are opposed or `mean` vanishes."""
    along = float(mean @ target)
    if along <= 0:
        return 2.0
    return float((mean - along / (target @ target) * target).norm() / mean.norm())


def _measurement(name: str, m: Moments) -> Measurement:
    return Measurement(name, status_of(m), m.cosine, m.relative_bias, m.scale, m.variance, m.mse, m.noise)


@cache
def default_problems() -> tuple[Problem, ...]:
    """Problems that together show every bias offered: rewards of all kinds, one to three prompts, control."""
    return (
        tabular_problem(1, prompts=2, group_size=4, vocabulary=2, rewards="continuous"),
        tabular_problem(2, prompts=1, group_size=3, rewards="continuous"),
        tabular_problem(3, prompts=2, group_size=2, length=2, rewards="graded", shared=True),
        tabular_problem(4, prompts=3, group_size=2, vocabulary=2, rewards="binary"),
        tabular_problem(5, prompts=1, group_size=3, rewards="dense", true_values=True),
        tabular_problem(6, prompts=2, group_size=3, vocabulary=2, rewards="dense", shared=True),
        problem_of_mdp(random_mdp(1, one_start=True), steps=3, group_size=2),
        problem_of_mdp(random_mdp(2), steps=2, beyond=2, group_size=3, critic="true"),
    )


@cache
def limit_problems() -> tuple[Problem, ...]:
    """Problems of even chances: a step can hold each group in exact proportion."""
    return (
        tabular_problem(9, prompts=2, group_size=3, vocabulary=2, length=2, rewards="continuous", even=True),
        tabular_problem(7, prompts=2, group_size=2, length=2, rewards="continuous", even=True),
        tabular_problem(8, prompts=2, group_size=2, length=2, rewards="dense", even=True),
        problem_of_mdp(random_mdp(3, one_start=True, even=True), steps=2, group_size=2),
    )
