"""The small environments: a grid with or without a decoy, a walk on a line, and a bandit with two arms.

Nothing in them is random. `recipes/control/grid_values.py` computes the expected returns of the grid exactly.
Mean and variance of the gradient on the bandit are known in closed form, which `recipes/control/1_bandit.py`
computes.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

Observation = NDArray[np.float32]
Step = tuple[Observation, float, bool, bool, dict[str, Any]]
"""The next observation, the reward, terminated, truncated (by gymnasium's TimeLimit alone), and no more facts."""
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Row and column of a step up, right, down, left: the actions 0 to 3."""


class World(gymnasium.Env[Observation, np.int64]):
    """An environment whose state is a whole number, which is 0 at the start of each episode.

    Attributes:
        state: the state.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  gymnasium's own form
    render_mode = None

    def __init__(self, observations: Any, actions: int) -> None:
        """Set the space of observations, and the number of actions."""
        self.observation_space = observations
        self.action_space = Discrete(actions)
        self.state = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; the seed changes nothing, and no options are known."""
        super().reset(seed=seed)
        self.state = 0
        return self.observe(), {}

    def observe(self) -> Observation:
        """Return what the policy sees of the state."""
        raise NotImplementedError


class GridWorld(World):
    """Walk from the upper left corner of a grid to the lower right one.

    The cells are numbered row by row; cell 0 is the start and the last cell is the goal. A move into a wall
    stays in its cell. The reward of a step is -0.01; the reward of the step into the goal is larger by 1, and
    this step ends the episode (terminated). gymnasium's TimeLimit truncates episodes.

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

    Attributes:
        size: number of cells per side.
        cells: number of cells.
        next_cells: the cell to which each action leads from each cell, [cells, 4].
        ends: the cells that end an episode, and what is added to the reward of the step into them.
        step_reward: reward of each step.
    """

    step_reward = -0.01

    def __init__(
        self, size: int = 4, *, decoy: int | None = None, decoy_reward: float = 0.0
    ) -> None:
        """Lay out the grid.

        Args:
            size: number of cells per side, at least 2.
            decoy: a cell between start and goal that ends the episode too; None for no such cell.
            decoy_reward: added to the reward of the step into the decoy.
        """
        self.size = size
        self.cells = size * size
        self.ends = {self.cells - 1: 1.0}
        if decoy is not None:
            self.ends[decoy] = decoy_reward
        positions = np.stack(np.divmod(np.arange(self.cells), size), axis=-1)  # row and column
        neighbours = positions[:, None] + np.array(MOVES)
        self.next_cells = neighbours.clip(0, size - 1) @ [size, 1]
        super().__init__(Box(0.0, 1.0, (self.cells,), np.float32), len(MOVES))

    def step(self, action: np.int64 | int) -> Step:
        """Take one step."""
        self.state = int(self.next_cells[self.state, action])
        reward = self.step_reward + self.ends.get(self.state, 0.0)
        return self.observe(), reward, self.state in self.ends, False, {}

    def observe(self) -> Observation:
        """Return the cell as a one-hot vector."""
        return np.eye(self.cells, dtype=np.float32)[self.state]


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

    def __init__(self, *, step_reward: float = 0.01) -> None:
        """Make the walk.

        Args:
            step_reward: reward of each step that does not end the episode at either end.
        """
        self.step_reward = step_reward
        end = np.float32(LAST / 10)
        super().__init__(Box(-end, end, (4,), np.float32), 2)

    def step(self, action: np.int64 | int) -> Step:
        """Take one step, 0 to the left or 1 to the right."""
        # The state counts whole steps: tenths added up in floating point miss the limit.
        self.state += 2 * int(action) - 1
        terminated = abs(self.state) >= LAST
        reward = float(np.sign(self.state)) if terminated else self.step_reward
        return self.observe(), reward, terminated, False, {}

    def observe(self) -> Observation:
        """Return (x, 0, 0, 0)."""
        return np.array([self.state / 10, 0, 0, 0], np.float32)


class Bandit(World):
    """Two actions with the rewards 1 and 0, and nothing to observe: the sigmoid bandit.

    A policy with one parameter theta takes the first action with probability sigmoid(theta). An episode is
    one action; it terminates then and is never truncated.

    Actions: `Discrete(2)`. Observations: `Box(0, 1, [1], float32)`, always 1, as a linear policy needs it.
    """

    def __init__(self) -> None:
        """Make the bandit."""
        super().__init__(Box(0.0, 1.0, (1,), np.float32), 2)

    def step(self, action: np.int64 | int) -> Step:
        """Take the first action, index 0, or the second."""
        return self.observe(), 1.0 - int(action), True, False, {}

    def observe(self) -> Observation:
        """Return the constant 1."""
        return np.ones(1, np.float32)
