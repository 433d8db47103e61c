"""The walk on a line: where it ends, its rewards, and when it is cut."""

from __future__ import annotations

import pytest

from tokenrl.control.worlds import Walk


def play(actions: list[int], **options) -> list[tuple]:
    """(x, reward, terminated, truncated) of each step until the episode ends."""
    env = Walk(**options)
    start, _ = env.reset(seed=0)
    assert start.tolist() == [0, 0, 0, 0]
    steps = []
    for action in actions:
        (x, *zeros), *rest, _ = env.step(action)
        assert zeros == [0, 0, 0]
        steps.append((float(x), *rest))
        if rest[1] or rest[2]:
            break
    return steps


@pytest.mark.parametrize(("action", "side"), [(1, 1), (0, -1)])
def test_it_ends_beyond_1_and_its_reward_is_the_side(action, side):
    x, rewards, terminated, truncated = zip(*play([action] * 20), strict=True)
    assert x == pytest.approx([side * 0.1 * k for k in range(1, 12)])
    assert rewards == pytest.approx([0.01] * 10 + [side])
    assert terminated == (False,) * 10 + (True,) and not any(truncated)
