"""Compares an expected gradient with those of the return and of the discounted return, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tokenrl.core.effects import EXACT, UP_TO_SCALE
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import TO_GO
from tokenrl.lab.exact.catalogue import EPISODE, STANDARD
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


VALUE: dict[str, Any] = {**TO_GO, "baseline": "value"}
GAE: dict[str, Any] = {"baseline": "value", "returns": "gae", "lam": 0.5}
TRUE: dict[str, Any] = {"critic": "true"}
CUT: dict[str, Any] = {"steps": 2, "beyond": 2}
TIMESTEP: dict[str, Any] = {**TO_GO, "baseline": "timestep_mean"}

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "total": ({}, {}),
    "total, discounted": ({"gamma": 0.9}, {}),
    "reward to go": (TO_GO, {}),
    "reward to go, discounted": ({**TO_GO, "gamma": 0.9}, {}),
    "blame window as long as the episode": ({"returns": "blame_window", "window": 3}, {}),
    "blame window shorter": ({"returns": "blame_window", "window": 2}, {}),
    "GAE lam 0.5, V^pi": (GAE, TRUE),
    "GAE lam 0.5, V^pi, discounted": ({**GAE, "gamma": 0.9}, TRUE),
    "GAE lam 0.5, any V": (GAE, {}),
    "GAE lam 1, any V": ({**GAE, "lam": 1.0}, {}),
    "to go, any V as the baseline": (VALUE, {}),
    "to go, running mean": ({**TO_GO, "baseline": "running_mean"}, {}),
    "to go, batch mean": ({**TO_GO, "baseline": "batch_mean"}, {}),
    "total, batch mean, discounted": ({"baseline": "batch_mean", "gamma": 0.9}, {}),
    "to go, timestep mean of the others": (TIMESTEP, {}),
    "to go, timestep mean of all (of 2 here)": ({**TIMESTEP, "leave_one_out": False}, {}),
    "to go, episode mean": (EPISODE, {}),
    "to go, episode mean, reward 1 per step": (EPISODE, {"reward": 1.0}),
    "to go, episode mean and std": (STANDARD, {}),
    "to go, episode mean and std, reward 1": (STANDARD, {"reward": 1.0}),
    "episode normalised, then V": ({"baseline": "value", "returns": "episode_normalized"}, {}),
    "cut, V^pi follows": (VALUE, {**TRUE, **CUT}),
    "cut, total, V^pi follows, discounted": ({"gamma": 0.9}, {**TRUE, **CUT}),
    "cut, any V follows": (VALUE, CUT),
    "cut, taken for an end": (VALUE, {**CUT, "bootstrap": False}),
}
"""The rows of the table: fields changed from RLOO, and arguments of `problem_of_mdp`; `reward` is a constant
reward of every step."""


def objectives_on_control() -> Iterator[tuple[str, float, WhichObjective]]:
    """Yield name, gamma and result for each of `ROWS`, on one random environment."""
    mdp = random_mdp(2, one_start=True)
    for name, (fields, options) in ROWS.items():
        estimator = Estimator(**fields)
        arguments = dict(options)
        rewards = mdp.rewards
        if "reward" in arguments:
            rewards = torch.full_like(rewards, arguments.pop("reward"))
        problem = problem_of_mdp(mdp._replace(rewards=rewards), gamma=estimator.gamma, **arguments)
        yield name, estimator.gamma, which_objective(estimator, problem)
