"""Checks the bias that an estimator declares, by enumerating a few tiny problems in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from tokenrl.core import effects
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.lab.exact.control_problem import problem_of_mdp, random_mdp
from tokenrl.lab.exact.enumeration import (
    Moments,
    exact_moments,
    proportional_step,
    sine_between,
    target_of,
)
from tokenrl.lab.exact.problems import Problem, some_completions, tabular_problem
from tokenrl.settings import check_number

MAX_GROUP_SIZE = 15
"""The largest group whose steps are all listed."""
MAX_STEPS = 60_000
"""The largest number of such steps."""
EVEN = torch.tensor([[1, 3], [1, 2], [1, 1]]).double().log()
"""Logits of two tokens, one of which is the end, under which all four completions are equally probable."""


GRADED = (effects.EXACT, effects.UP_TO_SCALE, effects.PER_PROMPT, effects.ASYMPTOTIC)
"""Statuses for which a better one passes too."""


@dataclass(frozen=True)
class Claim:
    """A status that is declared, and the status that enumeration finds."""

    declared: str
    found: str

    @property
    def ok(self) -> bool:
        """Whether the status found is the declared one or better; a declared bias must be found.

        An unknown status always passes; off-policy statuses must match.
        """
        if self.declared in GRADED:
            return worst(self.declared, self.found) == self.declared
        return self.declared in (effects.UNKNOWN, self.found)


@dataclass(frozen=True, repr=False)
class Verdict(Claim):
    """The bias status that an estimator declares, and the status that enumeration finds; shown in one line.

    Attributes:
        declared: The estimator's `bias_status`.
        found: The worst status over the problems.
        measurements: The moments on each problem that the estimator can be used on; the first is the main
            problem. Of the wide problems only those are listed that showed a worse status.
        tried: The numbers of prompts, of completions per prompt and of tokens, and the rewards of all
            problems (the extremes are not in the same one). Beyond these the verdict says nothing.
        estimator: The name of its preset or of its own baseline, or "custom estimator".
        on_binary: The status on rewards of 0 and 1, where a better one is declared for them.
        of_reward: The status for the gradient of E[R], if the estimator has another objective.
        off_policy: The same of `off_policy_status`, if `measure_off_policy` measured it too.
    """

    measurements: tuple[Moments, ...]
    tried: str = ""
    estimator: str = "custom estimator"
    on_binary: Claim | None = None
    of_reward: Claim | None = None
    off_policy: Claim | None = None

    def __repr__(self) -> str:
        declared = "" if self.ok else f" (declared {self.declared})"
        numbers = f"cosine {self.cosine:.3f}, noise {self.noise:.2f}"
        tried = f"; tried: {self.tried}" if self.tried else ""
        return f"{self.estimator}: {self.found}{declared}, {numbers}{tried}"

    @property
    def ok(self) -> bool:
        """Whether every status found is at least as good as declared; a declared bias must be found."""
        special = (self.on_binary, self.of_reward, self.off_policy)
        return super().ok and all(claim.ok for claim in special if claim is not None)

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


def measure_bias(
    estimator: Estimator | str, problems: Sequence[Problem] | None = None, *, group_size: int = 8
) -> Verdict:
    """Find out what an estimator does to the expected gradient, whatever it declares.

    The status is `exact`, `exact_up_to_scale` or `exact_per_prompt` if that holds on every problem, to a
    relative 1e-9 (1e-5 with a baseline of your own, which may compute in float32). Otherwise limit problems
    decide. Their probabilities have a common denominator, so a finite step contains each group as often as it
    is drawn. The status is `asymptotic` on two conditions. Each problem shows the bias in a step of one group
    per prompt, and in two larger steps the gradient approaches the direction of J's gradient as 1/N. Else it
    is `biased`: a bias that the limit problems do not show may stay.

    A better status that is declared for rewards of 0 and 1 is measured on problems with such rewards. With
    another objective than the mean reward the gradient is also compared with the gradient of E[R].

    This is no proof: a bias that no problem shows stays hidden. The line of the verdict says what was tried:
    numbers of completions and tokens, and the range of rewards.

    Args:
        estimator: Any estimator, also one whose bias is unknown, or the name of a preset. Your own baseline
            must work under `torch.vmap` (no `.item()`, no branch on a value), take no column of the data unless it
            has a default, and have no memory of earlier calls. Given the past, a memory that is updated after use is a
            constant: measure the baseline with its memory held fixed.
        problems: Problems to use instead of `default_problems()` and `wide_problems()`; the first is the main
            one.
        group_size: Completions per prompt in your training, 2 to 15; one of the wide problems has groups of
            that size.

    Returns:
        The declared status, the status found, and the numbers of each problem.

    Raises:
        Refused: When the estimator can be used on none of the problems, or its baseline has a memory or
            returns nan.

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
    if isinstance(estimator, str):
        estimator = Estimator.preset(estimator)
    if not isinstance(estimator, Estimator):
        raise Refused(
            f"Give measure_bias an Estimator or the name of a preset instead of {estimator!r}."
        )
    check_number("group_size", group_size, int, at_least=2, at_most=MAX_GROUP_SIZE)
    _check_memory(estimator)
    main = problems_of(estimator) if problems is None else problems
    wide = wide_problems(group_size) if problems is None else ()
    refusal = Refused("There is no problem to measure on; give at least one.")
    status = effects.EXACT
    measured = list[Problem]()
    measurements = list[Moments]()
    for number, problem in enumerate((*main, *wide)):
        if number >= len(main) and status == effects.BIASED:
            break
        try:
            moments = exact_moments(estimator, problem)
        except Refused as error:
            refusal = error
            continue
        if not moments.mean.isfinite().all():
            raise Refused(
                f"The baseline returned nan or inf on the problem '{problem.name}': correct it."
            )
        worse = worst(status, moments.status)
        if number < len(main) or worse != status:
            measurements.append(moments)
        measured.append(problem)
        status = worse
    if not measurements:
        raise refusal
    if status == effects.BIASED and tends_to_the_gradient(estimator):
        status = effects.ASYMPTOTIC
    tried = extent(measured)
    if estimator.needs_memory:
        tried += ", the memory held fixed"
    return Verdict(
        declared=estimator.bias_status,
        found=status,
        measurements=tuple(measurements),
        tried=tried,
        estimator=getattr(estimator.baseline, "__name__", estimator.preset_name),
        on_binary=_on_binary(estimator),
        of_reward=_of_reward(estimator, measured),
    )


