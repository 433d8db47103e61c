"""A run that continues from a checkpoint: exactly with whole episodes, from new episodes with pieces."""

from __future__ import annotations

import shutil

from tokenrl import train_agent

SMALL = {"num_envs": 4, "eval_episodes": 3, "max_steps": 6, "save_every": 3, "eval_every": 2}
PIECES = {"num_steps": 7, "estimator": "ppo", "num_iterations": 2, "num_minibatches": 3}


def results(folder):
    weights = (folder / "model" / "policy.safetensors").read_bytes()
    return (folder / "metrics.jsonl").read_text().splitlines(), weights


def continued(run, name, options):
    """Copy a run and train it again from the checkpoint in its middle; return its results."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    middle = str(copy / "checkpoints" / "step_000003")
    train_agent(output_dir=copy, resume=middle, **SMALL | options)
    return results(copy)


def test_pieces_continue_with_new_episodes_and_say_so(tmp_path, said):
    """The continuation cannot be equal to the run, but it is equal to itself; what came before stays."""
    run = train_agent(output_dir=tmp_path / "run", **SMALL | PIECES).output_dir
    lines, _ = results(run)
    assert "begins new episodes" not in said()
    first, second = (continued(run, name, PIECES) for name in ("first", "second"))
    assert "begins new episodes" in said()
    assert first == second
    assert first[0][:4] == lines[:4] and first[0][4] != lines[4]
