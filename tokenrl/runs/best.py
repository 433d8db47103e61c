"""Decides at each evaluation whether the weights of a run are its best so far, and whether it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenrl.errors import Refused
from tokenrl.runs.metric_table import metric_of
from tokenrl.settings import Natural, Settings

DECISIVE = ("reward_greedy", "reward", "accuracy", "loss")
"""The metrics by which evaluations are ranked, unless one is named: the first that is evaluated."""


@dataclass(frozen=True)
class SelectionArguments(Settings, group="selection"):
    """Which weights a run hands over at its end, and when it ends because it gets no better."""

    keep: Literal["last", "best"] = "last"
    """The weights in model/ at the end: from the last step, or from the step with the best evaluation, which may
    be before training. The best of many evaluations of the same held-out rows is partly luck, so
    expect a little less of it on other data. Its checkpoint is saved, and kept beside the newest ones."""
    best_metric: str | None = None
    """The metric of evaluations by which keep and patience decide: higher is better, but for a loss, an error
    or a cost lower.
    Default: reward_greedy, or what is evaluated of reward, accuracy and loss."""
    patience: Natural = 0
    """End the run, with the exit reason no-improvement, after this many evaluations in a row that are no
    better than the best before them; 0: never."""


class Best:
    """The best evaluation of a run so far.

    Attributes:
        steps: the steps whose evaluation was better than all before it; the last one is the best.
        count, since: the number of evaluations, and of those after the best one.
        value: the best one's value of the metric; None before the first evaluation.
    """

    def __init__(self, args: SelectionArguments) -> None:
        """Prepare; `args` says by which metric to decide."""
        self._args = args
        self.metric = args.best_metric or ""
        self.steps = list[int]()
        self.count = self.since = 0
        self.value: float | None = None

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Compare the evaluation of a step with those before it.

        Raises:
            Refused: the metric is not one of those that the first evaluation has.
        """
        if self._args.keep == "last" and not self._args.patience:
            return
        evaluated = [name for name in DECISIVE if name in metrics]
        self.metric = self.metric or (evaluated or DECISIVE)[0]
        if self.metric not in metrics and not self.count:
            names = ", ".join(name for name in metrics if not name.endswith("_stderr"))
            raise Refused(
                f"There is no best {self.metric!r}: this run evaluates {names or 'nothing'}."
            )
        self.count += 1
        self.since += 1
        value = metrics.get(self.metric, math.nan)
        sign = -1 if metric_of(self.metric).better == "less" else 1
        is_better = self.value is None or sign * value > sign * self.value
        if is_better and not math.isnan(value):
            self.steps = [*self.steps, step]
            self.value = value
            self.since = 0

    @property
    def exhausted(self) -> bool:
        """Whether the run ends because its last `patience` evaluations were no better."""
        return 0 < self._args.patience <= self.since

    def until(self, step: int | None) -> int | None:
        """Return the best step up to a step, if its weights are kept; None if they are not."""
        if self._args.keep != "best":
            return None
        steps = [best for best in self.steps if step is None or best <= step]
        return max(steps, default=None)

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says of the weights in model/; empty if they are the last ones."""
        step = self.until(None)
        if step is None:
            return {}
        best = {"step": step, "metric": self.metric, "value": self.value}
        return best | {"evaluations": self.count}

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation must know."""
        state = dict(vars(self))
        del state["_args"]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        vars(self).update(state)


def kept_weights(summary: Mapping[str, Any]) -> str:
    """Return in words which weights a run kept, from summary.json; empty if they are the last ones."""
    best = summary.get("best")
    if not best or summary["exit_reason"] == "check":
        return ""
    folder = "model/"
    if summary["exit_reason"] == "failed":
        folder = f"checkpoints/step_{best['step']:06d}"
    text = (
        f"{folder} holds the weights of step {best['step']}, with the best {best['metric']} of "
        f"{best['evaluations']} evaluations, {best['value']:.4g}"
    )
    last = (summary.get("eval_after") or {}).get(best["metric"])
    if last is not None:
        text += f"; after the last step, {summary['steps']}, it is {last:.4g}"
    return f"{text}. The best of several is partly luck: measure these weights on other data."
