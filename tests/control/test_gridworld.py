"""The grid: its moves and ends, and its exact values against sampling and against the estimator core."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tokenrl.control.environments import describe
from tokenrl.control.worlds import GridWorld, exact_return, exact_values, transitions
from tokenrl.errors import Refused

UP, RIGHT, DOWN, LEFT = range(4)
UNIFORM = np.full((16, 4), 0.25)


def play(env: GridWorld, actions: list[int], seed: int | None = None) -> list[tuple]:
    """(cell, reward, terminated, truncated) of each step until the episode ends."""
    env.reset(seed=seed)
    seen = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        assert observation.sum() == 1
        seen.append((int(observation.argmax()), reward, terminated, truncated))
        if terminated or truncated:
            break
    return seen


def test_only_the_seed_of_reset_decides():
    env = GridWorld(slip=0.5, random_start=True)
    first, again, other = (play(env, [RIGHT, DOWN] * 25, seed) for seed in (3, 3, 4))
    assert first == again != other
    starts = {env.reset()[1]["cell"] for _ in range(300)}
    assert starts == set(range(15))  # the goal is no start


def test_pictures():
    env = GridWorld(3, decoy=1, render_mode="ansi")
    assert play(env, [DOWN])
    assert env.render() == "S D .\nA . .\n. . G\n"
    env = GridWorld(size=2, decoy=1, render_mode="rgb_array")
    env.reset()
    picture = env.render()
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    corners = [tuple(map(int, picture[y, x])) for y, x in ((16, 16), (48, 48), (16, 48))]
    # the agent, the goal, the decoy
    assert corners == [
        (213, 94, 0),
        (0, 158, 115),
        (204, 121, 167),
    ]
    assert GridWorld().render() is None


def test_values_of_the_shortest_way_are_distances():
    down_then_right = np.zeros((16, 4))
    down_then_right[:12, DOWN] = down_then_right[12:, RIGHT] = 1
    steps = np.array([6 - r - c for r in range(4) for c in range(4)])
    wanted = np.where(steps > 0, 1 - 0.01 * steps, 0)
    assert exact_values(GridWorld(), down_then_right) == pytest.approx(wanted)
    assert exact_return(GridWorld(), down_then_right) == pytest.approx(0.94)
    assert exact_return(GridWorld(random_start=True), down_then_right) == pytest.approx(
        wanted[:15].mean()
    )
    assert exact_return(GridWorld(), down_then_right, horizon=6) == pytest.approx(0.94)
    assert exact_return(GridWorld(), down_then_right, horizon=5) == pytest.approx(-0.05)


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_values_solve_bellmans_equation_and_are_the_limit_of_horizons(slip):
    env = GridWorld(slip=slip)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), 16)
    values = exact_values(env, policy, gamma=0.97)
    chances = np.einsum("sa,sat->st", policy, transitions(env))
    rewards = np.where(np.arange(16) < 15, -0.01, 0) + chances[:, 15]
    assert np.allclose(values, rewards + 0.97 * chances @ values, atol=1e-12)
    assert np.allclose(values, exact_values(env, policy, gamma=0.97, horizon=3000), atol=1e-12)


def test_exact_return_is_the_mean_of_episodes():
    """Slips, random starts and the time limit included; 2000 episodes, five standard errors."""
    env = GridWorld(slip=0.2, random_start=True, time_limit=12, decoy=6, decoy_reward=0.5)
    policy = np.random.default_rng(1).dirichlet((1, 3, 3, 1), 16)
    actions, returns, starts = np.random.default_rng(2), [], set()
    env.reset(seed=5)
    for _ in range(2000):
        starts.add(env.reset()[1]["cell"])
        total, over = 0.0, False
        while not over:
            action = int((actions.random() > policy[env.cell].cumsum()).sum())
            _, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert starts == set(range(15)) - {6}
    error = np.std(returns) / np.sqrt(len(returns))
    assert error < 0.012
    assert abs(np.mean(returns) - exact_return(env, policy, horizon=12)) < 5 * error


@pytest.mark.parametrize(
    "options", [{}, {"slip": 0.3, "random_start": True, "render_mode": "rgb_array"}]
)
@pytest.mark.filterwarnings("ignore:.*alternative render modes")
def test_gymnasium_accepts_it(options):
    assert check_env(GridWorld(**options)) is None  # it raises otherwise


def test_moves_walls_and_ends():
    cells = [cell for cell, *_ in play(GridWorld(), [UP, LEFT, RIGHT, DOWN, DOWN, UP, LEFT, LEFT])]
    assert cells == [0, 0, 1, 5, 9, 5, 4, 4]
    way = [RIGHT, RIGHT, RIGHT, RIGHT, DOWN, DOWN, DOWN, UP]
    seen = play(GridWorld(step_reward=-0.5, goal_reward=3), way)
    assert [cell for cell, *_ in seen] == [1, 2, 3, 3, 7, 11, 15]
    assert [reward for _, reward, *_ in seen] == [-0.5] * 6 + [2.5]
    assert [(t, u) for *_, t, u in seen] == [(False, False)] * 6 + [(True, False)]
    assert [s[2:] for s in play(GridWorld(time_limit=3), [UP] * 5)] == [(False, False)] * 2 + [
        (False, True)
    ]
    # the step into the goal is no truncation
    for limit, end in (
        (6, (True, False)),
        (5, (False, True)),
    ):
        assert play(GridWorld(time_limit=limit), [RIGHT, DOWN] * 3)[-1][2:] == end
    for options, steps in (({}, 50), ({"time_limit": None}, 60)):
        assert len(play(GridWorld(**options), [UP] * 60)) == steps


RECIPES = Path(__file__).parents[2] / "recipes" / "control"
ENTROPY = SimpleNamespace(**runpy.run_path(str(RECIPES / "entropy.py")))
TRAP, TO_THE_RIGHT = ENTROPY.grid_of("trap"), np.eye(4)[[RIGHT] * 36]


def test_numbers_of_the_trap(capsys):
    """Those that the docstring of GridWorld states; only the goal reaches the threshold."""
    ENTROPY.print_facts("trap")
    said = capsys.readouterr().out
    assert (
        "goal 0.900, decoy 0.490; of a uniform policy 0.340 (ends: goal 4.6%, decoy 83.9%" in said
    )
    assert "then uniform: 0.210" in said and 0.49 < describe("trap").solved < 0.9
    plain, down = ENTROPY.grid_of("gridworld"), np.eye(4)[[DOWN] * 36]
    halves = (TO_THE_RIGHT + down) / 2  # down first, and then no step leads up to the decoy
    for grid, policy, chances in (
        *((TRAP, TO_THE_RIGHT, [0, 1, 0]), (TRAP, down, [0, 0, 1]), (TRAP, halves, [0.5, 0.5, 0])),
        (plain, halves[:16], [1, 0, 0]),
    ):
        # walls hold some up
        assert ENTROPY.chances_of(grid, policy) == pytest.approx(chances, abs=1e-8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GridWorld(size=1), "size"),
        (lambda: GridWorld(decoy=0), "decoy was given as 0.*from 1 to 14"),
        (lambda: exact_values(GridWorld(), np.full((4, 4), 0.25)), "policy"),
        (lambda: exact_values(GridWorld(), np.full((16, 4), 0.5)), "policy"),
        (
            lambda: exact_values(TRAP, TO_THE_RIGHT),
            "From cell 2 the policy never ends",
        ),  # at the right wall
    ],
)
def test_mistakes_are_refused(make, words):
    with pytest.raises(Refused, match=words):
        make()
