"""`tokenrl control --check`: all findings at once, without a change of the policy."""

from __future__ import annotations

import copy
import operator

import pytest
import torch

from tokenrl.cli import main
from tokenrl.control import training
from tokenrl.control.training import check_agent, train_agent

SMALL = {"num_envs": 4, "eval_episodes": 4, "max_steps": 10, "check": True}


@pytest.mark.parametrize("estimator", ["reinforce_running_mean", "ppo"])
def test_a_check_that_passes_changes_nothing_of_the_agent(tmp_path, monkeypatch, said, estimator):
    agents = []

    def watched(run, *rest):
        agents.extend([copy.deepcopy(run.agent), run.agent])
        return check_agent(run, *rest)

    monkeypatch.setattr(training, "check_agent", watched)
    options = {**SMALL, "estimator": estimator, "normalize_observations": True}
    result = train_agent(output_dir=tmp_path / "run", **options)
    assert (result.exit_code, result.exit_reason, result.flags, result.steps) == (0, "check", [], 0)
    assert result.eval_before["reward"] > 8 and list(tmp_path.iterdir()) == []
    words = ("Check passed", " in 4 episodes observations ", "for 10 updates and 11 evaluations")
    output = said()
    assert all(word in output for word in words)
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


def test_pieces_without_a_reward_are_a_remark_if_whole_episodes_differ(tmp_path, said):
    options = {**SMALL, "env": "gridworld", "estimator": "a2c", "num_steps": 2}
    result = train_agent(output_dir=tmp_path, **options | {"eval_episodes": 50})
    assert (result.exit_code, result.flags) == (0, ["no-signal"])
    assert "In none of 4 pieces of episodes do the rewards differ; their mean is -0.02" in said()
