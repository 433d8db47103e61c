"""Decides at each evaluation whether the weights of a run are its best so far, and whether it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenrl.core.schedules import policy_steps
from tokenrl.errors import Refused
from tokenrl.files import State
from tokenrl.runs.metric_table import Row, exceeds, metric_of
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
    """The metric of evaluations by which keep and patience decide. The table of metrics says whether more or less
    of it is better. Of a metric without a direction, as of your own, say it: more:NAME or less:NAME. Default:
    reward_greedy, or what is evaluated of reward, accuracy and loss."""
    patience: Natural = 0
    """End the run, with the exit reason no-improvement, after this many evaluations in a row that are no
    better than the best before them; 0: never."""


class Best:
    """The evaluations of a run so far, and which of them is the best.

    Attributes:
        metric: the metric by which they are ranked; empty before the first one.
        evaluations: the value of the metric by the step; nan where it has none.
    """

    def __init__(self, args: SelectionArguments) -> None:
        """Prepare."""
        self._args = args
        self._wish, _, name = (args.best_metric or "").rpartition(":")
        self.metric = name.removeprefix("eval_")
        self.evaluations = dict[int, float]()

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the evaluation of a step.

        Raises:
            Refused: the metric is not one of those that the first evaluation has, or has no direction.
        """
        if self._args.keep == "last" and not self._args.patience:
            return
        evaluated = [name for name in DECISIVE if name in metrics]
        self.metric = self.metric or (evaluated or DECISIVE)[0]
        if self.metric not in metrics and not self.evaluations:
            names = ", ".join(name for name in metrics if not name.endswith("_stderr"))
            raise Refused(
                f"There is no best {self.metric!r}: this run evaluates {names or 'nothing'}."
            )
        if self._better not in ("more", "less"):
            raise Refused(
                f"best_metric was given as {self._args.best_metric!r}, and it is not known whether more or less of "
                f"{self.metric} is better. Give more:{self.metric} or less:{self.metric}, or another metric."
            )
        self.evaluations[step] = float(metrics.get(self.metric, math.nan))

    @property
    def _better(self) -> str:
        """What is better, more or less: as the user says, else as the table of metrics says."""
        is_error = self.metric.endswith("_stderr")  # which has the row of its metric
        return self._wish or ("" if is_error else metric_of(self.metric).better)

    def _best(self, last: float = math.inf) -> int | None:
        """Return the step of the first of the best evaluations up to a step; None if there is none."""
        sign = -1 if self._better == "less" else 1
        signed = {step: sign * value for step, value in self.evaluations.items() if step <= last}
        best = None
        for step, value in signed.items():
            if not math.isnan(value) and (best is None or exceeds(value, signed[best])):
                best = step
        return best

    @property
    def exhausted(self) -> bool:
        """Whether the run ends because its last `patience` evaluations were no better."""
        best = self._best()
        moved = [step for step in self.evaluations if policy_steps(self._args, step)]
        later = [step for step in moved if best is None or step > best]
        return 0 < self._args.patience <= len(later)

    def until(self, last: float = math.inf) -> int | None:
        """Return the best step up to a step, if its weights are kept; None if they are not."""
        return self._best(last) if self._args.keep == "best" else None

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says of the weights in model/; empty if they are the last ones."""
        step = self.until()
        if step is None:
            return {}
        value = self.evaluations[step]
        count = len(self.evaluations)
        return {"step": step, "metric": self.metric, "value": value, "evaluations": count}

    def state_dict(self) -> State:
        """Return what a continuation must know."""
        return {"metric": self.metric, "evaluations": self.evaluations}

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned."""
        self.metric = state["metric"]
        self.evaluations = dict(state["evaluations"])


def kept_weights(summary: Row) -> str:
    """Return in words which weights a run kept, from summary.json; empty if they are the last ones."""
    best = summary.get("best")
    if not best or summary["exit_reason"] == "failed":
        return ""
    text = (
        f"model/ holds the weights of step {best['step']}, with the best {best['metric']} of "
        f"{best['evaluations']} evaluations, {best['value']:.4g}"
    )
    last = (summary.get("eval_after") or {}).get(best["metric"])
    if last is not None:
        text += f"; after the last step, {summary['steps']}, it is {last:.4g}"
    return f"{text}. The best of several is partly luck: measure these weights on other data."
