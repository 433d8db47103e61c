"""The small environments: a grid with or without a decoy, a walk on a line, and a bandit with two arms.

The expected returns of the grid can also be computed exactly (`exact_values`). Mean and variance of the
gradient on the bandit are known in closed form, which `recipes/control/1_bandit.py` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from tokenrl.errors import Refused
from tokenrl.settings import check_number

Observation = NDArray[np.float32]
World = gymnasium.Env[Observation, np.int64]
ResetResult = tuple[Observation, dict[str, Any]]
"""The first observation of an episode, and facts about it."""
StepResult = tuple[Observation, float, bool, bool, dict[str, Any]]
"""The next observation, the reward, terminated, truncated, and facts about the step."""
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Row and column of a step up, right, down, left: the actions 0 to 3."""

GRIDWORLD_STEPS = 50
"""Steps after which an episode of the default environment is truncated, by gymnasium's TimeLimit."""

FLOOR = (240, 240, 240)
START = (204, 222, 235)
GOAL = (0, 158, 115)
AGENT = (213, 94, 0)
DECOY = (204, 121, 167)
TILE = 32  # pixels


class GridWorld(World):
    """Walk from the upper left corner of a grid to the lower right one.

    The cells are numbered row by row; cell 0 is the start and the last cell is the goal. A move into a wall
    stays in its cell. The reward of a step is `step_reward`; the reward of the step into the goal is larger
    by `goal_reward`, and this step ends the episode (terminated). gymnasium's TimeLimit truncates episodes.

    The observation is the cell as a one-hot vector, so that a linear softmax policy has one weight per
    cell and action. By default the shortest path takes 6 steps and its return is 0.94. A uniform policy
    reaches the goal in 56 % of episodes and has a mean return of 0.187. Returns of paths that reach the goal
    differ little, such as 0.94 and 0.90, compared with their size; that is why a baseline helps.

    A decoy is one more cell that ends the episode, with another reward. The environment `trap` is a grid of 6
    x 6 cells with a decoy of 0.5 in cell 1, one step to the right of the start. The return of this step is
    0.49. The shortest path to the goal, 10 steps, has a return of 0.90. A uniform policy ends in the decoy in
    83.9 % of episodes and at the goal in 4.6 %, and its mean return is 0.340. Stepping down first, away from
    the decoy, and acting uniformly from there has a mean return of 0.210: the gradient points to the decoy.

    Actions: `Discrete(4)`, up, right, down, left. Observations: `Box(0, 1, [size^2], float32)`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012  gymnasium's own form

    def __init__(
        self,
        size: int = 4,
        *,
        slip: float = 0.0,
        random_start: bool = False,
        step_reward: float = -0.01,
        goal_reward: float = 1.0,
        decoy: int | None = None,
        decoy_reward: float = 0.0,
        render_mode: str | None = None,
    ) -> None:
        """Lay out the grid.

        Args:
            size: Number of cells per side, at least 2.
            slip: Probability that a step goes in a direction drawn uniformly from all four instead.
            random_start: Start in any cell that is no end, all equally likely, instead of cell 0.
            step_reward: Reward of each step.
            goal_reward: Added to the reward of the step into the goal.
            decoy: A cell that ends the episode too, neither the start nor the goal; None for no such cell.
            decoy_reward: Added to the reward of the step into the decoy.
            render_mode: `rgb_array` for a picture [32 size, 32 size, 3].

        Raises:
            Refused: The decoy is no cell between the start and the goal.
        """
        check_number("size", size, int, at_least=2)
        if (decoy is not None or decoy_reward) and decoy not in range(1, size * size - 1):
            raise Refused(
                f"decoy was given as {decoy!r}; it must be a cell from 1 to {size * size - 2}."
            )
        self.size = size
        self.cells = size * size
        self.goal = size * size - 1
        self.ends = {self.goal: goal_reward}  # by cell
        if decoy is not None:
            self.ends[decoy] = decoy_reward
        self.decoy = decoy
        self.starts = [0]
        if random_start:
            self.starts = [cell for cell in range(self.cells) if cell not in self.ends]
        self.slip = slip
        self.step_reward = step_reward
        self.render_mode = render_mode
        self.action_space = Discrete(len(MOVES))
        self.observation_space = Box(0.0, 1.0, (self.cells,), np.float32)
        self.next_cells = next_cells(size)
        self.cell = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Begin an episode; a seed fixes the starting cells and the slips from here on. No options are known.

        Returns:
            The observation, and {"cell": its number}.
        """
        super().reset(seed=seed)
        self.cell = self.starts[int(self.np_random.integers(len(self.starts)))]
        return self.observe(), {"cell": self.cell}

    def step(self, action: np.int64 | int) -> StepResult:
        """Take one step.

        Returns:
            The observation, the reward, terminated, truncated, and {"cell": its number}.
        """
        if self.slip and self.np_random.random() < self.slip:
            action = int(self.np_random.integers(len(MOVES)))
        self.cell = int(self.next_cells[self.cell, action])
        terminated = self.cell in self.ends
        reward = self.step_reward + self.ends.get(self.cell, 0.0)
        return self.observe(), reward, terminated, False, {"cell": self.cell}

    def observe(self) -> Observation:
        """Return the cell as a one-hot vector."""
        observation = np.zeros(self.cells, np.float32)
        observation[self.cell] = 1.0
        return observation

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """Return the grid as a picture, with the render mode `rgb_array`."""
        if self.render_mode != "rgb_array":
            return None
        colours = np.full((self.cells, 3), FLOOR, np.uint8)
        colours[0] = START
        colours[[cell for cell in self.ends if cell != self.goal]] = DECOY
        colours[self.goal] = GOAL
        colours[self.cell] = AGENT
        picture = colours.reshape(self.size, self.size, 3).repeat(TILE, 0).repeat(TILE, 1)
        picture[::TILE] = 255
        picture[:, ::TILE] = 255
        return picture


