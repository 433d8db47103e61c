"""`tokenrl control --check`: all findings at once, without a change of the policy."""

from __future__ import annotations

import copy
import operator
import re

import counting_env
import pytest
import torch

from tokenrl.cli import main
from tokenrl.control import training
from tokenrl.control.training import check_agent, train_agent


@pytest.fixture
def check(tmp_path):
    def start(**options):
        small = {"num_envs": 4, "eval_episodes": 4, "max_steps": 10, "check": True}
        return train_agent(output_dir=tmp_path / "run", **(small | options))

    return start


def output(capsys) -> str:
    return " ".join("".join(capsys.readouterr()).split())


def test_a_check_that_passes_shows_returns_and_time(check, tmp_path, capsys):
    result = check()
    assert (result.exit_code, result.exit_reason, result.flags, result.steps) == (0, "check", [], 0)
    assert result.eval_before["reward"] > 8
    text = output(capsys)
    assert re.search(
        r"Check passed.* returns \d+ to \d+ in 4 episodes observations [0-3]\.\d+ at most", text
    )
    assert re.search(r"time \S+ s per update, about 0:\d\d for 10 updates and 11 evaluations", text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("estimator", ["reinforce_running_mean", "ppo"])
def test_a_check_changes_nothing_of_the_agent(check, monkeypatch, estimator):
    agents = []

    def watched(run, *rest):
        agents.extend([copy.deepcopy(run.agent), run.agent])
        return check_agent(run, *rest)

    monkeypatch.setattr(training, "check_agent", watched)
    check(estimator=estimator, normalize_observations=True)
    before, after = ({**agent.state_dict(), **agent.policy.state_dict()} for agent in agents)
    for name, value in before.items():
        same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
        assert same(value, after[name]), name
    assert all(p.grad is None for p in agents[1].policy.parameters())


def test_all_problems_are_printed_at_once_also_when_quiet(tmp_path, capsys):
    words = "control --env MountainCar-v0 --max-episode-steps 10 --learning-rate 3 --num-envs 4"
    words += f" --eval-episodes 4 --check --quiet --output-dir {tmp_path / 'run'}"
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 3
    assert (
        "1. no-signal: In none of 4 episodes do the rewards differ; their mean is -10." in lines[1]
    )
    assert "2. unusual-rate: The learning rate 3 is 150 times the 0.02 that is usual" in lines[2]


def test_pieces_without_a_reward_are_a_remark_if_whole_episodes_differ(check, capsys):
    result = check(env="gridworld", estimator="a2c", num_steps=2, eval_episodes=50)
    assert (result.exit_code, result.flags) == (0, ["no-signal"])
    assert (
        "In none of 8 steps, in which no episode ended, do the rewards differ; their mean is -0.01"
        in output(capsys)
    )


def test_observations_far_from_1_are_a_remark_unless_they_are_normalised(check, capsys):
    env = counting_env.register(lengths=(30, 20))
    result = check(env=env)  # its rewards do not depend on the actions
    assert (result.exit_code, result.flags) == (2, ["no-signal", "observations-far-from-1"])
    assert "observations-far-from-1: The largest absolute value of an observation was 29" in output(
        capsys
    )
    assert check(env=env, normalize_observations=True).flags == ["no-signal"]
