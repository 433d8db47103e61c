"""Trains an agent for some updates without a session, saves its state, and continues from a saved one.

As a program, it continues each of the runs whose folders it is given: in a new process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import describe
from tokenrl.control.run import Run
from tokenrl.control.saving import SavedPolicy
from tokenrl.control.setup import prepare, resolve
from tokenrl.control.training import _evaluate, _one_update
from tokenrl.core import Estimator
from tokenrl.runs.states import read_state, write_state

TIMINGS = ("cpu_seconds", "train_seconds")


def fresh(options: dict[str, Any]) -> Run:
    """Make the objects of a run."""
    arguments = {"num_envs": 4, "eval_episodes": 3, "max_steps": 20, "hidden": (8,), **options}
    if "estimator" in arguments:
        arguments["estimator"] = Estimator.preset(arguments["estimator"])
    args = ControlArguments(**{**arguments, "hidden": tuple(arguments["hidden"])})
    spec = describe(args.env, args.max_episode_steps)
    return prepare(resolve(args, spec), spec)


def updates(run: Run, steps: range) -> list[str]:
    """Do the updates of these steps, each with an evaluation; return the metrics as text, nan included."""
    return [repr({**_one_update(run, step), "eval": _evaluate(run)}) for step in steps]


def save(run: Run, folder: Path) -> None:
    """Save all state of a run into a new folder."""
    folder.mkdir()
    write_state(folder, {"run": run.state_dict(), "agent": run.agent.state_dict()})
    SavedPolicy(run.agent.policy, run.spec.env).write(folder)


def load(run: Run, folder: Path) -> None:
    """Continue from a saved state."""
    state = read_state(folder)
    run.agent.load_state_dict(state["agent"])
    run.load_state_dict(state["run"])
    SavedPolicy(run.agent.policy, run.spec.env).read(folder)


def content(folder: Path) -> dict[str, Any]:
    """Return what a folder holds, to be compared: tensors as bytes, plain state without timings."""
    state = json.loads((folder / "trainer_state.json").read_text())
    for name in TIMINGS:
        del state["run"][name]
    return {"state": state} | {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def begin(options: dict[str, Any], folder: Path, steps: int = 6, until: int = 3) -> list[str]:
    """Train without interruption, and save the state in the middle and at the end.

    Returns:
        The metrics of the updates after the middle.
    """
    folder.mkdir()
    (folder / "options.json").write_text(json.dumps(options))
    run = fresh(options)
    _evaluate(run)
    updates(run, range(1, until + 1))
    save(run, folder / "middle")
    metrics = updates(run, range(until + 1, steps + 1))
    save(run, folder / "end")
    return metrics


def carry_on(folder: Path, steps: int = 6, until: int = 3) -> tuple[Run, list[str]]:
    """Continue with fresh objects from the middle, and save the end beside that of the other run."""
    run = fresh(json.loads((folder / "options.json").read_text()))
    load(run, folder / "middle")
    metrics = updates(run, range(until + 1, steps + 1))
    save(run, folder / "continued")
    return run, metrics


if __name__ == "__main__":
    from counting_env import register

    register(lengths=(3, 5, 4, 2))
    for name in sys.argv[1:]:
        done, found = carry_on(Path(name))
        (Path(name) / "metrics.json").write_text(json.dumps({"metrics": found, "inexact": done.inexact}))
