"""Checks the bias that an estimator declares, by enumerating a few tiny problems in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from tokenrl.core import choices
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.lab.exact.control_problem import problem_of_mdp, random_mdp
from tokenrl.lab.exact.enumeration import TOLERANCE, Moments, exact_moments, proportional_step, sine_between
from tokenrl.lab.exact.problems import Problem, tabular_problem


@dataclass(frozen=True)
class Verdict:
    """The bias that an estimator declares and the one that was found.

    Attributes:
        declared: The estimator's `bias_status`.
        found: The worst status over the problems.
        measurements: The moments on each problem that the estimator can be used on; the first is the main
            problem.
    """

    declared: str
    found: str
    measurements: tuple[Moments, ...]

    @property
    def ok(self) -> bool:
        """Whether what was found is at least as good as declared, and a declared bias was found."""
        if self.declared == choices.UNKNOWN:
            return True
        if self.declared == choices.BIASED:
            return self.found == choices.BIASED
        return choices.FROM_BEST_TO_WORST.index(self.found) <= choices.FROM_BEST_TO_WORST.index(self.declared)

    @property
    def cosine(self) -> float:
        """The lowest cosine over the problems."""
        return min(m.cosine for m in self.measurements)

    @property
    def relative_bias(self) -> float:
        """The largest relative bias over the problems."""
        return max(m.relative_bias for m in self.measurements)

    @property
    def variance(self) -> float:
        """The variance on the main problem."""
        return self.measurements[0].variance

    @property
    def noise(self) -> float:
        """The noise on the main problem."""
        return self.measurements[0].noise


def measure_bias(estimator: Estimator, problems: Sequence[Problem] | None = None) -> Verdict:
    """Find out what an estimator does to the expected gradient, whatever it declares.

    The status is `exact`, `exact_up_to_scale` or `exact_per_prompt` if that holds on every problem, to a
    relative 1e-9. Otherwise two larger steps decide, one that holds every group in exact proportion and one
    four times as large: the status is `asymptotic` if the direction of their gradient is that of the gradient
    of J or approaches it as 1/N, else `biased`. This is no proof: a bias that no problem shows is not found.

    Args:
        estimator: Any estimator, also one whose bias is unknown. A baseline of your own must work under
            `torch.vmap` (no `.item()`, no branch on a value) and have no memory of earlier calls: given the
            past, a memory that is updated after use is a constant, so measure it with its memory held fixed.
        problems: Problems to use instead of `default_problems()`; the first is the main one.

    Returns:
        The declared status, the status found, and the numbers of each problem.

    Raises:
        Refused: When the estimator can be used on none of the problems, or its baseline has a memory.

    Example:
        >>> from tokenrl import Estimator
        >>> from tokenrl.lab import measure_bias
        >>> measure_bias(Estimator(baseline="group_mean")).found
        'exact_up_to_scale'

        A baseline of your own, here half the mean of the group, declares nothing, and its bias is found:

        >>> def half_mean(totals, *, group_size, mask, valid):
        ...     return totals.reshape(-1, group_size).mean(-1).repeat_interleave(group_size) / 2
        >>> verdict = measure_bias(Estimator(baseline=half_mean))
        >>> verdict.declared, verdict.found, round(verdict.measurements[0].scale, 3)
        ('unknown', 'exact_up_to_scale', 0.875)
    """
    _check_memory(estimator)
    measurements = []
    refusal = Refused("There is no problem to measure on; give at least one.")
    for problem in default_problems() if problems is None else problems:
        try:
            measurements.append(exact_moments(estimator, problem))
        except Refused as error:
            refusal = error
    if not measurements:
        raise refusal
    found = max((m.status for m in measurements), key=choices.FROM_BEST_TO_WORST.index)
    if found == choices.BIASED and tends_to_the_gradient(estimator):
        found = choices.ASYMPTOTIC
    return Verdict(estimator.bias_status, found, tuple(measurements))


def _check_memory(estimator: Estimator) -> None:
    """Refuse a baseline of the user's own that returns something else for the same step called again."""
    if not callable(estimator.baseline):
        return
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4, generator=draw, dtype=torch.double)
    mask = torch.ones(4, 1, dtype=torch.double)
    first, _, again = (estimator.advantages(x, mask, group_size=2).policy for x in (one, other, one))
    if not first.equal(again):
        name = getattr(estimator.baseline, "__name__", type(estimator.baseline).__name__)
        raise Refused(
            f"The baseline {name!r} returned two different results for the same step, so it has a memory or "
            "draws random numbers. Measure it with its memory held fixed: it is a constant if it is updated "
            "after use."
        )


def tends_to_the_gradient(estimator: Estimator) -> bool:
    """Whether the gradient tends to the direction of grad J with more groups per step, of the same size."""
    angles = []
    for problem in limit_problems():
        try:
            steps = [proportional_step(estimator, problem, copies) for copies in (1, 4)]
        except Refused:
            continue
        angles.append([sine_between(m.mean.sum(0), m.target.sum(0)) for m in steps])
    # In four times as large a step an error of order 1/N is a quarter; one that does not vanish stays as it
    # is.
    return bool(angles) and all(large < max(TOLERANCE, 0.3 * small) for small, large in angles)


@cache
def default_problems() -> tuple[Problem, ...]:
    """Return problems that together show every known bias: all kinds of rewards, 1 to 3 prompts, control."""
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
    """Return problems with simple probabilities, so that a step can hold each group in exact proportion."""
    return (
        tabular_problem(9, prompts=2, group_size=3, vocabulary=2, length=2, rewards="continuous", even=True),
        tabular_problem(7, prompts=2, group_size=2, length=2, rewards="continuous", even=True),
        tabular_problem(8, prompts=2, group_size=2, length=2, rewards="dense", even=True),
        problem_of_mdp(random_mdp(3, one_start=True, even=True), steps=2, group_size=2),
    )
