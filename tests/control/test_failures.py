"""What goes wrong in an environment's own code is named, with the step, before training and during it."""

from __future__ import annotations

import json
import math
from itertools import islice

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tokenrl.cli import main
from tokenrl.control.environments import Environments, describe
from tokenrl.control.numpy_agent import NumpySettings, train_numpy
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import Pieces, collect_episodes
from tokenrl.errors import Refused, Stopped

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
    ({"rewards": {3: NAN}}, r"at step 3 of an episode the reward was nan.*its step\(\)"),
    ({"rewards": {8: -INF}}, "at step 8 of an episode the reward was -inf"),
    ({"rewards": {4: 1e300}}, "at step 4 of an episode the reward was inf.*32 bits"),
    (
        {"rewards": {7: -1.1e12}},
        "that is too large: at step 7 of.*was -1.1.*return rewards from -1e.12 to 1e.12",
    ),
    ({"rewards": {2: None}}, "at step 2 of an episode the reward was nan"),
    ({"observations": {5: NAN}}, "at step 5 of an episode number 1 of the observation.*was nan"),
    ({"observations": {8: INF}}, "at step 8 of an episode number 1 of the observation.*was inf"),
    ({"observations": {0: NAN}}, r"at the start of an episode number 1.*its reset\(\)"),
    ({"rewards": {6: NAN}, "observations": {2: NAN}}, "at step 2 of"),
]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("options", "message"), WRONG)
def test_numbers_that_are_not_finite_are_named(options, message):
    with pytest.raises(Stopped, match=f"The environment {ID} gave.*{message}"):
        episodes(register(**options))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("options", "message"), WRONG)
def test_the_step_is_that_of_the_episode_also_in_pieces(options, message):
    """Pieces of three steps: what is wrong lies in the first, the second or the third piece of an episode."""
    pieces = Pieces(Environments(register(**options), 2), 3, seed=0)
    with pytest.raises(Stopped, match=message):
        for _ in range(4):
            pieces.collect(policy(), torch.Generator().manual_seed(0))


def test_the_step_is_counted_from_the_latest_start():
    """Episodes of 8 steps and one that resets: the sixth piece of three is steps 7 and 8, and a reset."""
    pieces = Pieces(Environments(register(rewards={8: NAN}, after=2 * 12), 2), 3, seed=0)
    for _ in range(5):
        pieces.collect(policy(), torch.Generator().manual_seed(0))
    with pytest.raises(Stopped, match="at step 8 of an episode the reward was nan"):
        pieces.collect(policy(), torch.Generator().manual_seed(0))


def test_large_numbers_are_finite_even_if_their_sum_is_not():
    rollout = episodes(register(observations={0: 3e38}, length=1))
    assert rollout.observations.isfinite().all() and not rollout.observations.sum().isfinite()


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
        ({"rewards": {3: NAN}}, "at step 3 of an episode the reward was nan"),
        (
            {"raises": "step"},
            "failed in step(): it raised RuntimeError: the motor broke (test_failures.py, line",
        ),
        ({"raises": "reset"}, "failed in reset(): it raised RuntimeError: the motor broke"),
        (
            {"raises": "__init__"},
            "could not be made: it raised OSError: no such file: map.txt (test_failures.py",
        ),
    ],
)
def test_both_commands_refuse_what_fails_at_once(tmp_path, capsys, command, options, message):
    register(**options)
    assert run(tmp_path, command) == 2
    said = capsys.readouterr().err
    assert message in said and ID in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": {3: NAN}}, "at step 3 of an episode the reward was nan"),
        ({"raises": "step"}, "failed in step(): it raised RuntimeError: the motor broke"),
    ],
)
def test_what_fails_later_stops_a_run_that_is_kept(tmp_path, capsys, options, message):
    """The evaluation before training takes at least 32 steps, and each update 16 more."""
    register(after=100, **options)
    assert run(tmp_path, "control", "--save-every", "1") == 1
    said = capsys.readouterr().err
    assert message in said and "The last complete checkpoint is" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exit_reason"] == "failed" and message in summary["error"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > 2


@pytest.mark.filterwarnings("error")
def test_a_first_update_that_is_skipped_brings_no_warning(tmp_path):
    register()
    # The squares of such a gradient are beyond float32.
    flags = ["--estimator.baseline", "constant", "--estimator.baseline-constant", "1e30"]
    assert run(tmp_path, "control", "--max-steps", "1", "--estimator", "reinforce", *flags) == 0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["skipped_steps"] == 1


def test_an_error_after_an_observation_that_is_not_finite_says_so():
    """The policy answers such an observation with such an action, at which an environment may well raise."""
    envs = Environments(register(continuous=True, raises="step"), 1)
    envs.reset(0)
    with pytest.raises(Stopped, match=r"the motor broke.*observations before were not finite numbers\.$"):
        envs.step(np.array([[NAN]]))
    with pytest.raises(Stopped, match=r"line \d+\)\.$"):
        envs.step(np.array([[0.5]]))


def test_the_agent_without_autodiff_stops_too():
    with pytest.raises(Stopped, match="at step 3 of an episode the reward was nan"):
        list(islice(train_numpy(NumpySettings(env=register(rewards={3: NAN}))), 1))
    with pytest.raises(Refused, match="could not be made: it raised OSError"):
        list(islice(train_numpy(NumpySettings(env=register(raises="__init__"))), 1))


def test_an_entry_point_that_is_not_there_is_named():
    register()
    gymnasium.registry[ID].entry_point = "no_such_module:Failing"
    with pytest.raises(
        Refused, match=r"could not be made: it raised ModuleNotFoundError: .*no_such_module'\.$"
    ):
        describe(ID)


def test_describing_does_not_play():
    assert describe(register(raises="reset")).horizon == 20


class Own(BaseException):
    """An error that `except Exception` does not catch."""


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt("no"), Own("own")], ids=repr)
@pytest.mark.parametrize("method", ["__init__", "reset", "step"])
def test_whatever_is_raised_is_a_failure_of_the_environment(tmp_path, capsys, method, error):
    register(raises=method, error=error, after=0 if method == "__init__" else 100)
    assert run(tmp_path, "control") == (2 if method == "__init__" else 1)
    said = capsys.readouterr().err
    assert f"it raised {type(error).__name__}: {error}" in said and ID in said and "Traceback" not in said
    if method != "__init__":
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "failed"


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


def test_the_agent_without_autodiff_names_what_was_raised():
    for method in ("reset", "step"):
        with pytest.raises(Stopped, match=rf"failed in {method}\(\): it raised SystemExit: 0"):
            list(islice(train_numpy(NumpySettings(env=register(raises=method, error=SystemExit(0)))), 1))
