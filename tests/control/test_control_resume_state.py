"""The state of a control run: saved, given to fresh objects, and the run goes on bit for bit."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import deque
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from continued import begin, carry_on, content, fresh, load, save, updates
from counting_env import ID as COUNTING, register

import tokenrl
from tokenrl.control.environments import Environments
from tokenrl.control.saving import SavedPolicy
from tokenrl.control.state import LONGEST_REPLAY, Recorded, capture, restore
from tokenrl.control.values import Hidden, Reader, Writer
from tokenrl.errors import Refused

CUT = {"num_steps": 7, "estimator": "ppo", "num_iterations": 2, "num_minibatches": 3}
MUCH = {
    "normalize_observations": True,
    "diagnostics_every": 2,
    "learning_rate_schedule": "linear",
    "entropy_schedule": "linear",
}


def assert_exact(folder, metrics, found, run):
    assert found == metrics
    assert content(folder / "continued") == content(folder / "end")
    assert run.inexact is None


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "reinforce_running_mean", **MUCH},
        {**CUT, **MUCH},
        {**CUT, "value_network": "shared", "num_steps": 40},
        {"estimator": "rloo", "env": "gridworld", "num_envs": 3},
        {**CUT, "env": "gridworld"},
    ],
    ids=["CartPole", "CartPole pieces", "shared critic", "gridworld", "gridworld pieces"],
)
def test_a_run_continues_bit_for_bit(tmp_path, options):
    metrics = begin(options, tmp_path / "run")
    run, found = carry_on(tmp_path / "run")
    assert_exact(tmp_path / "run", metrics, found, run)


ENVS = [
    *("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "LunarLander-v3", "FrozenLake-v1"),
    *("Taxi-v4", "gridworld", "walk", "trap", "bandit", COUNTING),
]


@pytest.mark.slow
@pytest.mark.parametrize("env", ENVS)
def test_every_environment_continues_bit_for_bit_in_a_new_process(tmp_path, env):
    register(lengths=(3, 5, 4, 2))
    limit = {} if env == "bandit" else {"max_episode_steps": 30}
    metrics = {
        tmp_path / name: begin({"env": env, **limit, **options}, tmp_path / name)
        for name, options in (("whole", {}), ("pieces", CUT))
    }
    here = Path(__file__).parent
    path = os.pathsep.join([str(Path(tokenrl.__file__).parent.parent), str(here)])
    program = [sys.executable, "-W", "ignore", here / "continued.py", *metrics]
    subprocess.run(program, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True)
    for folder, wanted in metrics.items():
        found = json.loads((folder / "metrics.json").read_text())
        assert found == {"metrics": wanted, "inexact": None}
        assert content(folder / "continued") == content(folder / "end")


class Ball:
    """A state that Python cannot show: an attribute that is no plain value."""

    __slots__ = ("height",)

    def __init__(self):
        self.height = 0.0


class Bouncing(gymnasium.Env):
    """A ball that an object of another library moves, and a record that outlives the episodes."""

    def __init__(self, lawless=False, endless=False):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2, start=5)
        self.lawless, self.best, self.ball = lawless, 0.0, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ball = Ball()
        self.ball.height = self.np_random.random()
        return self._seen(), {}

    def _seen(self):
        return np.array([self.ball.height, self.best], np.float32)

    def step(self, action):
        assert action in (5, 6)
        noise = random.SystemRandom().random() if self.lawless else self.np_random.random()
        self.ball.height += (action - 5.5) + noise - 0.4
        self.best = max(self.best, self.ball.height)
        return self._seen(), self.ball.height, abs(self.ball.height) > 2, False, {}


class Many(gymnasium.vector.VectorEnv):
    """Copies that are stepped together, with state that Python cannot show."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs=1, max_episode_steps=5, **_):
        self.num_envs, self.limit = num_envs, max_episode_steps
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = gymnasium.spaces.Discrete(2)
        self.action_space = gymnasium.spaces.MultiDiscrete([2] * num_envs)
        self.ball, self.steps = Ball(), 0

    def _seen(self):
        return np.full((self.num_envs, 1), self.ball.height, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ball.height, self.steps = self.np_random.random(), 0
        return self._seen(), {}

    def step(self, actions):
        self.steps = (self.steps + 1) % (self.limit + 1)
        self.ball.height = self.np_random.random()
        over = np.full(self.num_envs, self.steps == self.limit)
        return self._seen(), actions.astype(float), np.zeros_like(over), over, {}


@pytest.fixture
def bouncing():
    """Put an environment with hidden state into gymnasium's registry; return a function that does so."""
    name = "tokenrl-tests/Bouncing-v0"

    def make(entry=Bouncing, limit=12, **options):
        gymnasium.registry.pop(name, None)
        vector = entry if issubclass(entry, gymnasium.vector.VectorEnv) else None
        single = Bouncing if vector else entry
        gymnasium.register(
            name, single, vector_entry_point=vector, max_episode_steps=limit, kwargs={} if vector else options
        )
        return name

    yield make
    gymnasium.registry.pop(name, None)


@pytest.mark.parametrize("options", [{}, CUT], ids=["whole", "pieces"])
def test_state_that_cannot_be_saved_is_replayed(tmp_path, bouncing, options):
    env = bouncing()
    metrics = begin({"env": env, **options}, tmp_path / "run")
    run, found = carry_on(tmp_path / "run")
    assert_exact(tmp_path / "run", metrics, found, run)
    assert all(isinstance(copy, Recorded) and len(copy.moves) > 20 for copy in run.envs.vector.envs)


def test_a_long_record_begins_anew_at_a_reset(tmp_path, bouncing, monkeypatch):
    monkeypatch.setattr("tokenrl.control.state.ENOUGH", 9)
    metrics = begin({"env": bouncing(), **CUT}, tmp_path / "run")
    run, found = carry_on(tmp_path / "run")
    assert_exact(tmp_path / "run", metrics, found, run)
    assert all(len(copy.moves) <= 9 + 13 for copy in run.envs.vector.envs)


@pytest.mark.parametrize("options", [{}, CUT], ids=["whole", "pieces"])
def test_an_environment_that_is_not_deterministic_is_found_out(tmp_path, bouncing, options):
    begin({"env": bouncing(lawless=True), **options}, tmp_path / "run")
    run, found = carry_on(tmp_path / "run")
    assert len(found) == 3 and "not bit-exact" in run.inexact and "tokenrl-tests/Bouncing-v0" in run.inexact
    assert ("Its episodes begin anew." in run.inexact) == bool(options)


def test_copies_that_cannot_be_replayed_begin_anew(tmp_path, bouncing):
    begin({"env": bouncing(Many), **CUT}, tmp_path / "run")
    run = fresh({"env": bouncing(Many), **CUT})
    load(run, tmp_path / "run" / "middle")
    assert "not bit-exact" in run.inexact and not run.pieces._length.any()
    assert run.envs.vector.steps == 0 and run.env_steps > 0
    updates(run, range(4, 6))


def test_too_long_episodes_are_not_recorded(bouncing):
    copies = Environments(bouncing(limit=LONGEST_REPLAY + 1), 2)
    copies.record()
    copies.reset(0)
    assert not any(isinstance(copy, Recorded) for copy in copies.vector.envs)
    assert not copies.state_when_saved()()["exact"]


def test_a_state_that_is_taken_too_late_says_so():
    copies = Environments("gridworld", 2)
    copies.reset(0)
    state = copies.state_when_saved()
    assert state()["exact"]
    copies.step(np.zeros(2, int))
    assert not state()["exact"]


class Rich(gymnasium.Env):
    """Attributes of many kinds; what it observes depends on all of them."""

    def __init__(self):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.own, self.old = random.Random(3), np.random.RandomState(4)
        self.recent, self.seen, self.table = deque(maxlen=3), {(0, 0)}, {i: (i, 0.1 * i) for i in range(50)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.again = self.np_random  # one generator with two names
        self.bits = np.random.Generator(np.random.MT19937(int(self.again.integers(99))))
        self.body = [np.zeros(2), np.ones(2)]
        self.head = self.body[0]  # moves with the body
        self.steps = 0
        return self._seen(), {}

    def _seen(self):
        drawn = self.own.random() + self.old.rand() + self.bits.random() + self.observation_space.sample()[0]
        return np.array([self.body[0].sum() + sum(self.recent), drawn, len(self.seen)], np.float32)

    def step(self, action):
        self.head += self.np_random.random(2) + self.again.random() + self.table[int(action)][1]
        self.recent.append(float(self.head[0]))
        self.seen.add((int(self.head[0]), int(action)))
        self.steps += 1
        return self._seen(), float(self.head.sum()), self.steps >= 6, False, {}


def test_attributes_of_many_kinds_are_restored_without_a_replay(tmp_path, bouncing):
    metrics = begin({"env": bouncing(Rich), **CUT}, tmp_path / "run")
    run, found = carry_on(tmp_path / "run")
    assert_exact(tmp_path / "run", metrics, found, run)
    assert not any(isinstance(copy, Recorded) for copy in run.envs.vector.envs)
    env = run.envs.vector.envs[0].unwrapped
    assert env.head is env.body[0] and env.again is env.np_random


def test_an_object_with_two_names_remains_one():
    one, other = Rich(), Rich()
    one.reset(seed=1), other.reset(seed=2)
    one.step(1)
    restore(other, capture(one).texts)
    for env in (one, other):
        assert env.head is env.body[0] and env.again is env.np_random
    assert [one.step(0)[0].tolist() for _ in range(4)] == [other.step(0)[0].tolist() for _ in range(4)]


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            2**200,
            -0.0,
            math.inf,
            1e-320,
            "a \ud800 \x00",
            [],
            (),
            [1, (2.5, None)],
            {3: {"a": (1,)}},
        ),
        *(
            frozenset({1, (2, 3)}),
            deque([1, 2], 2),
            np.float64(0.1),
            np.bool_(True),
            np.int8(-3),
            np.str_("x"),
        ),
        *(np.arange(6.0).reshape(2, 3), np.zeros((0, 2)), np.array(3), np.datetime64("2020-01-01")),
    ],
    ids=repr,
)
def test_values_are_read_as_they_were_written(value):
    found = Reader({"x": Writer({"x": value}).attribute("x", value)}, {}).attribute("x")
    assert type(found) is type(value) and repr(found) == repr(value)
    assert getattr(found, "dtype", None) == getattr(value, "dtype", None)


