"""What goes wrong in an environment's own code is named, with the step, before training and during it."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
from drawing import seeded
from folders import read_json
from gymnasium import spaces
from refusals import stopped

from tokenrl import train_agent
from tokenrl.cli import main
from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import collect_episodes

ID = "tokenrl-tests/Failing-v0"
NAN = math.nan


class Failing(gymnasium.Env):
    """Episodes of 8 steps with rewards 1 and observations 0, except where the options say otherwise.

    `after` counts the steps of all copies together, so that training can begin before something goes wrong.
    """

    steps_taken, closed = 0, False
    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)

    def __init__(self, rewards=(), observations=(), after=0, raises="", error=None):
        self.length, self.after, self.raises = 8, after, raises
        self.error = error or RuntimeError("the motor broke")
        self.rewards, self.observations = dict(rewards), dict(observations)
        self._fail("__init__")

    def _answer(self, numbers, otherwise):
        return (
            numbers.get(self.steps, otherwise) if Failing.steps_taken >= self.after else otherwise
        )

    def _fail(self, method):
        if self.raises == method and Failing.steps_taken >= self.after:
            raise self.error

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self._fail("reset")
        return np.array([0, self._answer(self.observations, 0)], np.float32), {}

    def close(self):
        # some releases of gymnasium close the other copies when they are collected
        if not Failing.closed:
            Failing.closed = True
            self._fail("close")

    def step(self, action):
        self.steps += 1
        Failing.steps_taken += 1
        self._fail("step")
        observation = np.array([0, self._answer(self.observations, 0)], np.float32)
        return observation, self._answer(self.rewards, 1.0), self.steps >= self.length, False, {}


def register(kind=Failing, **options):
    settings = {"max_episode_steps": 20, "kwargs": options, "disable_env_checker": True}
    gymnasium.registry.pop(ID, None)
    gymnasium.register(ID, entry_point=kind, **settings)
    Failing.steps_taken = 0
    Failing.closed = False
    return ID


RUN = "--num-envs 2 --eval-episodes 2 --max-steps 30 --hidden 4 --save-every 1 --quiet"
POLICY = Policy(Shape(2, "softmax", 2, hidden=()), seeded(0))


def episodes(env):
    return collect_episodes(Environments(env, 2), POLICY, seeded(0), seed=0)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": {7: -1.1e12}}, "a reward that is too large: the largest is 1.1e.12 in size"),
        ({"rewards": {2: NAN}}, "the largest is nan in size.*at most 1e.12"),
        ({"observations": {5: NAN}}, r"gave an observation that is not finite"),
        ({"observations": {8: NAN}}, r"gave an observation that is not finite"),
    ],
)
def test_numbers_that_cannot_be_used_stop_the_run(options, message):
    with stopped(f"The environment {ID} .*{message}"):
        episodes(register(**options))


def test_numbers_after_the_end_of_an_episode_do_not_count():
    """A copy whose episode is over plays on until the last one ends; what it gives then is of no concern."""

    class Unequal(Failing):
        def reset(self, *, seed=None, options=None):
            self.length, self.rewards = (
                (2, {1: 5.0}) if seed == 0 else (8, {} if seed else {1: NAN})
            )
            return super().reset(seed=seed)

    assert episodes(register(Unequal)).returns.tolist() == [6, 8]


@pytest.mark.parametrize("error", [SystemExit(0), RuntimeError("own")], ids=repr)
@pytest.mark.parametrize(
    ("command", "method"), [("control", "__init__"), ("control", "reset"), ("advise", "step")]
)
def test_whatever_is_raised_at_once_is_refused(refusal, command, method, error):
    register(raises=method, error=error)
    flags = RUN if command == "control" else "--episodes 2"
    output = refusal(f"{command} --env {ID} {flags}")
    assert f"it raised {type(error).__name__}: {error}" in output and ID in output


@pytest.mark.parametrize(
    ("method", "error"), [("reset", SystemExit(0)), ("step", RuntimeError("own"))], ids=repr
)
def test_whatever_is_raised_in_training_ends_the_run(workplace, capsys, method, error):
    """The evaluation before training takes at least 32 steps, and each update 16 more."""
    register(raises=method, error=error, after=100)
    assert main(f"control --env {ID} {RUN} --output-dir run".split()) == 1
    output, message = capsys.readouterr().err, f"it raised {type(error).__name__}: {error}"
    assert message in output and ID in output and "Traceback" not in output
    assert "The last complete checkpoint is" in output
    summary = read_json(workplace / "run" / "summary.json")
    assert summary["exit_reason"] == "failed" and message in summary["error"]


def test_an_interrupt_passes_and_an_environment_that_cannot_be_closed_loses_nothing(tmp_path):
    register(raises="step", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):  # outside a run, where Python handles signals itself
        episodes(ID)
    register(raises="close", error=SystemExit(0))
    options = {"env": ID, "max_steps": 1, "num_envs": 2, "eval_episodes": 2}
    with pytest.warns(UserWarning, match=r"failed in close\(\): it raised SystemExit: 0"):
        assert train_agent(output_dir=tmp_path / "run", **options).exit_reason == "finished"
