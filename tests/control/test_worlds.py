"""The small environments: their moves, rewards and ends; and the exact values that recipes compute of them."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from folders import RECIPES
from gymnasium.utils.env_checker import check_env

from tokenrl.control.environments import OWN, describe

UP, RIGHT, DOWN, LEFT = range(4)
LINE = [*range(1, 12)]
TO_THE_RIGHT, DOWNWARDS = np.eye(4)[[RIGHT] * 36], np.eye(4)[[DOWN] * 36]


@pytest.mark.parametrize("env", OWN)
def test_gymnasium_accepts_each_world(env):
    assert check_env(gymnasium.make(env).unwrapped, skip_render_check=True) is None


@pytest.mark.parametrize(
    ("env", "actions", "states", "reward", "last"),
    [
        ("gridworld", [UP, LEFT, RIGHT, DOWN, UP, LEFT], [0, 0, 1, 5, 1, 0], -0.01, None),
        ("gridworld", [RIGHT] * 4 + [DOWN] * 3, [1, 2, 3, 3, 7, 11, 15], -0.01, 0.99),
        ("trap", [RIGHT], [1], -0.01, 0.49),
        ("walk", [1] * 11, LINE, 0.01, 1),
        ("costly_walk", [0] * 11, [-x for x in LINE], -0.01, -1),
        ("bandit", [0], [0], 0, 1),
        ("bandit", [1], [0], 0, 0),
    ],
)
def test_moves_rewards_and_ends(env, actions, states, reward, last):
    """Only the last step ends the episode, with another reward; without one, the time limit is far."""
    world = gymnasium.make(env).unwrapped
    for _ in range(2):
        world.reset(seed=0)
        steps = [(*world.step(action), world.state) for action in actions]
        observations, rewards, terminated, truncated, _, visited = zip(*steps, strict=True)
        assert visited == tuple(states)
        ends = last is not None
        assert terminated == (*[False] * (len(steps) - 1), ends) and not any(truncated)
        expected = [reward] * len(steps)
        assert rewards == pytest.approx([*expected[ends:], *[last] * ends])
        if "walk" in env:
            assert np.allclose(observations, [[state / 10, 0, 0, 0] for state in states])


def program(name):
    return SimpleNamespace(**runpy.run_path(str(RECIPES / "control" / f"{name}.py")))


ENTROPY = program("entropy")


def test_numbers_of_the_trap(capsys):
    """Those that the docstring of GridWorld states; only the goal reaches the threshold."""
    ENTROPY.print_start("trap")
    output = capsys.readouterr().out
    assert "a uniform policy returns 0.340 (ends: goal 4.6%, decoy 83.9%" in output
    assert "then uniform: 0.210" in output
    grid = ENTROPY.grid_of("trap")
    along_the_wall = np.concatenate([DOWNWARDS[:30], TO_THE_RIGHT[:6]])
    for policy, value in ((along_the_wall, 0.9), (TO_THE_RIGHT, 0.49)):
        assert ENTROPY.values_of(grid, policy)[0] == pytest.approx(value)
    assert 0.49 < describe("trap").solved < 0.9
