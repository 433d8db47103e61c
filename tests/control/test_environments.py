"""What an environment looks like, how actions and observations are converted, and environments of a user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import completes
from folders import read_json
from gymnasium import spaces
from odd_env import THREE, register_odd

from tokenrl.control.environments import Environments, describe
from tokenrl.control.evaluation import SEEDS, seed_of


@pytest.mark.parametrize(
    ("env", "size", "actions", "numbers", "horizon", "solved"),
    [
        ("CartPole-v1", 4, 2, 0, 500, 475),
        ("Pendulum-v1", 3, None, 1, 200, None),
        ("FrozenLake-v1", 16, 4, 0, 100, 0.7),  # discrete observations are one-hot
        ("LunarLander-v3", 8, 4, 0, 1000, 200),
        ("gridworld", 16, 4, 0, 50, 0.93),
        ("walk", 4, 2, 0, 50, 1.1),
        ("bandit", 1, 2, 0, 1, None),
    ],
)
def test_facts(env, size, actions, numbers, horizon, solved):
    if env.startswith("Lunar"):
        pytest.importorskip("Box2D")
    spec = describe(env)
    assert (spec.observation_size, spec.actions, spec.action_size) == (size, actions, numbers)
    assert (spec.horizon, spec.solved) == (horizon, solved)
    assert describe(env, horizon + 2).horizon == horizon + 2
    assert spec.fast == (env == "CartPole-v1")


def test_discrete_numbers_that_do_not_start_at_zero(recwarn):
    spaces_of = spaces.Discrete(3, start=5), spaces.Discrete(2, start=-1)
    envs = Environments(register_odd(*spaces_of, 6), 2)
    assert envs.reset(0).tolist() == [[0, 1, 0]] * 2
    observations, rewards, _, _ = envs.step(np.array([0, 1]))
    assert rewards.tolist() == [-1, 0] and observations.tolist() == [[0, 0, 1]] * 2
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bound", [1 / 3, 7.7])
def test_actions_never_leave_their_space(dtype, bound):
    """The bounds of 64 bits are rounded to the nearest number of 32 bits, which may lie outside."""
    box = spaces.Box(
        np.array([-bound, bound / 3], dtype), np.array([bound, bound], dtype), dtype=dtype
    )
    envs = Environments(register_odd(THREE, box), 3)
    actions = envs.translate(np.array([[-1, -1], [1, 1], [9, -9]], np.float32))
    assert actions.dtype == dtype and all(box.contains(action) for action in actions)
    np.testing.assert_allclose(actions, [box.low, box.high, [box.high[0], box.low[1]]], rtol=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "action", "expected"),
    [
        (-np.inf, np.inf, 0.25, 0.25),
        (-np.finfo(np.float32).max, np.finfo(np.float32).max, 0.25, 0.25),
        (0, np.inf, -2, 0),
    ],
)
def test_actions_without_bounds_stand_for_themselves(low, high, action, expected):
    envs = Environments(register_odd(THREE, spaces.Box(low, high, (1,), np.float32)), 1)
    assert envs.translate(np.array([[action]], np.float32)).tolist() == [[expected]]


def test_a_longer_limit_is_not_cut_by_the_environment_itself():
    """To and fro on the walk, neither end is ever reached."""
    envs = Environments("walk", 1, 70)
    envs.reset(0)
    cuts = [bool(envs.step(np.array([t % 2]))[3][0]) for t in range(70)]
    assert cuts == [False] * 69 + [True]


@pytest.mark.parametrize("seed", [0, 1, 10**9])
def test_no_starting_state_is_trained_on_and_evaluated(seed):
    """Copies take the seeds from the first one on: those of training stay below SEEDS, the others above."""
    copies = 10**5
    for purpose in range(3):
        assert 0 <= seed_of(seed, purpose) < SEEDS - copies
        assert SEEDS <= seed_of(seed, purpose, evaluation=True) < 2**31 - copies
    assert len({seed_of(seed, 0), seed_of(seed, 1), seed_of(seed + 1, 0)}) == 3


FILE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv


class Mine(CartPoleEnv):
    pass


gymnasium.register("a_file-v0", entry_point={entry}, max_episode_steps=7)
"""
SMALL = "--num-envs 2 --max-steps 1 --eval-episodes 2 --quiet"


@pytest.mark.parametrize(
    ("source", "entry"),
    [pytest.param("a_file.py", "'a_file:Mine'", marks=pytest.mark.slow), ("a_file", "Mine")],
)
def test_a_run_in_an_environment_of_a_user_can_be_repeated(workplace, capsys, source, entry):
    """A file, or a module in the current directory; its class may be given by its name, too."""
    (workplace / "a_file.py").write_text(FILE.format(entry=entry))
    completes(f"control --env {source}:a_file-v0 {SMALL} --output-dir first")
    assert read_json("first/config.json")["env"] == f"{source}:a_file-v0"
    completes("control --config first/config.json --quiet --output-dir second")
    assert capsys.readouterr() == ("", "")
    assert Path("first/metrics.jsonl").read_text() == Path("second/metrics.jsonl").read_text()
