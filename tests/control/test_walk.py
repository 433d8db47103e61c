"""The walk on a line: where it ends, what it pays, and when it is cut."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tokenrl.control.environments import Environments
from tokenrl.control.worlds import Walk


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


@pytest.mark.parametrize(
    ("name", "step_reward", "best"), [("walk", 0.01, 1.1), ("costly_walk", -0.01, 0.9)]
)
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