def worst(*statuses: str) -> str:
    """Return the worst of some statuses."""
    return max(statuses, key=effects.FROM_BEST_TO_WORST.index)


def _on_binary(estimator: Estimator) -> Claim | None:
    """Return the status on rewards of 0 and 1; None if no better one is declared, or only in the limit."""
    status = estimator.binary_bias_status
    if status in (estimator.bias_status, effects.ASYMPTOTIC):
        return None
    usable = [p for p in binary_problems() if p.group_size >= estimator.fewest_rows]
    statuses = [exact_moments(estimator, problem).status for problem in usable]
    return Claim(status, worst(*statuses))


def _of_reward(estimator: Estimator, problems: Sequence[Problem]) -> Claim | None:
    """Return the status for the gradient of E[R]; None if that is the objective."""
    status = estimator.reward_bias_status
    if not estimator.other_objective or status == effects.ASYMPTOTIC:
        return None
    mean = replace(
        estimator,
        objective="reward",
        objective_order=None,
        objective_share=None,
        objective_form="default",
    )
    statuses = []
    for problem in problems:
        moments = exact_moments(estimator, problem)
        statuses.append(replace(moments, target=target_of(mean, problem)).status)
    return Claim(status, worst(*statuses))


def extent(problems: Sequence[Problem]) -> str:
    """Return the least and the largest numbers of prompts, completions per prompt and tokens, and rewards."""
    numbers: dict[str, list[float]] = {
        "prompts": [len(problem.greedy) for problem in problems],
        "group size": [problem.group_size for problem in problems],
        "tokens": [float(n) for problem in problems for n in problem.mask.sum(1)],
        "rewards": [float(total) for problem in problems for total in problem.totals.aminmax()],
    }
    ranges = []
    for name, values in numbers.items():
        ends = [f"{end:.2g}" for end in (min(values), max(values))]
        ranges.append(f"{name} {' to '.join(dict.fromkeys(ends))}")
    return ", ".join(ranges)


def _check_memory(estimator: Estimator) -> None:
    """Refuse a user's baseline that returns two different results for the same step."""
    if not callable(estimator.baseline) or estimator.needs_memory:
        return
    draw = torch.Generator().manual_seed(0)
    rewards, changed = torch.randn(2, 4, generator=draw, dtype=torch.double)
    mask = torch.ones(4, 1, dtype=torch.double)
    names = ("logprobs", "ref_logprobs", "sampling_logprobs", "entropy")
    likely: dict[str, Any] = dict.fromkeys(names, mask / 2)  # some numbers of tokens
    results = []
    for step in (rewards, changed, rewards):
        likely["components"] = step[:, None]
        advantages = estimator.advantages(step, mask, group_size=2, **likely).policy
        results.append(advantages.nan_to_num())
    if not results[0].equal(results[2]):
        name = getattr(estimator.baseline, "__name__", type(estimator.baseline).__name__)
        raise Refused(
            f"The baseline {name!r} returned two different results for the same step, so it has a memory or "
            "draws random numbers. Give a class with the methods read and update, not a function: it is "
            "updated after use, and is measured with its memory held fixed."
        )


