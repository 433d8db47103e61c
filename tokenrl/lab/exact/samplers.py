"""Makes samplers that differ from the policy, and finds by enumeration what gradient is left.

Training may sample at another temperature, from the most probable tokens alone, or with an engine whose
rounding differs. Here each of these draws the completions of tiny problems, of which every one can be listed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenrl.core.effects import BIASED, EXACT, UP_TO_SCALE
from tokenrl.core.estimator import Estimator
from tokenrl.core.off_policy import EXACT_FOR_POLICY, EXACT_FOR_SAMPLER
from tokenrl.errors import Refused
from tokenrl.lab.exact.enumeration import Moments, exact_moments, target_of
from tokenrl.lab.exact.problems import NEVER, Problem, some_completions, tabular_problem
from tokenrl.lab.exact.verdict import Claim
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.settings import NonNegative, shown


@dataclass(frozen=True)
class Perturbation(Distribution):
    """How the sampler's logits differ from the policy's: noise first, then a `Distribution`."""

    noise: NonNegative = 0.0
    """Standard deviation of the normal noise on each logit, drawn once and then fixed."""

    def logits(self, logits: Tensor, seed: int) -> Tensor:
        """Return the sampler's logits [..., V], from the policy's logits and the seed of the noise.

        Raises:
            Refused: A rule says which texts are allowed, but the tokens here write none.
        """
        if self.allowed:
            raise Refused(
                f"allowed was given as {shown(self.allowed)}, but the tokens of the lab's problems write no texts: "
                "give tabular_problem the rows that are allowed."
            )
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(logits.shape, generator=draw, dtype=torch.double)
        logits = self.truncated((logits + self.noise * noise) / self.temperature)
        return logits.clamp(min=NEVER)


def perturbed_problem(seed: int, perturbation: Perturbation, **kinds: Any) -> Problem:
    """Make `tabular_problem` with a sampler; `kinds` are further arguments of that function."""
    return tabular_problem(seed, sampler=lambda z: perturbation.logits(z, seed + 1000), **kinds)


def off_policy_moments(estimator: Estimator, problem: Problem) -> tuple[Moments, Moments]:
    """Return the moments of the gradient beside grad J(policy), and beside grad J(sampler).

    The second gradient is that in the sampler's own logits; for softmax(a z + d), in the policy's logits z it
    is a times as large.

    Raises:
        Refused: When the estimator cannot be used on the problem.
    """
    moments = exact_moments(estimator, problem)
    return moments, replace(moments, target=target_of(estimator, problem.of_sampler))


OffPolicyVerdict = Claim
"""What an estimator declares of its gradient where the sampler differs, and what enumeration finds: the
gradient along which the expected one is on every problem, or 'biased'."""


def measure_off_policy(estimator: Estimator) -> OffPolicyVerdict:
    """Find out along which gradient an estimator is on average, if the sampler differs from the policy.

    It is measured on seven problems, with noise, a temperature, or both; in one a mask leaves some tokens.

    Args:
        estimator: Any estimator without a memory.

    Raises:
        Refused: When the estimator can be used on none of the problems.

    Example:
        >>> from tokenrl import Estimator
        >>> from tokenrl.lab import measure_off_policy
        >>> measure_off_policy(Estimator(importance="sequence")).found
        'exact_for_policy'
        >>> measure_off_policy(Estimator(importance="token")).found
        'biased'
    """
    pairs = []
    faults = []
    for problem in default_sampled_problems():
        try:
            pairs.append(off_policy_moments(estimator, problem))
        except Refused as error:
            faults.append(error)
    if not pairs:
        raise faults[-1]
    status = BIASED
    if all(sampler.status in (EXACT, UP_TO_SCALE) for _, sampler in pairs):
        status = EXACT_FOR_SAMPLER
    if all(policy.status in (EXACT, UP_TO_SCALE) for policy, _ in pairs):
        status = EXACT_FOR_POLICY
    return Claim(estimator.off_policy_status, status)


@cache
def default_sampled_problems() -> tuple[Problem, ...]:
    """Return problems that together show every known bias of a sampler that differs."""
    small = {"vocabulary": 2, "length": 2, "group_size": 3}
    pairs = {"vocabulary": 2, "length": 1, "group_size": 2}
    return (
        perturbed_problem(
            40, Perturbation(noise=0.5), rewards="dense", vocabulary=2, length=2, group_size=6
        ),
        perturbed_problem(
            41, Perturbation(temperature=0.7, noise=0.7), prompts=2, rewards="graded", **small
        ),
        perturbed_problem(
            42, Perturbation(temperature=0.8), prompts=2, rewards="continuous", **small
        ),
        perturbed_problem(
            43, Perturbation(noise=0.6), prompts=2, vocabulary=2, length=1, group_size=5
        ),
        perturbed_problem(46, Perturbation(noise=0.6), prompts=3, rewards="graded", **pairs),
        perturbed_problem(
            47, Perturbation(noise=0.6), rewards="graded", vocabulary=3, length=2, group_size=3
        ),
        perturbed_problem(
            48, Perturbation(noise=0.6), rows=some_completions(48, 3, 3), group_size=3
        ),
    )
