"""The grid: its moves and ends, and its exact values against sampling and against the estimator core."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from tokenrl.control.environments import describe
from tokenrl.control.training import train_agent
from tokenrl.control.worlds import GridWorld, exact_return, exact_values, transitions
from tokenrl.core import Estimator
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


@pytest.mark.parametrize("options", [{}, {"slip": 0.3, "random_start": True, "render_mode": "rgb_array"}])
def test_gymnasium_accepts_it(options):
    env = GridWorld(**options)
    check_env(env)
    assert env.observation_space.shape == (16,)
    assert env.observation_space.dtype == np.float32


def test_moves_and_walls():
    cells = [cell for cell, *_ in play(GridWorld(), [UP, LEFT, RIGHT, DOWN, DOWN, UP, LEFT, LEFT])]
    assert cells == [0, 0, 1, 5, 9, 5, 4, 4]


def test_the_goal_terminates_and_pays():
    seen = play(
        GridWorld(step_reward=-0.5, goal_reward=3), [RIGHT, RIGHT, RIGHT, RIGHT, DOWN, DOWN, DOWN, UP]
    )
    assert [cell for cell, *_ in seen] == [1, 2, 3, 3, 7, 11, 15]
    assert [reward for _, reward, *_ in seen] == [-0.5] * 6 + [2.5]
    assert [(t, u) for *_, t, u in seen] == [(False, False)] * 6 + [(True, False)]


def test_the_time_limit_truncates_but_not_at_the_goal():
    assert [s[2:] for s in play(GridWorld(time_limit=3), [UP] * 5)] == [(False, False)] * 2 + [(False, True)]
    assert play(GridWorld(time_limit=6), [RIGHT, DOWN] * 3)[-1][2:] == (True, False)
    assert play(GridWorld(time_limit=5), [RIGHT, DOWN] * 3)[-1][2:] == (False, True)
    assert len(play(GridWorld(), [UP] * 60)) == 50
    assert len(play(GridWorld(time_limit=None), [UP] * 60)) == 60


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
    assert corners == [(213, 94, 0), (0, 158, 115), (204, 121, 167)]  # the agent, the goal, the decoy
    assert GridWorld().render() is None


def test_values_of_the_shortest_way_are_distances():
    down_then_right = np.zeros((16, 4))
    down_then_right[:12, DOWN] = down_then_right[12:, RIGHT] = 1
    steps = np.array([6 - r - c for r in range(4) for c in range(4)])
    wanted = np.where(steps > 0, 1 - 0.01 * steps, 0)
    assert exact_values(GridWorld(), down_then_right) == pytest.approx(wanted)
    discounted = [sum(-0.01 * 0.9**k for k in range(n)) + 0.9 ** (n - 1) * (n > 0) for n in steps]
    assert exact_values(GridWorld(), down_then_right, gamma=0.9) == pytest.approx(discounted)
    assert exact_return(GridWorld(), down_then_right) == pytest.approx(0.94)
    assert exact_return(GridWorld(random_start=True), down_then_right) == pytest.approx(wanted[:15].mean())
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


@pytest.mark.parametrize("preset", ["reinforce", "a2c"])
@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_estimators_on_every_episode_give_the_slope_of_the_exact_return(preset, returns):
    """All 4^4 ways to act for 4 steps in a 2x2 grid, played and weighed by their chance."""
    env, horizon = GridWorld(size=2, time_limit=4, step_reward=-0.3), 4
    logits = torch.randn(4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ways = torch.tensor(list(itertools.product(range(4), repeat=horizon)))
    cells, rewards = torch.zeros(256, horizon, dtype=torch.long), torch.zeros(256, horizon).double()
    mask = torch.zeros(256, horizon).double()
    for i, way in enumerate(ways.tolist()):
        before = 0
        for t, (cell, reward, *_) in enumerate(play(env, way)):
            cells[i, t], rewards[i, t], mask[i, t], before = before, reward, 1.0, cell
    policy = logits.clone().requires_grad_()
    logprobs = policy.log_softmax(-1)[cells, ways]
    # ways that differ after the end only are one episode: each counts for its share of the uniform tails
    chance = ((logprobs * mask).sum(1).exp() / 4.0 ** (horizon - mask.sum(1))).detach()
    assert float(chance.sum()) == pytest.approx(1, abs=1e-12)

    estimator = Estimator.preset(preset, returns=returns)
    values = torch.tensor([0.7, -0.4, 1.1, 0.0]).double()[cells]  # any function of the cell leaves it exact
    advantages = estimator.advantages(rewards, mask, group_size=None, values=values).policy
    weights = estimator.token_weights(mask, max_length=horizon) * 256 * chance[:, None]
    (gradient,) = torch.autograd.grad(-estimator.loss(logprobs, advantages, weights, mask), policy)

    def expected(table: torch.Tensor) -> float:
        return exact_return(env, table.softmax(-1).numpy(), horizon=horizon)

    slopes = torch.zeros_like(logits)
    for i, j in itertools.product(range(4), range(4)):
        bump = torch.zeros_like(logits)
        bump[i, j] = 1e-5
        slopes[i, j] = (expected(logits + bump) - expected(logits - bump)) / 2e-5
    assert slopes.norm() > 0.05
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-9)


@pytest.fixture
def trap():
    return gymnasium.make(describe("trap").env).unwrapped


def test_only_the_goal_reaches_the_threshold(trap):
    right = np.eye(4)[[RIGHT] * 36]
    down_then_right = np.eye(4)[[DOWN] * 30 + [RIGHT] * 6]
    assert exact_return(trap, right, horizon=50) == pytest.approx(0.49)
    assert exact_return(trap, down_then_right) == pytest.approx(0.9)
    assert 0.49 < describe("trap").solved < 0.9


def test_numbers_of_the_uniform_policy(trap):
    """Those that the docstring of GridWorld states."""
    uniform = np.full((36, 4), 0.25)
    assert exact_return(trap, uniform, horizon=50) == pytest.approx(0.340, abs=5e-4)
    assert exact_values(trap, uniform, horizon=49)[6] - 0.01 == pytest.approx(0.210, abs=5e-4)
    for pays, chance in (("decoy_reward", 0.839), ("goal_reward", 0.046)):
        options = {"goal_reward": 0.0, "step_reward": 0.0} | {pays: 1.0}
        alone = GridWorld(6, decoy=1, **options)
        assert exact_return(alone, uniform, horizon=50) == pytest.approx(chance, abs=5e-4)


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


def chance_of_goal(trap: GridWorld, beta: float, seed: int, updates: int, folder) -> float:
    run = train_agent(
        env="trap",
        estimator=Estimator(baseline="running_mean", returns="reward_to_go", entropy_coef=beta),
        entropy_schedule="linear",
        hidden=(),
        num_envs=10,
        max_steps=updates,
        learning_rate=0.2,
        seed=seed,
        eval_every=0,
        eval_episodes=1,
        output_dir=str(folder / f"{beta:g}-{seed}"),
        quiet=True,
    )
    with torch.no_grad():
        policy = run.policy(torch.eye(trap.cells)).double().softmax(-1).numpy()
    goal_alone = GridWorld(trap.size, step_reward=0.0, decoy=trap.decoy)
    return exact_return(goal_alone, policy, horizon=50)


@pytest.mark.slow
def test_most_seeds_are_caught_without_a_bonus_and_none_with(trap, tmp_path):
    """As in recipes/control_entropy.py, where 14 of 20 are caught, so 2 or fewer of 8 are 1 % likely."""
    caught = [chance_of_goal(trap, 0.0, seed, 200, tmp_path) < 0.05 for seed in range(8)]
    freed = [chance_of_goal(trap, 0.3, seed, 200, tmp_path) > 0.8 for seed in range(8)]
    assert sum(caught) > 2
    assert sum(freed) >= 7


def test_mistakes_are_refused(trap):
    for options, word in (({"size": 1}, "size"), ({"decoy": 0}, "decoy was given as 0.*from 1 to 14")):
        with pytest.raises(Refused, match=word):
            GridWorld(**options)
    for policy in (np.full((4, 4), 0.25), UNIFORM * 2):
        with pytest.raises(Refused, match="policy"):
            exact_values(GridWorld(), policy)
    with pytest.raises(Refused, match="From cell 2 the policy never ends"):  # it ends at the right wall
        exact_values(trap, np.eye(4)[[RIGHT] * 36])


ENTROPY = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "control_entropy.py"))


def test_chances_of_the_ends():
    trap, plain = (ENTROPY["grid_of"](env) for env in ("trap", "gridworld"))
    to_the_right, down = (np.eye(4)[[action] * 36] for action in (1, 2))
    assert ENTROPY["chances_of"](trap, to_the_right) == pytest.approx([0, 1, 0])
    assert ENTROPY["chances_of"](trap, down) == pytest.approx([0, 0, 1])
    halves = (to_the_right + down) / 2  # down first, and then no step leads up to the decoy
    assert ENTROPY["chances_of"](trap, halves) == pytest.approx([0.5, 0.5, 0], abs=1e-8)  # walls hold some up
    assert ENTROPY["chances_of"](plain, halves[:16]) == pytest.approx([1, 0, 0], abs=1e-8)