def tends_to_the_gradient(estimator: Estimator) -> bool:
    """Whether every limit problem shows the bias, and the direction of grad J with more groups per step."""
    measured = 0
    for problem in limit_problems():
        try:
            single = exact_moments(estimator, problem)
            steps = [proportional_step(estimator, problem, copies) for copies in (1, 4)]
        except Refused:
            continue
        small, large = (sine_between(m.mean.sum(0), m.target.sum(0)) for m in steps)
        # An error of order 1/N is a quarter as large in a step four times as large; one that does not vanish
        # keeps its size.
        if single.status != effects.BIASED or large >= max(single.tolerance, 0.3 * small):
            return False
        measured += 1
    return measured > 0


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


def problems_of(estimator: Estimator) -> tuple[Problem, ...]:
    """Return the main problems, with larger groups for other objectives and rewards in [0, 1] for a log.

    Those are left out in which the objective has no gradient.

    Where groups of equal rewards are left out, no reward follows a truncation, as `core.bias` assumes.
    """
    problems = default_problems()
    if estimator.zero_spread != "keep":
        problems = tuple(replace(p, after=None, bootstrap=None) for p in problems)
    if not estimator.other_objective:
        return problems
    larger = (
        tabular_problem(13, prompts=2, group_size=5, vocabulary=2, length=2),
        tabular_problem(14, prompts=1, group_size=6, vocabulary=2, rewards="graded"),
    )
    problems = (*larger, *problems)
    # Where the best completion alone is the best share, J is constant.
    if estimator.objective == "quantile":
        return tuple(p for p in problems if target_of(estimator, p).any())
    if estimator.objective == "max_at_k":
        return problems
    return tuple(replace(p, rewards=p.rewards.abs() / p.rewards.abs().max()) for p in problems)


@cache
def binary_problems() -> tuple[Problem, ...]:
    """Return problems with rewards of 0 and 1, for statuses that hold on these only."""
    return (
        tabular_problem(20, prompts=2, group_size=5, vocabulary=2, length=2, rewards="binary"),
        tabular_problem(16, prompts=3, group_size=2, vocabulary=2, rewards="binary"),
        tabular_problem(17, prompts=2, group_size=3, vocabulary=2, rewards="binary", shared=True),
    )


@cache
def wide_problems(group_size: int) -> tuple[Problem, ...]:
    """Return problems with larger groups, more prompts, longer completions, larger and equal rewards."""
    length = max(tokens for tokens in (1, 2, 3) if (tokens + 1) ** group_size <= MAX_STEPS)
    long = tabular_problem(11, group_size=5, vocabulary=2, length=6)
    return (
        tabular_problem(10, group_size=group_size, vocabulary=2, length=length),
        replace(long, rewards=5 * long.rewards),
        tabular_problem(12, prompts=4, group_size=2, vocabulary=2, length=2),
        # Groups of equal rewards that come from several functions.
        tabular_problem(19, prompts=2, group_size=3, vocabulary=2, rewards="graded"),
        # Policies with tokens that are not allowed, as `--allowed` makes them.
        tabular_problem(21, prompts=2, group_size=3, rows=some_completions(21, 3, 3)),
        tabular_problem(
            22, group_size=4, rewards="dense", true_values=True, rows=some_completions(22, 3, 3)
        ),
    )


@cache
def limit_problems() -> tuple[Problem, ...]:
    """Return problems with simple probabilities, so that a step can hold each group in exact proportion.

    They have as many prompts, completions per prompt and tokens as the default problems have.
    """
    return (
        tabular_problem(7, prompts=3, group_size=2, vocabulary=2, logits=EVEN),
        tabular_problem(8, prompts=1, group_size=3, vocabulary=2, logits=EVEN, rewards="dense"),
        problem_of_mdp(random_mdp(3, one_start=True, even=True), steps=2, group_size=2),
        tabular_problem(9, prompts=2, group_size=4, vocabulary=2, logits=EVEN),
        # The last token is the only one that is allowed.
        tabular_problem(
            23, prompts=2, vocabulary=2, logits=EVEN, rows=some_completions(23, 2, 3, share=1)
        ),
    )
