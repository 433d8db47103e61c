"""The grid: its moves and ends, and its exact values against sampling and against the estimator core."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import numpy as np
import pytest
from folders import RECIPES
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TimeLimit
from refusals import refused

from tokenrl.control import GRIDWORLD_STEPS
from tokenrl.control.environments import describe
from tokenrl.control.worlds import (
    Bandit,
    GridWorld,
    Walk,
    exact_return,
    exact_values,
    transitions,
)

UP, RIGHT, DOWN, LEFT = range(4)


def play(env: GridWorld, actions: list[int], seed: int | None = None) -> list[tuple]:
    """(cell, reward, terminated, truncated) of each step until the episode ends."""
    env.reset(seed=seed)
    steps = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        assert observation.sum() == 1
        steps.append((int(observation.argmax()), reward, terminated, truncated))
        if terminated or truncated:
            break
    return steps


def test_only_the_seed_of_reset_decides():
    env = GridWorld(slip=0.5, random_start=True)
    first, again, different = (play(env, [RIGHT, DOWN] * 25, seed) for seed in (3, 3, 4))
    assert first == again != different
    starts = {env.reset()[1]["cell"] for _ in range(300)}
    assert starts == set(range(15))  # the goal is no start


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_values_solve_bellmans_equation(slip):
    env = GridWorld(slip=slip)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), 16)
    values = exact_values(env, policy, gamma=0.97, horizon=3000)
    chances = np.einsum("sa,sat->st", policy, transitions(env))
    rewards = np.where(np.arange(16) < 15, -0.01, 0) + chances[:, 15]
    assert np.allclose(values, rewards + 0.97 * chances @ values, atol=1e-12)


def test_exact_return_is_the_mean_of_episodes():
    """Slips, random starts and the time limit included; 2000 episodes, five standard errors."""
    env = GridWorld(slip=0.2, random_start=True, decoy=6, decoy_reward=0.5)
    limited = TimeLimit(env, 12)
    policy = np.random.default_rng(1).dirichlet((1, 3, 3, 1), 16)
    actions, returns, starts = np.random.default_rng(2), [], set()
    limited.reset(seed=5)
    for _ in range(2000):
        starts.add(limited.reset()[1]["cell"])
        total, over = 0.0, False
        while not over:
            action = int((actions.random() > policy[env.cell].cumsum()).sum())
            _, reward, terminated, truncated, _ = limited.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert starts == set(range(15)) - {6}
    error = np.std(returns) / np.sqrt(len(returns))
    assert error < 0.012
    assert abs(np.mean(returns) - exact_return(env, policy, horizon=12)) < 5 * error


@pytest.mark.parametrize(
    "env",
    [
        GridWorld(),
        GridWorld(slip=0.3, random_start=True, render_mode="rgb_array"),
        Walk(),
        Bandit(),
        Bandit(steps=5),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*alternative render modes")
def test_gymnasium_accepts_each_world(env):
    assert check_env(env, skip_render_check=env.render_mode is None) is None  # it raises otherwise


def test_moves_walls_and_ends():
    cells = [cell for cell, *_ in play(GridWorld(), [UP, LEFT, RIGHT, DOWN, DOWN, UP, LEFT, LEFT])]
    assert cells == [0, 0, 1, 5, 9, 5, 4, 4]
    path = [RIGHT, RIGHT, RIGHT, RIGHT, DOWN, DOWN, DOWN, UP]
    steps = play(GridWorld(step_reward=-0.5, goal_reward=3), path)
    cells = [1, 2, 3, 3, 7, 11]
    assert steps == [*((cell, -0.5, False, False) for cell in cells), (15, 2.5, True, False)]


PROGRAMS = RECIPES / "control"
ENTROPY = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "entropy.py")))
TO_THE_RIGHT = np.eye(4)[[RIGHT] * 36]


def test_numbers_of_the_trap(capsys):
    """Those that the docstring of GridWorld states; only the goal reaches the threshold."""
    ENTROPY.print_start("trap")
    output = capsys.readouterr().out
    assert "a uniform policy returns 0.340 (ends: goal 4.6%, decoy 83.9%" in output
    assert "then uniform: 0.210" in output
    grid = ENTROPY.grid_of("trap")
    right, down = TO_THE_RIGHT, DOWNWARDS
    along_the_wall = np.concatenate([down[: grid.cells - grid.size], right[: grid.size]])
    for policy, value in ((along_the_wall, 0.9), (right, 0.49)):
        result = exact_return(grid, policy, horizon=GRIDWORLD_STEPS)
        assert float(result) == pytest.approx(value, abs=5e-4)
    assert 0.49 < describe("trap").solved < 0.9


DOWNWARDS = np.eye(4)[[DOWN] * 36]
HALVES = (TO_THE_RIGHT + DOWNWARDS) / 2


@pytest.mark.parametrize(
    ("name", "policy", "chances"),
    [
        ("trap", TO_THE_RIGHT, [0, 1, 0]),
        ("trap", DOWNWARDS, [0, 0, 1]),  # the lower wall holds it up
        ("trap", HALVES, [0.5, 0.5, 0]),  # down first, and then no step leads up to the decoy
        ("gridworld", HALVES[:16], [1, 0, 0]),
    ],
)
def test_chances_of_goal_and_decoy(name, policy, chances):
    grid = ENTROPY.grid_of(name)
    assert ENTROPY.chances_of(grid, policy) == pytest.approx(chances, abs=1e-8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GridWorld(size=1), "size"),
        (lambda: GridWorld(decoy=0), "decoy was given as 0.*from 1 to 14"),
        (lambda: exact_values(GridWorld(), np.full((4, 4), 0.25), horizon=9), "policy"),
        (lambda: exact_values(GridWorld(), np.full((16, 4), 0.5), horizon=9), "policy"),
    ],
)
def test_mistakes_are_refused(make, words):
    with refused(words):
        make()