def next_cells(size: int) -> NDArray[np.int64]:
    """Return the cell to which each action leads from each cell without slips, [size^2, 4]."""
    positions = np.stack(np.divmod(np.arange(size * size), size), axis=-1)  # row and column
    neighbours = positions[:, None] + np.array(MOVES)
    return neighbours.clip(0, size - 1) @ [size, 1]


def transitions(env: GridWorld) -> NDArray[np.float64]:
    """Return `P(s' | s, a)`, [cells, 4, cells]; 0 from goal and decoy, where the episode ends."""
    intended = np.eye(env.cells)[env.next_cells]
    chances = (1 - env.slip) * intended + env.slip * intended.mean(1, keepdims=True)
    chances[list(env.ends)] = 0.0
    return chances


def exact_values(
    env: GridWorld, policy: NDArray[np.float64], *, horizon: int, gamma: float = 1.0
) -> NDArray[np.float64]:
    """Return the expected return from each cell, without sampling.

    `V = r + gamma P V`, with `r(s) = sum_a pi(a|s) r(s, a)` and P the policy's transitions, is iterated
    `horizon` times from V = 0, because there are no rewards after truncation.

    Args:
        env: The grid.
        policy: [cells, 4]; each row holds the probabilities of the four actions in a cell.
        horizon: Number of steps still to take.
        gamma: Discount per step.

    Returns:
        Values of the cells, [cells]; 0 at the goal and at the decoy.

    Raises:
        Refused: The policy is not such a table.
    """
    policy = np.asarray(policy, np.float64)
    if (
        policy.shape != (env.cells, 4)
        or (policy < 0).any()
        or not np.allclose(policy.sum(1), 1, atol=1e-6)
    ):
        raise Refused(
            f"policy {policy.shape} must have four probabilities for each of {env.cells} cells."
        )
    chances = transitions(env)
    moves = np.einsum("sa,sat->st", policy, chances)
    ends = list(env.ends)
    end_rewards = list(env.ends.values())
    alive = ~np.isin(np.arange(env.cells), ends)
    rewards = env.step_reward * alive + moves[:, ends] @ end_rewards
    values = np.zeros(env.cells)
    for _ in range(horizon):
        values = rewards + gamma * moves @ values
    return values


