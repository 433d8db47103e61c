"""What goes wrong in an environment's own code is named, with the step, before training and during it."""

from __future__ import annotations

import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tokenrl.cli import main
from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import Pieces, collect_episodes
from tokenrl.errors import Stopped

ID = "tokenrl-tests/Failing-v0"
NAN, INF = math.nan, math.inf
SMALL = {"num_envs": 2, "eval_episodes": 2, "max_steps": 30, "hidden": (4,)}


class Failing(gymnasium.Env):
    """Episodes of `length` steps with rewards 1 and observations 0, except where the options say otherwise.

    `after` counts the steps of all copies together, so that training can begin before something goes wrong.
    """

    taken = 0

    def __init__(
        self, length=8, rewards=(), observations=(), after=0, raises="", continuous=False,
        error=None,
    ):  # fmt: skip
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32) if continuous else spaces.Discrete(2)
        self.length, self.after, self.raises = length, after, raises
        self.error = error or RuntimeError("the motor broke")
        self.rewards, self.observations = dict(rewards), dict(observations)
        if raises == "__init__":
            raise error or OSError("no such file: map.txt")

    def _find(self, numbers, otherwise):
        return numbers.get(self.steps, otherwise) if Failing.taken >= self.after else otherwise

    def _fail(self, method):
        if self.raises == method and Failing.taken >= self.after:
            raise self.error

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self._fail("reset")
        return np.array([0, self._find(self.observations, 0)], np.float32), {}

    def close(self):
        self._fail("close")

    def step(self, action):
        self.steps += 1
        Failing.taken += 1
        self._fail("step")
        seen = np.array([0, self._find(self.observations, 0)], np.float32)
        return seen, self._find(self.rewards, 1.0), self.steps >= self.length, False, {}


def register(**options):
    gymnasium.registry.pop(ID, None)
    gymnasium.register(
        ID, entry_point=Failing, max_episode_steps=20, kwargs=options, disable_env_checker=True
    )
    Failing.taken = 0
    return ID


def policy():
    return Policy(Shape(2, "softmax", 2, hidden=()), torch.Generator().manual_seed(0))


def episodes(env):
    return collect_episodes(Environments(env, 2), policy(), 20, torch.Generator().manual_seed(0), seed=0)


WRONG = [
    ({"rewards": {4: 1e300}}, "gave the reward inf in step 4"),
    ({"rewards": {7: -1.1e12}}, "gave the reward -1.1e.12 in step 7.*at most 1e.12 in size"),
    ({"rewards": {2: None}}, "gave the reward nan in step 2"),
    ({"observations": {5: NAN}}, r"gave the observation \[0.0, nan\] in step 5"),
    ({"observations": {0: NAN}}, r"gave the observation \[0.0, nan\] at the start of an episode"),
    ({"rewards": {6: NAN}, "observations": {2: NAN}}, "in step 2 of"),
]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("options", "message"), WRONG)
def test_numbers_that_cannot_be_used_are_named(options, message):
    with pytest.raises(Stopped, match=f"The environment {ID} .*{message}"):
        episodes(register(**options))


def test_numbers_of_pieces_are_looked_at_too():
    """Episodes of 8 steps and one that resets: the sixth piece of three is steps 7 and 8, and a reset."""
    pieces = Pieces(Environments(register(rewards={8: NAN}, after=2 * 12), 2), 3, seed=0)
    for _ in range(5):
        pieces.collect(policy(), torch.Generator().manual_seed(0))
    with pytest.raises(Stopped, match="the reward nan in step 2 of a piece of an episode"):
        pieces.collect(policy(), torch.Generator().manual_seed(0))


def test_numbers_after_the_end_of_an_episode_do_not_count():
    """A copy whose episode is over plays on until the last one ends; what it gives then is of no concern."""

    class Unequal(Failing):
        def reset(self, *, seed=None, options=None):
            if seed is not None:
                self.length, self.rewards = (2, {1: 5.0}) if seed == 0 else (8, {})
            else:
                self.rewards = {1: NAN}
            return super().reset(seed=seed)

    register()
    gymnasium.registry[ID].entry_point = Unequal
    rollout = episodes(ID)
    assert rollout.returns.tolist() == [6, 8]


def run(tmp_path, command, *more):
    values = {"control": SMALL, "advise": {"episodes": 2}}[command]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if name != "hidden"]
    where = (
        ["--output-dir", str(tmp_path / "run"), "--quiet", "--hidden", "4"] if command == "control" else []
    )
    return main([command, "--env", ID, *flags, *where, *more])


@pytest.mark.parametrize("command", ["control", "advise"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": {3: NAN}}, "gave the reward nan in step 3 of an episode"),
        (
            {"raises": "step"},
            "failed in step(): it raised RuntimeError: the motor broke (test_failures.py, line",
        ),
    ],
)
def test_both_commands_refuse_what_fails_at_once(tmp_path, capsys, command, options, message):
    register(**options)
    assert run(tmp_path, command) == 2
    said = capsys.readouterr().err
    assert message in said and ID in said and "Traceback" not in said


@pytest.mark.parametrize("error", [SystemExit(0), RuntimeError("own")], ids=repr)
@pytest.mark.parametrize("method", ["__init__", "reset", "step"])
def test_whatever_is_raised_is_a_failure_of_the_environment(tmp_path, capsys, method, error):
    """The evaluation before training takes at least 32 steps, and each update 16 more."""
    register(raises=method, error=error, after=0 if method == "__init__" else 100)
    assert run(tmp_path, "control", "--save-every", "1") == (2 if method == "__init__" else 1)
    said, message = capsys.readouterr().err, f"it raised {type(error).__name__}: {error}"
    assert message in said and ID in said and "Traceback" not in said
    if method != "__init__":
        assert "The last complete checkpoint is" in said
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["exit_reason"] == "failed" and message in summary["error"]


def test_a_real_interrupt_of_an_environment_passes():
    register(raises="step", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):  # outside a run, where Python handles signals itself
        episodes(ID)


def test_an_environment_that_cannot_be_closed_loses_nothing(tmp_path):
    register(raises="close", error=SystemExit(0))
    with pytest.warns(UserWarning, match=r"failed in close\(\): it raised SystemExit: 0"):
        assert main(
            ["control", "--env", ID, "--max-steps", "1", "--num-envs", "2", "--eval-episodes", "2",
             "--output-dir", str(tmp_path / "run")]
        ) == 0  # fmt: skip
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "finished"
