"""What an environment looks like, and what is refused before anything is made."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from command_line import completes
from folders import read_json
from gymnasium import spaces
from refusals import refused

from tokenrl.control.environments import Environments, describe, find
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


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("Nope-v1", "no environment 'Nope-v1'.*gridworld, trap, walk, costly_walk, bandit"),
        ("LunarLander-v2", "use `LunarLander-v3` instead"),
        ("CartPole", "Did you mean 'CartPole-v1'.*with its version"),
        ("Blackjack-v1", "no limit in length.*--max-episode-steps"),
        ("", "no environment ''"),
        (gymnasium.spec("CartPole-v1"), "given as a EnvSpec; give the id"),
    ],
)
def test_names_that_lead_nowhere(env, message):
    with refused(message):
        describe(env)


def register_odd(observations, actions=spaces.Discrete(2), answer=None):  # noqa: B008 (not changed)
    """Register an environment with these spaces and this answer, and return its id."""

    class Odd(gymnasium.Env):
        observation_space, action_space = observations, actions

        def reset(self, *, seed=None, options=None):
            return answer, {}

        def step(self, action):
            return answer + 1, float(action), False, False, {}

    gymnasium.registry.pop("tokenrl-tests/Odd-v0", None)
    gymnasium.register(
        "tokenrl-tests/Odd-v0", entry_point=Odd, max_episode_steps=3, disable_env_checker=True
    )
    return "tokenrl-tests/Odd-v0"


TWO, THREE = spaces.Discrete(2), spaces.Discrete(3)


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (spaces.Dict({"a": TWO}), TWO, "kind Dict.*wrappers.FlattenObservation"),
        (THREE, spaces.MultiDiscrete([2, 3]), r"Actions of .* MultiDiscrete\(\[2 3\]\)"),
        (THREE, spaces.Box(-1, 1, (2, 2)), r"Box\(.*\(2, 2\).*with one axis"),
        (THREE, spaces.Box(0, 9, (2,), np.int64), "int64.*Box of real numbers"),
        (
            spaces.Box(0, 255, (96, 96, 3), np.uint8),
            TWO,
            r"pictures \(Box, shape 96 x 96 x 3, dtype uint8\)",
        ),
        (spaces.Box(0, 1, (5, 205), np.float32), TWO, "pictures"),  # one more than 1,024 numbers
    ],
)
def test_spaces_that_are_not_supported(observations, actions, message):
    with refused(message):
        describe(register_odd(observations, actions))


def test_discrete_numbers_that_do_not_start_at_zero(recwarn):
    spaces_of = spaces.Discrete(3, start=5), spaces.Discrete(2, start=-1)
    envs = Environments(register_odd(*spaces_of, 6), 2)
    assert envs.reset(0).tolist() == [[0, 1, 0]] * 2
    observations, rewards, _, _ = envs.step(np.array([0, 1]))
    assert rewards.tolist() == [-1, 0] and observations.tolist() == [[0, 0, 1]] * 2
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bound", [0.1, 1 / 3, 7.7, 1e4])
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
    ("env", "back_and_forth"), [("gridworld", (1, 3)), ("trap", (2, 0)), ("walk", (0, 1))]
)
def test_a_longer_limit_is_not_cut_by_the_environment_itself(env, back_and_forth):
    """Neither the goal nor an end is ever reached."""
    envs = Environments(env, 1, 70)
    envs.reset(0)
    cuts = [bool(envs.step(np.array([back_and_forth[t % 2]]))[3][0]) for t in range(70)]
    assert cuts == [False] * 69 + [True]


@pytest.mark.parametrize("seed", [0, 1, 2, 10**9])
def test_no_starting_state_is_trained_on_and_evaluated(seed):
    """Copies take the seeds from the first one on: those of training stay below SEEDS, the others above."""
    copies = 10**5
    for purpose in range(3):
        assert 0 <= seed_of(seed, purpose) < SEEDS - copies
        assert SEEDS <= seed_of(seed, purpose, evaluation=True) < 2**31 - copies
    assert seed_of(seed, 0) != seed_of(seed, 1)
    assert seed_of(seed, 0) != seed_of(seed + 1, 0)


FILE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv


class Mine(CartPoleEnv):
    pass


gymnasium.register("{name}-v0", entry_point={entry}, max_episode_steps=7)
gymnasium.register("{name}Other-v1", entry_point=Mine, max_episode_steps=8)
"""
SMALL = "--num-envs 2 --max-steps 1 --eval-episodes 2 --quiet"


@pytest.fixture
def write(workplace):
    """Write a file in an empty current directory."""

    def write(name, text=FILE, entry="Mine"):
        (workplace / f"{name}.py").write_text(text.format(name=name, entry=entry))
        return name

    return write


@pytest.mark.parametrize(
    ("source", "entry"),
    [pytest.param("a_file.py", "'a_file:Mine'", marks=pytest.mark.slow), ("a_file", "Mine")],
)
def test_a_run_in_an_environment_of_a_user_can_be_repeated(write, capsys, source, entry):
    """A file, or a module in the current directory; its class may be given by its name, too."""
    write("a_file", entry=entry)
    completes(f"control --env {source}:a_file-v0 {SMALL} --output-dir first")
    assert read_json("first/config.json")["env"] == f"{source}:a_file-v0"
    completes("control --config first/config.json --quiet --output-dir second")
    assert capsys.readouterr() == ("", "")
    assert Path("first/metrics.jsonl").read_text() == Path("second/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "env", "message"),
    [
        (FILE, "nofile.py:X-v0", "there is no file .*nofile.py; give its path from"),
        (
            "raise RuntimeError('no licence')",
            "wrong.py:X-v0",
            r"raised RuntimeError: no licence\.$",
        ),
        (
            "",
            "wrong.py:X-v0",
            r"registers no environment 'X-v0'. Call gymnasium.register\('X-v0', ...\)",
        ),
        (FILE, "wrong.py:wrnog-v0", "Did you mean 'wrong-v0'"),
        (FILE, "wrong.py:", "registers no environment ''"),
    ],
)
def test_files_that_lead_nowhere(write, text, env, message):
    for name in ("wrong-v0", "wrongOther-v1"):
        gymnasium.registry.pop(name, None)
    write("wrong", text)
    for _ in range(2):  # also if it has been imported before
        with refused(message):
            find(env)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "action", "expected"),
    [
        (-np.inf, np.inf, np.float16, 0.25, 0.25),
        (-np.finfo(np.float32).max, np.finfo(np.float32).max, np.float32, 0.25, 0.25),
        (0, np.inf, np.float32, -2, 0),
    ],
)
def test_actions_between_bounds_and_without_bounds(low, high, dtype, action, expected):
    envs = Environments(register_odd(THREE, spaces.Box(low, high, (1,), dtype)), 1)
    assert envs.translate(np.array([[action]], np.float32)).tolist() == [[expected]]