def test_arrays_keep_nan_their_order_in_memory_and_can_be_written():
    for value in (
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([np.nan, 1.0]),
        np.arange(9)[::2],
    ):
        found = Reader({}, {}).value(json.loads(Writer({}).text(value)))
        assert found.tobytes("A") == value.tobytes("A") and found.flags.fnc == value.flags.fnc
        found[0] = 7


@pytest.mark.parametrize(
    "attributes",
    [
        {"a": object()},
        {"a": np.array([None])},
        {"a": np.zeros(2, [("x", float)])},
        {"a": [Ball()]},
        {"a": [shared := [1], shared]},
        {"a": [shared], "b": shared},
        {"a": (memory := np.zeros(4))[:2], "b": memory[2:]},
    ],
    ids=["object", "array of objects", "fields", "in a list", "twice", "two names", "views of one array"],
)
def test_what_cannot_be_restored_is_hidden(attributes):
    writer = Writer(attributes)
    with pytest.raises(Hidden):
        [writer.attribute(path, value) for path, value in attributes.items()]


def test_the_weights_are_read_exactly_or_refused(tmp_path):
    run, other = (fresh({"normalize_observations": True, "seed": seed}) for seed in (0, 1))
    updates(run, range(1, 2))
    save(run, tmp_path / "saved")
    SavedPolicy(other.agent.policy, "CartPole-v1").read(tmp_path / "saved")
    saved = SavedPolicy(run.agent.policy, "CartPole-v1")
    kept = run.agent.policy.state_dict()
    for name, value in kept.items():
        assert torch.equal(other.agent.policy.state_dict()[name], value)
    assert {t.data_ptr() for t in saved.tensors()} == {t.data_ptr() for t in kept.values()}
    with pytest.raises(Refused, match=r"hidden \(8,\) instead of \(9,\)"):
        SavedPolicy(fresh({"hidden": (9,)}).agent.policy, "CartPole-v1").read(tmp_path / "saved")
