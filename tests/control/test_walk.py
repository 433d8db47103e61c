"""The walk on a line: where it ends, what it pays, and when it is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from tokenrl import train_agent
from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import collect_episodes
from tokenrl.control.worlds import Walk
from tokenrl.core import Estimator
from tokenrl.runs import read_metrics


def play(actions: list[int], **options) -> list[tuple]:
    """(x, reward, terminated, truncated) of each step until the episode ends."""
    env = Walk(**options)
    start, _ = env.reset(seed=0)
    assert start.tolist() == [0, 0, 0, 0]
    seen = []
    for action in actions:
        observation, *rest, _ = env.step(action)
        assert observation[1:].tolist() == [0, 0, 0]
        seen.append((float(observation[0]), *rest))
        if rest[1] or rest[2]:
            break
    return seen


@pytest.mark.parametrize(("name", "step_reward", "best"), [("walk", 0.01, 1.1), ("costly_walk", -0.01, 0.9)])
@pytest.mark.parametrize(("action", "side"), [(1, 1), (0, -1)])
@pytest.mark.filterwarnings("ignore:.*alternative render modes")
def test_it_ends_beyond_1_and_pays_by_the_side(action, side, name, step_reward, best):
    check_env(Walk(step_reward=step_reward))
    seen = play([action] * 20, step_reward=step_reward)
    assert [x for x, *_ in seen] == pytest.approx([side * 0.1 * k for k in range(1, 12)])
    assert [reward for _, reward, *_ in seen] == pytest.approx([step_reward] * 10 + [side])
    assert [(t, u) for *_, t, u in seen] == [(False, False)] * 10 + [(True, False)]
    envs = Environments(name, 1)
    envs.reset(0)
    paid = sum(float(envs.step(np.full(1, action))[1][0]) for _ in range(11))
    assert paid == pytest.approx(best if side == 1 else best - 2)
    seen = play([0, 1] * 40, step_reward=step_reward)  # standing about
    assert [(t, u) for *_, t, u in seen] == [(False, False)] * 49 + [(False, True)]
    assert sum(reward for _, reward, *_ in seen) == pytest.approx(50 * step_reward)


def test_the_return_of_a_uniform_policy():
    """Summed over all paths; the docstring states it."""
    chances, total = {0: 1.0}, 0.0
    for _ in range(50):
        after: dict[int, float] = {}
        for place, chance in chances.items():
            for to in (place - 1, place + 1):
                ended = abs(to) >= 11
                total += chance / 2 * (np.sign(to) if ended else 0.01)
                if not ended:
                    after[to] = after.get(to, 0.0) + chance / 2
        chances = after
    assert (total, sum(chances.values())) == pytest.approx((0.459, 0.762), abs=5e-4)
    envs = Environments("walk", 1000)
    policy = Policy(Shape(4, "softmax", 2, ()), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.head.weight.zero_()
    found = collect_episodes(envs, policy, 50, torch.Generator().manual_seed(0), seed=0)
    envs.close()
    error = float(found.returns.std()) / 1000**0.5
    assert float(found.returns.mean()) == pytest.approx(total, abs=4 * error)
    assert float(found.truncated.double().mean()) == pytest.approx(0.762, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returns", "weights", "low", "high"),
    [("episode_normalized", "orthogonal", 0.4, 0.62), ("reward_to_go", "uniform", 1.08, 1.12)],
)
def test_normalised_in_each_episode_the_agent_dawdles(tmp_path, returns, weights, low, high):
    """The recipe `4_walk.py` shows it over ten seeds: standing about pays 0.5, the right end 1.1."""
    shared = {"baseline": "none", "gamma": 0.99, "aggregation": "sequence_mean", "scale_eps": 1e-8}
    options = {"hidden": (128, 128), "num_envs": 1, "max_steps": 400, "learning_rate": 3e-4, "quiet": True}
    options |= {"env": "walk", "estimator": Estimator(returns=returns, **shared), "initial_weights": weights}
    for seed in range(3):
        folder = str(tmp_path / str(seed))
        result = train_agent(seed=seed, eval_every=0, eval_episodes=1, output_dir=folder, **options)
        rewards = [row["reward"] for row in read_metrics(result.output_dir / "metrics.jsonl")[1:]]
        assert low < float(np.mean(rewards[-100:])) < high
