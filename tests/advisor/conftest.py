"""Fixtures: directories of runs that never happened, written by the code that writes real ones."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import fields

import pytest

from tokenrl.control.arguments import ControlArguments
from tokenrl.files import write_json
from tokenrl.language.policy.model import wrap
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import settle
from tokenrl.runs.directory import acquire_lock
from tokenrl.runs.metrics import append_rows
from tokenrl.runs.origin import versions
from toy_tasks.models import TinyModel

STEPS = 40
CONTROL = {"env": "CartPole-v1", "head": "softmax", "max_steps": STEPS}
TRAIN = {
    "task": "vowels",
    "max_steps": STEPS,
    "prompts_per_step": 8,
    "num_generations": 4,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
}
HEALTHY = {
    "reward": lambda step: 0.8 * min(1, 2 * step / STEPS) + 0.02 * math.sin(step),
    "reward_std": 0.4,
    "entropy": 0.8,
    "skipped_steps": 0,
}
IN_TRAIN = {"frac_reward_zero_std": 0.1, "completions/clipped_ratio": 0.01}
IN_CONTROL = {"episode_length": 30.0}


@pytest.fixture
def made_up(tmp_path):
    """`made_up(kind, steps=..., running=..., evaluated=..., solved=..., settings=..., **metrics)`: its path.

    A metric is a number, or a function of the step; its name may hold `__` for a `/`. A run that is running
    holds its lock until the test ends and has no summary.json. `evaluated` maps steps to the reward of an
    evaluation, whose standard error is 0.01.
    """
    open_runs = ExitStack()

    def write(
        kind, *, steps=STEPS, running=False, evaluated=None, solved=None, settings=(), **metrics
    ):
        if kind == "train":
            choices = TrainArguments(**TRAIN | dict(settings))
            policy = wrap(*TinyModel(tokens=("a",))(seed=0))
            arguments = settle(choices, PromptTask("vowels", [], []), policy).args
        else:
            settings = {"eval_every": 4, "value_learning_rate": 0.02} | CONTROL | dict(settings)
            arguments = ControlArguments(**settings)
        values = {f.name: getattr(arguments, f.name) for f in fields(arguments)}
        path = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        about = {"kind": kind, "title": "a run", "solved": solved, "versions": versions()}
        write_json(path / "config.json", values | about)
        rows = HEALTHY | (IN_TRAIN if kind == "train" else IN_CONTROL)
        rows |= {name.replace("__", "/"): value for name, value in metrics.items()}
        for step in range(steps + 1):
            row = {name: value(step) if callable(value) else value for name, value in rows.items()}
            row = {name: value for name, value in row.items() if value is not None} if step else {}
            reward = (evaluated or {0: 0.0, STEPS: 0.8}).get(step)
            if reward is not None:
                row |= {
                    "eval_reward": reward,
                    "eval_reward_greedy": reward,
                    "eval_reward_stderr": 0.01,
                }
            append_rows(path, step, row)
        if running:
            open_runs.callback(acquire_lock(path, "").release)
        else:
            write_json(path / "summary.json", {"exit_reason": "finished", "steps": steps})
        return path

    with open_runs:
        yield write