def exact_return(env: GridWorld, policy: NDArray[np.float64], *, horizon: int) -> float:
    """Return J, the expected return of an episode: the mean of `exact_values` over the starting cells.

    Raises:
        Refused: As for `exact_values`.
    """
    values = exact_values(env, policy, horizon=horizon)
    return float(values[env.starts].mean())


LAST = 11
"""Steps of 0.1 from the middle of the walk to the first place beyond 1."""


class Walk(World):
    """Start at x = 0 and step by 0.1 to the left or to the right, until x is beyond 1 or -1.

    The step to x = 1.1 has a reward of 1, the step to x = -1.1 a reward of -1, and both end the episode
    (terminated). Every other step has the reward `step_reward`. gymnasium's TimeLimit truncates episodes.

    By default the reward of a step is 0.01. Stepping to and fro for the whole episode has the return 0.5. The
    straight path of eleven steps to the right has the return 1.1, and slower paths to the right have up to
    1.48. The mean return of a uniform policy is 0.459, and 76 % of its episodes are truncated. With a step
    reward of -0.01, which is the environment `costly_walk`, the straight path is the best, with a return of
    0.9.

    Actions: `Discrete(2)`, left, right. Observations: `Box(-1.1, 1.1, [4], float32)`, which are (x, 0, 0, 0).
    """

    metadata = {"render_modes": []}  # noqa: RUF012  gymnasium's own form

    def __init__(self, *, step_reward: float = 0.01) -> None:
        """Make the walk.

        Args:
            step_reward: Reward of each step that does not end the episode at either end.
        """
        self.step_reward = step_reward
        self.render_mode = None
        self.action_space = Discrete(2)
        end = np.float32(LAST / 10)
        self.observation_space = Box(-end, end, (4,), np.float32)
        # in whole steps: tenths added up in floating point miss the limit
        self.position = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Begin an episode at x = 0. Nothing here is random, and no options are known."""
        super().reset(seed=seed)
        self.position = 0
        return self.observe(), {}

    def step(self, action: np.int64 | int) -> StepResult:
        """Take one step, 0 to the left or 1 to the right.

        Returns:
            The observation, the reward, terminated, truncated, and an empty dict.
        """
        self.position += 2 * int(action) - 1
        terminated = abs(self.position) >= LAST
        reward = float(np.sign(self.position)) if terminated else self.step_reward
        return self.observe(), reward, terminated, False, {}

    def observe(self) -> Observation:
        """Return (x, 0, 0, 0)."""
        return np.array([self.position / 10, 0, 0, 0], np.float32)


class Bandit(World):
    """Two actions with fixed rewards and nothing to observe: the sigmoid bandit.

    A policy with one parameter theta takes the first action with probability sigmoid(theta). An episode is
    one action, or several in a row that share theta; it terminates then and is never truncated.

    Actions: `Discrete(2)`. Observations: `Box(0, 1, [1], float32)`, always 1, as a linear policy needs it.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  gymnasium's own form

    def __init__(self, rewards: Sequence[float] = (1.0, 0.0), steps: int = 1) -> None:
        """Make the bandit.

        Args:
            rewards: Rewards of the first action (index 0) and of the second.
            steps: T, the number of actions of an episode.

        Raises:
            Refused: There are not two rewards.
        """
        if len(rewards) != 2:
            raise Refused(
                f"rewards were given as {rewards!r}; the bandit has two actions, so give two numbers."
            )
        self.rewards = (float(rewards[0]), float(rewards[1]))
        self.steps = steps
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(2)
        self._left = steps  # actions until the end

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Begin an episode; the seed changes nothing, since nothing here is random."""
        super().reset(seed=seed)
        self._left = self.steps
        return np.ones(1, np.float32), {}

    def step(self, action: np.int64 | int) -> StepResult:
        """Take an action; return observation, reward, terminated, truncated and an empty info."""
        self._left -= 1
        return np.ones(1, np.float32), self.rewards[action], self._left == 0, False, {}
