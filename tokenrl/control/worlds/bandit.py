"""The sigmoid bandit: two actions, one parameter theta, and every number of its gradient known by hand.

The policy takes the first action with chance `s = sigmoid(theta)`. Its score is 1 - s there and -s at the
second action, and the reward of either is certain, so that the policy alone is random. An episode is one
action, or T of them in a row that share theta (`steps`). What a gradient sample is worth then has a closed
form, for any T: see `gradient_variance`. The functions compute in float64 and are differentiable in theta.
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
"""Of the first action (index 0) and the second (index 1)."""


def probability(theta: Theta) -> Float[Tensor, "*N"]:
    """Give the chance of the first action: `s = sigmoid(theta) = 1 / (1 + exp(-theta))`."""
    return torch.sigmoid(torch.as_tensor(theta, dtype=torch.double))


def score(theta: Theta, action: int | Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Give the derivative of the logprob of an action: 1 - s for the first (0), -s for the second (1)."""
    return (torch.as_tensor(action) == 0).double() - probability(theta)


def gradient_sample(
    theta: Theta, action: int | Int[Tensor, "*N"], rewards: Sequence[float] = REWARDS
) -> Float[Tensor, "*N"]:
    """Give what one action says about the gradient: `g = reward * score` (Williams 1992), no baseline."""
    return torch.tensor(rewards, dtype=torch.double)[action] * score(theta, action)


def expected_gradient(
    theta: Theta, steps: int = 1, rewards: Sequence[float] = REWARDS
) -> Float[Tensor, "*N"]:
    """Give the gradient of the expected return of an episode: `E[g] = T (r_1 - r_2) s (1 - s)`."""
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
    """Give the variance of one episode's gradient sample `g = sum_t (G_t - b_t) x_t`, x_t the score at t.

    With `d = r_1 - r_2`, `v = s (1 - s)` and the mean reward `mu`, a reward is `mu + d x_t`, and a score has
    only two values, so `x_t^2 = v + (1 - 2 s) x_t`. Sorted by powers of different scores, which are
    uncorrelated, the sample is `T d v + sum_t (m_t - b_t + d (1 - 2 s)) x_t + k d sum_{t<u} x_t x_u`, thus

        Var[g] = v sum_t (m_t - b_t + d (1 - 2 s))^2 + k^2 d^2 v^2 T (T - 1) / 2

    where `m_t = E[G_t]` is `T mu` and k = 2 if each action is paid the total return, `(T - t) mu` (t from 0)
    and k = 1 if it is paid the reward to go. Only the first sum sees a baseline. Without one it grows like
    T^3; with `b_t = m_t` like T, and what remains like T^2. For T = 1 and no baseline:
    `s (1 - s) (r_1 (1 - s) + r_2 s)^2`, with rewards 1 and 0 `s (1 - s)^3`.

    Args:
        theta: The parameter, any shape.
        steps: T, the actions of an episode.
        rewards: Of the first and the second action.
        returns: What each action is paid.
        baseline: Nothing, or the mean of what the action is paid, `b_t = E[G_t]`.

    Raises:
        Refused: For other returns or another baseline.
    """
    check_choice("returns", returns, ("total", "reward_to_go"))
    check_choice("baseline", baseline, ("none", "mean"))
    s = probability(theta)[..., None]  # [*N, 1], beside T
    v, d = s * (1 - s), rewards[0] - rewards[1]
    to_go = torch.arange(steps, 0, -1, dtype=torch.double)  # [T]
    paid = to_go if returns == "reward_to_go" else torch.full_like(to_go, steps)
    mean = (rewards[1] + d * s) * paid if baseline == "none" else torch.zeros_like(paid)
    own = v * (mean + d * (1 - 2 * s)).square()  # [*N, T]
    pairs = (d * v).square() * steps * (steps - 1) / 2
    return own.sum(-1) + pairs[..., 0] * (4 if returns == "total" else 1)


def gradient_sd(theta: Theta, rewards: Sequence[float] = REWARDS) -> Float[Tensor, "*N"]:
    """Give the standard deviation of `gradient_sample`."""
    return gradient_variance(theta, 1, rewards).sqrt()


def standard_error(theta: Theta, samples: int, rewards: Sequence[float] = REWARDS) -> Float[Tensor, "*N"]:
    """Give the standard deviation of the mean of so many gradient samples: `sd / sqrt(N)`."""
    return gradient_sd(theta, rewards) / samples**0.5


class Bandit(gymnasium.Env[np.ndarray, np.int64]):
    """The bandit as an environment: one certain reward an action, and nothing to observe.

    Attributes:
        observation_space: [1], float32, and always 1: what a policy linear in the observation needs.
        action_space: 0 and 1, the first action and the second.
        rewards: Of the two actions.
        steps: Actions until the episode has terminated; it is never truncated.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, gymnasium declares it so

    def __init__(self, rewards: Sequence[float] = REWARDS, steps: int = 1) -> None:
        """Make the bandit.

        Args:
            rewards: Of the first and the second action.
            steps: T, the actions of an episode.

        Raises:
            Refused: When there are not two finite rewards, or `steps` is no whole number from 1 up.
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
        """Begin an episode; the seed changes nothing, for nothing here is random."""
        super().reset(seed=seed)
        self._left = self.steps
        return np.ones(1, np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Pay the action; returns observation, reward, terminated, truncated and an empty info.

        Raises:
            ResetNeeded: Outside an episode.
            InvalidAction: When the action is neither 0 nor 1.
        """
        if not self._left:
            raise ResetNeeded("The episode has ended or not begun: call reset() first.")
        if not self.action_space.contains(action):
            raise InvalidAction(f"action {action!r} was given; the bandit knows 0 and 1.")
        self._left -= 1
        return np.ones(1, np.float32), self.rewards[action], self._left == 0, False, {}
