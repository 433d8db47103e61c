"""A run that continues from a checkpoint: exactly with whole episodes, from new episodes with pieces."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tokenrl import train_agent

SMALL = {
    "num_envs": 4,
    "eval_episodes": 3,
    "max_steps": 6,
    "hidden": (8,),
    "save_every": 3,
    "eval_every": 2,
}
PIECES = {"num_steps": 7, "estimator": "ppo", "num_iterations": 2, "num_minibatches": 3}
MUCH = {"normalize_observations": True, "learning_rate_schedule": "linear"}
MUCH |= {"estimator": "reinforce_running_mean"}


def results(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return lines, load_file(folder / "model" / "policy.safetensors")


def continued(run, name, options):
    """Copy a run and train it again from the checkpoint in its middle; return its results."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    middle = str(copy / "checkpoints" / "step_000003")
    train_agent(output_dir=str(copy), resume=middle, **SMALL | options)
    return results(copy)


@pytest.mark.parametrize(
    "options",
    [
        MUCH,
        {"estimator": "a2c", "value_network": "shared", "num_minibatches": 2},
        {"env": "gridworld", "estimator": "rloo", "num_envs": 3},
    ],
)
def test_whole_episodes_continue_exactly(tmp_path, options):
    """All numbers of the log and all weights are equal, though no state of an environment was saved."""
    options = {"quiet": True, **options}
    run = train_agent(output_dir=str(tmp_path / "run"), **SMALL | options).output_dir
    lines, weights = results(run)
    again, weights_again = continued(run, "again", options)
    assert again == lines
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_pieces_continue_with_new_episodes_and_say_so(tmp_path, capsys):
    """The continuation cannot be equal to the run, but it is equal to itself; what came before stays."""
    run = train_agent(output_dir=str(tmp_path / "run"), **SMALL | PIECES).output_dir
    lines = results(run)[0]
    assert "begins new episodes" not in " ".join(capsys.readouterr().out.split())
    one, two = (continued(run, name, PIECES) for name in ("one", "two"))
    assert "begins new episodes" in " ".join(capsys.readouterr().out.split())
    assert one[0] == two[0] and all(torch.equal(one[1][name], two[1][name]) for name in one[1])
    assert one[0][:4] == lines[:4] and one[0][4] != lines[4]
