"""Compares an expected gradient with those of the return and of the discounted return, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from tokenrl.core.effects import EXACT, UP_TO_SCALE
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import read_changes
from tokenrl.lab.exact.control_problem import problem_of_mdp, random_mdp
from tokenrl.lab.exact.enumeration import Moments, exact_moments, target_of
from tokenrl.lab.exact.problems import Problem


class WhichObjective(NamedTuple):
    """How an expected gradient compares with the gradients of two objectives.

    Attributes:
        undiscounted: Comparison with the gradient of `J_1 = E[sum_t r_t]`.
        discounted: Comparison with the gradient of `J_gamma = E[sum_t gamma^t r_t]`, with the estimator's
            gamma.
    """

    undiscounted: Moments
    discounted: Moments

    @property
    def ascends(self) -> str:
        """The objective that is ascended: 'J_1', 'J_gamma' or 'neither', up to a constant factor.

        It is 'J_1' if the two objectives are the same.
        """
        for name, match in (("J_1", self.undiscounted), ("J_gamma", self.discounted)):
            if match.status in (EXACT, UP_TO_SCALE):
                return name
        return "neither"


def which_objective(estimator: Estimator, problem: Problem) -> WhichObjective:
    """Compare an estimator's expected gradient with the gradients of the return and of the discounted return.

    Discounting rewards from the first step on (`total`) gives the gradient of `J_gamma`. Discounting them
    from each action on (`reward_to_go`, `gae`) gives `E[sum_t s_t G_t]`, with s_t the score of an action and
    G_t the discounted return from it. The gradient of `J_gamma` is `E[sum_t gamma^t s_t G_t]`. Without the
    factor this is in general the gradient of no objective (Nota and Thomas 2020, arXiv 1906.07073).

    Args:
        estimator: Any estimator.
        problem: A problem with a reward at each step, since otherwise the two objectives hardly differ;
            `problem_of_mdp` makes one. If its critic is to be V^pi, make it with the estimator's gamma.

    Raises:
        Refused: When the estimator cannot be used on the problem.

    Example:
        >>> from tokenrl import Estimator
        >>> from tokenrl.lab import problem_of_mdp, random_mdp, which_objective
        >>> problem = problem_of_mdp(random_mdp(1))
        >>> for returns in ("total", "reward_to_go"):
        ...     plain, discounted = Estimator(returns=returns), Estimator(returns=returns, gamma=0.9)
        ...     print(returns, *(which_objective(e, problem).ascends for e in (plain, discounted)))
        total J_1 J_gamma
        reward_to_go J_1 neither
    """
    moments = exact_moments(estimator, problem)
    discounted = target_of(estimator, problem, estimator.gamma)
    return WhichObjective(
        undiscounted=replace(moments, target=target_of(estimator, problem)),
        discounted=replace(moments, target=discounted),
    )


STANDARD = "returns=reward_to_go,baseline=episode_mean,scale=episode_std,gamma=0.99"
ROWS = {
    "total": ("rloo", ""),
    "total, discounted": ("gamma=0.9", ""),
    "reward to go": ("returns=reward_to_go", ""),
    "reward to go, discounted": ("returns=reward_to_go,gamma=0.9", ""),
    "blame window as long as the episode": ("returns=blame_window,window=3", ""),
    "blame window shorter": ("returns=blame_window,window=2", ""),
    "GAE lam 0.5, V^pi": ("baseline=value,returns=gae,lam=0.5", "critic='true'"),
    "GAE lam 0.5, V^pi, discounted": (
        "baseline=value,returns=gae,lam=0.5,gamma=0.9",
        "critic='true'",
    ),
    "GAE lam 0.5, any V": ("baseline=value,returns=gae,lam=0.5", ""),
    "GAE lam 1, any V": ("baseline=value,returns=gae,lam=1.0", ""),
    "to go, any V as the baseline": ("returns=reward_to_go,baseline=value", ""),
    "to go, running mean": ("returns=reward_to_go,baseline=running_mean", ""),
    "to go, batch mean": ("returns=reward_to_go,baseline=batch_mean", ""),
    "total, batch mean, discounted": ("baseline=batch_mean,gamma=0.9", ""),
    "to go, timestep mean of the others": ("returns=reward_to_go,baseline=timestep_mean", ""),
    "to go, timestep mean of all (of 2 here)": (
        "returns=reward_to_go,baseline=timestep_mean,leave_one_out=False",
        "",
    ),
    "to go, episode mean": ("returns=reward_to_go,baseline=episode_mean", ""),
    "to go, episode mean, reward 1 per step": (
        "returns=reward_to_go,baseline=episode_mean",
        "reward=1.0",
    ),
    "to go, episode mean and std": (STANDARD, ""),
    "to go, episode mean and std, reward 1": (STANDARD, "reward=1.0"),
    "episode normalised, then V": ("baseline=value,returns=episode_normalized", ""),
    "cut, V^pi follows": ("returns=reward_to_go,baseline=value", "critic='true',steps=2,beyond=2"),
    "cut, total, V^pi follows, discounted": ("gamma=0.9", "critic='true',steps=2,beyond=2"),
    "cut, any V follows": ("returns=reward_to_go,baseline=value", "steps=2,beyond=2"),
    "cut, taken for an end": (
        "returns=reward_to_go,baseline=value",
        "steps=2,beyond=2,bootstrap=False",
    ),
}
"""The rows of the table: changes from RLOO, and arguments of `problem_of_mdp`; `reward` is a constant reward
of every step."""


def objectives_on_control() -> Iterator[tuple[str, float, WhichObjective]]:
    """Yield name, gamma and result for each of `ROWS`, on one random environment."""
    mdp = random_mdp(2, one_start=True)
    for name, (changes, options) in ROWS.items():
        estimator = Estimator.preset(changes)
        world = read_changes(options)[1] if options else {}
        rewards = mdp.rewards
        if "reward" in world:
            rewards = torch.full_like(rewards, world.pop("reward"))
        problem = problem_of_mdp(mdp._replace(rewards=rewards), gamma=estimator.gamma, **world)
        yield name, estimator.gamma, which_objective(estimator, problem)
