"""The sigmoid bandit: two actions and one parameter theta, with a gradient that is known in closed form.

The policy takes the first action with probability `s = sigmoid(theta)`. The score is 1 - s for the first
action and -s for the second. The reward of each action is fixed, so that only the policy is random. An
episode is one action, or T actions in a row that share theta (`steps`). Mean and variance of a gradient
sample have a closed form for any T: see `gradient_variance`. The functions compute in float64 and are
differentiable in theta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.spaces import Box, Discrete
from jaxtyping import Float, Int
from torch import Tensor

from tokenrl.errors import Refused
from tokenrl.settings import check_choice, check_number

Theta = float | Float[Tensor, "*N"]
REWARDS = (1.0, 0.0)
"""Rewards of the first action (index 0) and the second (index 1)."""


def probability(theta: Theta) -> Float[Tensor, "*N"]:
    """Return the probability of the first action: `s = sigmoid(theta) = 1 / (1 + exp(-theta))`."""
    return torch.sigmoid(torch.as_tensor(theta, dtype=torch.double))


def score(theta: Theta, action: int | Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return the derivative of an action's logprob: 1 - s for the first (0), -s for the second (1)."""
    return (torch.as_tensor(action) == 0).double() - probability(theta)


def gradient_sample(
    theta: Theta, action: int | Int[Tensor, "*N"], rewards: Sequence[float] = REWARDS
) -> Float[Tensor, "*N"]:
    """Return the gradient sample of one action, `g = reward * score` (Williams 1992), without baseline."""
    return torch.tensor(rewards, dtype=torch.double)[action] * score(theta, action)


def expected_gradient(
    theta: Theta, steps: int = 1, rewards: Sequence[float] = REWARDS
) -> Float[Tensor, "*N"]:
    """Return the gradient of the expected return of an episode: `E[g] = T (r_1 - r_2) s (1 - s)`."""
    s = probability(theta)
    return steps * (rewards[0] - rewards[1]) * s * (1 - s)


def gradient_variance(
    theta: Theta,
    steps: int = 1,
    rewards: Sequence[float] = REWARDS,
    *,
    returns: Literal["total", "reward_to_go"] = "total",
    baseline: Literal["none", "mean"] = "none",
) -> Float[Tensor, "*N"]:
    """Return the variance of one episode's gradient sample `g = sum_t (G_t - b_t) x_t`, x_t the score at t.

    With `d = r_1 - r_2`, `v = s (1 - s)` and the mean reward `mu`, a reward is `mu + d x_t`, and a score has
    only two values, so `x_t^2 = v + (1 - 2 s) x_t`. Sorted by powers of different scores, which are
    uncorrelated, the sample is `T d v + sum_t (m_t - b_t + d (1 - 2 s)) x_t + k d sum_{t<u} x_t x_u`, thus

        Var[g] = v sum_t (m_t - b_t + d (1 - 2 s))^2 + k^2 d^2 v^2 T (T - 1) / 2

    If `G_t` is the total return, `m_t = E[G_t] = T mu` and k = 2; if it is the reward to go,
    `m_t = (T - t) mu` (t from 0) and k = 1. A baseline changes only the first sum, which grows like T^3
    without one and like T with `b_t = m_t`; the rest grows like T^2. For T = 1 and no baseline:
    `s (1 - s) (r_1 (1 - s) + r_2 s)^2`, with rewards 1 and 0 `s (1 - s)^3`.

    Args:
        theta: The parameter, any shape.
        steps: T, the number of actions of an episode.
        rewards: Rewards of the first and the second action.
        returns: The return `G_t` of an action: of the whole episode, or from the action on.
        baseline: None, or the mean return of the action, `b_t = E[G_t]`.

    Raises:
        Refused: `returns` or `baseline` is none of these names.
    """
    check_choice("returns", returns, ("total", "reward_to_go"))
    check_choice("baseline", baseline, ("none", "mean"))
    s = probability(theta)[..., None]  # [*N, 1], to broadcast over [T]
    v, d = s * (1 - s), rewards[0] - rewards[1]
    to_go = torch.arange(steps, 0, -1, dtype=torch.double)  # [T]
    # Number of rewards in G_t, [T]
    terms = to_go if returns == "reward_to_go" else torch.full_like(to_go, steps)
    mean = (rewards[1] + d * s) * terms if baseline == "none" else torch.zeros_like(terms)
    own = v * (mean + d * (1 - 2 * s)).square()  # [*N, T]
    pairs = (d * v).square() * steps * (steps - 1) / 2
    return own.sum(-1) + pairs[..., 0] * (4 if returns == "total" else 1)


def gradient_sd(theta: Theta, rewards: Sequence[float] = REWARDS) -> Float[Tensor, "*N"]:
    """Return the standard deviation of `gradient_sample`."""
    return gradient_variance(theta, 1, rewards).sqrt()


def standard_error(theta: Theta, samples: int, rewards: Sequence[float] = REWARDS) -> Float[Tensor, "*N"]:
    """Return the standard deviation of the mean of N = `samples` gradient samples: `sd / sqrt(N)`."""
    return gradient_sd(theta, rewards) / samples**0.5


class Bandit(gymnasium.Env[np.ndarray, np.int64]):
    """The bandit as an environment: a fixed reward for each action, and nothing to observe.

    Attributes:
        observation_space: [1], float32; the observation is always 1, as a linear policy needs it.
        action_space: 0 and 1, the first action and the second.
        rewards: Rewards of the two actions.
        steps: Number of actions after which the episode terminates; it is never truncated.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, gymnasium declares it so

    def __init__(self, rewards: Sequence[float] = REWARDS, steps: int = 1) -> None:
        """Make the bandit.

        Args:
            rewards: Rewards of the first and the second action.
            steps: T, the number of actions of an episode.

        Raises:
            Refused: There are not two finite rewards, or `steps` is not a whole number of at least 1.
        """
        if len(rewards) != 2:
            raise Refused(
                f"rewards were given as {rewards!r}; the bandit has two actions. Give one number for each, "
                "such as (1.0, 0.0)."
            )
        for reward in rewards:
            check_number("reward of an action", reward)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise Refused(f"steps was given as {steps!r}; it must be a whole number, 1 or more.")
        self.rewards, self.steps = (float(rewards[0]), float(rewards[1])), steps
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(2)
        self._left = 0  # actions until the end; none before the first reset

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; the seed changes nothing, since nothing here is random."""
        super().reset(seed=seed)
        self._left = self.steps
        return np.ones(1, np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take an action; return observation, reward, terminated, truncated and an empty info.

        Raises:
            ResetNeeded: No episode has begun, or it has ended.
            InvalidAction: The action is neither 0 nor 1.
        """
        if not self._left:
            raise ResetNeeded("The episode has ended or not begun; call reset() first.")
        if not self.action_space.contains(action):
            raise InvalidAction(f"action {action!r} was given; the bandit knows 0 and 1.")
        self._left -= 1
        return np.ones(1, np.float32), self.rewards[action], self._left == 0, False, {}
