"""The grid with a decoy: where it ends, its exact values, and that a bonus frees a policy from it."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from tokenrl.control.environments import describe
from tokenrl.control.training import train_agent
from tokenrl.control.worlds.gridworld import GridWorld, exact_return, exact_values, transitions
from tokenrl.core import Estimator
from tokenrl.errors import Refused

UP, RIGHT, DOWN, LEFT = range(4)


@pytest.fixture
def trap():
    return gymnasium.make(describe("trap").env).unwrapped


def play(env: GridWorld, actions: list[int]) -> list[tuple]:
    """(cell, reward, terminated) of each step until the episode ends."""
    env.reset(seed=0)
    seen = []
    for action in actions:
        _, reward, terminated, truncated, info = env.step(action)
        seen.append((info["cell"], pytest.approx(reward), terminated))
        if terminated or truncated:
            break
    return seen


def test_gymnasium_accepts_it(trap):
    check_env(trap)
    assert trap.observation_space.shape == (36,)


def test_decoy_and_goal_end_the_episode_and_pay(trap):
    assert play(trap, [RIGHT, RIGHT]) == [(1, 0.49, True)]
    assert play(trap, [DOWN, RIGHT, UP, LEFT]) == [(6, -0.01, False), (7, -0.01, False), (1, 0.49, True)]
    to_the_goal = play(trap, [DOWN] * 5 + [RIGHT] * 5 + [UP])
    assert [cell for cell, *_ in to_the_goal] == [6, 12, 18, 24, 30, 31, 32, 33, 34, 35]
    assert to_the_goal[-1] == (35, 0.99, True)


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


def test_values_by_hand():
    """2x2 cells, uniform: chances 2/3 and 1/3 of decoy and goal, and 4 steps, from two equations each."""
    env = GridWorld(2, decoy=1, decoy_reward=0.5)
    values = exact_values(env, np.full((4, 4), 0.25))
    assert values == pytest.approx([0.5 * 2 / 3 + 1 / 3 - 0.04, 0, 0.5 / 3 + 2 / 3 - 0.04, 0])
    assert (transitions(env)[1] == 0).all()


@pytest.mark.parametrize("decoy", [1, 2])
def test_exact_return_is_the_sum_over_all_ways(decoy):
    env = GridWorld(2, decoy=decoy, decoy_reward=-0.3, step_reward=-0.1)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), 4)
    total = 0.0
    for way in itertools.product(range(4), repeat=4):
        env.reset()
        chance, gain, over = 1.0, 0.0, False
        for action in way:  # after the end, the rest of the way is summed out
            chance *= policy[env.cell, action] if not over else 0.25
            if not over:
                _, reward, over, _, _ = env.step(action)
                gain += reward
        total += chance * gain
    assert total == pytest.approx(exact_return(env, policy, horizon=4))


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


def test_a_policy_that_never_ends_is_named(trap):
    right = np.eye(4)[[RIGHT] * 36]
    with pytest.raises(Refused, match="From cell 2 the policy never ends"):  # it ends at the right wall
        exact_values(trap, right)


def test_it_is_drawn():
    env = GridWorld(3, decoy=1, render_mode="ansi")
    env.reset()
    assert env.render() == "A D .\n. . .\n. . G\n"
    env = GridWorld(2, decoy=1, render_mode="rgb_array")
    env.reset()
    assert tuple(env.render()[16, 48]) == (204, 121, 167)


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


def test_a_bonus_frees_a_policy_that_is_caught_without(trap, tmp_path):
    caught, freed = (
        [chance_of_goal(trap, beta, seed, 50, tmp_path) for seed in (0, 3)] for beta in (0.0, 0.3)
    )
    assert np.mean(caught) < 0.25
    assert np.mean(freed) > 0.75


@pytest.mark.slow
def test_most_seeds_are_caught_without_a_bonus_and_none_with(trap, tmp_path):
    """As in recipes/control_entropy.py, where 14 of 20 are caught, so 2 or fewer of 8 are 1 % likely."""
    caught = [chance_of_goal(trap, 0.0, seed, 200, tmp_path) < 0.05 for seed in range(8)]
    freed = [chance_of_goal(trap, 0.3, seed, 200, tmp_path) > 0.8 for seed in range(8)]
    assert sum(caught) > 2
    assert sum(freed) >= 7
