"""Reads what a run directory says about a run, finished or not: settings, metrics, how it ended."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.configuration import configured
from tokenrl.control.arguments import ControlArguments, ControlSettings
from tokenrl.core.entropy import final_entropy
from tokenrl.errors import Refused
from tokenrl.language.training.arguments import TrainArguments, TrainSettings
from tokenrl.runs.reader import series
from tokenrl.runs.recorded import recorded_config, recorded_rows, recorded_summary
from tokenrl.settings import settled

KINDS: dict[str, tuple[Any, Any]] = {
    "train": (TrainArguments, TrainSettings),
    "control": (ControlArguments, ControlSettings),
}
"""The commands whose runs can be diagnosed, with their arguments and the settings of their runs."""


class Recent(NamedTuple):
    """The mean of a metric over the last tenth of the steps that have it, and the range of those steps."""

    value: float
    steps: tuple[int, int]


@dataclass(frozen=True)
class History:
    """A run as its directory records it.

    Attributes:
        path: the run directory.
        kind: the command, `train` or `control`.
        arguments: the settings of the run.
        rows: the lines of metrics.jsonl; that of step 0 is the evaluation before training.
        summary: summary.json; None if there is none.
        title: the run in a few words.
        threshold: the reward from which the task counts as solved; None if it has no such threshold.
        horizon: largest number of actions of an episode; None if it is not known.
    """

    path: Path
    kind: str
    arguments: Any
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None
    title: str
    threshold: float | None
    horizon: int | None

    @property
    def step(self) -> int:
        """The last step recorded."""
        return int(self.rows[-1]["step"])

    @property
    def language(self) -> bool:
        """Whether a language model was trained."""
        return self.kind == "train"

    @property
    def estimator(self) -> Any:
        """The estimator of the run."""
        return self.arguments.estimator

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric is a finite number, and those numbers."""
        return series(self.rows, key)

    def recent(self, key: str) -> Recent | None:
        """Return the mean over the last tenth, which training judges by too; None without the metric."""
        steps, values = self.series(key)
        if not steps:
            return None
        return Recent(final_entropy(values), (steps[-max(1, len(steps) // 10)], steps[-1]))

    def early(self, key: str) -> float | None:
        """Return the mean over the first tenth of the steps; None without the metric."""
        _, values = self.series(key)
        first = values[: max(1, len(values) // 10)]
        return sum(first) / len(first) if first else None

    @cached_property
    def solved(self) -> bool:
        """Whether the last evaluation reaches the threshold: that of the greedy answer, or of the return."""
        _, values = self.series("eval_reward_greedy" if self.language else "eval_reward")
        return self.threshold is not None and bool(values) and values[-1] >= self.threshold

    @cached_property
    def status(self) -> str:
        """How far the run has come, and whether it has ended, in words."""
        done = f"{self.step} of {self.arguments.max_steps} steps ({self.step / self.arguments.max_steps:.0%})"
        if self.summary is not None:
            error = f": {self.summary['error']}" if "error" in self.summary else ""
            return f"{done}; ended ({self.summary.get('exit_reason', 'unknown')}){error}"
        if self.running:
            return f"{done}; still running, there is no summary.json yet"
        return f"{done}; there is no summary.json and nobody holds the run's lock: it was killed"

    @cached_property
    def running(self) -> bool:
        """Whether the run has no summary and a process still holds the lock of its directory."""
        from filelock import FileLock, Timeout

        if self.summary is not None or not (self.path / ".lock").exists():
            return False
        try:
            with FileLock(self.path / ".lock", blocking=False):
                return False
        except (Timeout, OSError):
            return True


def read_run(path: str) -> History:
    """Read a run directory.

    Raises:
        Refused: there is no run of `tokenrl train` or `tokenrl control` in it, its files are damaged, or it
            has made no step yet.
    """
    run = Path(path)
    if not os.path.isfile(run / "config.json"):
        raise Refused(
            f"{run} holds no run: there is no config.json in it. Give the output directory of `tokenrl "
            "train` or `tokenrl control`; a run writes that file once it has evaluated the first policy."
        )
    config = recorded_config(run)
    kind = config.get("kind")
    if kind not in KINDS:
        raise Refused(
            f"{run} is a run of {f'`tokenrl {kind}`' if kind else 'an unknown command'}. Only runs with a "
            "policy gradient can be diagnosed: give the output directory of `tokenrl train` or `tokenrl "
            "control`."
        )
    rows = recorded_rows(run)
    if not any(series(rows, "reward")[0]):
        raise Refused(
            f"{run} has not made a step yet, or none in which an episode ended with a finite reward: none of "
            f"the {len(rows)} lines of its metrics.jsonl has one. Ask again once the run has come further."
        )
    arguments, settings = KINDS[kind]
    arguments = configured(arguments, run, kind)
    settled(settings, arguments, {})  # refuses what a run never leaves open
    return History(
        path=run,
        kind=kind,
        arguments=arguments,
        rows=rows,
        summary=recorded_summary(run) or None,
        title=str(config.get("title", run.name)),
        threshold=None if config.get("solved") is None else float(config["solved"]),  # "Infinity" too
        horizon=_horizon(arguments),
    )


def _horizon(arguments: Any) -> int | None:
    if isinstance(arguments, TrainArguments):
        return arguments.max_completion_length
    if arguments.max_episode_steps:
        return int(arguments.max_episode_steps)
    from tokenrl.control.environments import describe

    try:
        return describe(arguments.env).horizon
    except Refused:  # an environment that is not installed here
        return None
