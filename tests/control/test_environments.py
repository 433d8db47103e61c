"""What an environment looks like, and what is refused before anything is made."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
from counting_env import register
from gymnasium import spaces

from tokenrl.control.environments import OWN, Environments, describe, find, make
from tokenrl.control.evaluation import SEEDS, check_film, seed_of
from tokenrl.control.training import train_agent as train
from tokenrl.errors import Refused


def test_cartpole():
    spec = describe("CartPole-v1")
    assert (spec.observation_size, spec.actions, spec.action_size) == (4, 2, 0)
    assert (spec.horizon, spec.solved, spec.fast, spec.discrete) == (500, 475, True, True)


@pytest.mark.parametrize(
    ("env", "size", "actions", "numbers", "horizon", "solved"),
    [
        ("Acrobot-v1", 6, 3, 0, 500, -100),
        ("Pendulum-v1", 3, None, 1, 200, None),
        ("FrozenLake-v1", 16, 4, 0, 100, 0.7),  # discrete observations are one-hot
        ("gridworld", 16, 4, 0, 50, 0.93),
        ("walk", 4, 2, 0, 50, 1.1),
        ("bandit", 1, 2, 0, 1, None),
    ],
)
def test_others(env, size, actions, numbers, horizon, solved):
    spec = describe(env)
    assert (spec.observation_size, spec.actions, spec.action_size) == (size, actions, numbers)
    assert (spec.horizon, spec.solved) == (horizon, solved)


def test_lunar_lander_continuous():
    pytest.importorskip("Box2D")
    assert (describe("LunarLander-v3").actions, describe("LunarLander-v3").solved) == (4, 200)
    spec = describe("LunarLanderContinuous-v3")
    assert (spec.observation_size, spec.actions, spec.action_size, spec.horizon) == (8, None, 2, 1000)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("Nope-v1", "no environment 'Nope-v1'.*gridworld, walk, costly_walk, bandit"),
        ("LunarLander-v2", "use `LunarLander-v3` instead"),
        ("CartPole-v9", "provides versioned environments"),
        ("CartPole", "with its version"),
        ("no_such_module:Foo-v0", "No module named 'no_such_module'"),
        ("Blackjack-v1", "no limit in length.*--max-episode-steps"),
        ("", "no environment ''"),
    ],
)
def test_names_that_lead_nowhere(env, message):
    with pytest.raises(Refused, match=message):
        describe(env)


def test_a_module_may_be_named_that_registers_an_environment(tmp_path, monkeypatch):
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Mine-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv',"
        " max_episode_steps=7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert describe("my_envs:Mine-v0").horizon == 7
    options = {"num_envs": 2, "max_steps": 0, "eval_episodes": 2, "quiet": True}
    run = train(env="my_envs:Mine-v0", output_dir=str(tmp_path / "run"), **options)
    written = json.loads((run.output_dir / "config.json").read_text())
    assert written["env"] == "my_envs:Mine-v0"  # else a later `--config` would not find the environment


def test_an_environment_without_a_limit_of_its_own_may_be_filmed_with_one():
    pytest.importorskip("moviepy")
    assert check_film(describe("CliffWalking-v1", 9)) is None


def test_missing_box2d_says_what_to_install(monkeypatch):
    def missing(*args, **options):
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed, you can install it by ...")

    monkeypatch.setattr(gymnasium, "make_vec", missing)
    with pytest.raises(Refused, match=r'LunarLander-v3 needs a package.*pip install "gymnasium\[box2d\]"'):
        describe("LunarLander-v3")


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (spaces.Dict({"a": spaces.Discrete(2)}), spaces.Discrete(2), "Observations of .* kind Dict"),
        (spaces.Discrete(3), spaces.MultiDiscrete([2, 2]), "Actions of .* kind MultiDiscrete"),
        (spaces.Discrete(3), spaces.Box(-1, 1, (2, 2)), "Actions of .* kind Box"),
    ],
)
def test_spaces_that_are_not_supported(observations, actions, message):
    class Odd(gymnasium.Env):
        observation_space, action_space = observations, actions

    gymnasium.registry.pop("tokenrl-tests/Odd-v0", None)
    gymnasium.register("tokenrl-tests/Odd-v0", entry_point=Odd, max_episode_steps=3, disable_env_checker=True)
    with pytest.raises(Refused, match=message):
        describe("tokenrl-tests/Odd-v0")


def test_a_limit_of_ones_own():
    assert describe("CartPole-v1", 20).horizon == 20
    for env in ("CartPole-v1", register(limit=100, lengths=(90,))):
        envs = Environments(env, 2, 5)
        envs.reset(0)
        cuts = [envs.step(np.array([t % 2, t % 2]))[3].tolist() for t in range(5)]
        assert cuts == [[False, False]] * 4 + [[True, True]]


def test_fast_path_is_taken_where_there_is_one():
    assert type(make("CartPole-v1", 2)).__name__ == "CartPoleVectorEnv"
    assert type(make("Acrobot-v1", 2)).__name__ == "SyncVectorEnv"


def test_discrete_observations_and_actions_that_do_not_start_at_zero():
    class Shifted(gymnasium.Env):
        observation_space, action_space = spaces.Discrete(3, start=5), spaces.Discrete(2, start=-1)

        def reset(self, *, seed=None, options=None):
            return 6, {}

        def step(self, action):
            return 7, float(action), False, False, {}

    gymnasium.registry.pop("tokenrl-tests/Shifted-v0", None)
    gymnasium.register(
        "tokenrl-tests/Shifted-v0", entry_point=Shifted, max_episode_steps=9, disable_env_checker=True
    )
    envs = Environments("tokenrl-tests/Shifted-v0", 2)
    assert envs.reset(0).tolist() == [[0, 1, 0]] * 2
    observations, rewards, _, _ = envs.step(np.array([0, 1]))
    assert rewards.tolist() == [-1, 0]
    assert observations.tolist() == [[0, 0, 1]] * 2


def test_own_environments_are_gymnasiums_too():
    for name, own in OWN.items():
        assert find(name).id == own["id"]
        made = gymnasium.make(own["id"], max_episode_steps=own["max_episode_steps"] + 2)
        made.reset(seed=0)
        assert made.spec.max_episode_steps == own["max_episode_steps"] + 2


@pytest.mark.parametrize("env", ["gridworld", "walk"])
def test_a_longer_limit_is_not_cut_by_the_environment_itself(env):
    """Back and forth: neither the goal nor an end is ever reached."""
    envs = Environments(env, 1, 70)
    envs.reset(0)
    back_and_forth = {"gridworld": (1, 3), "walk": (0, 1)}[env]
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
