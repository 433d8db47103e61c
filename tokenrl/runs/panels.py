"""Says which metrics are drawn, and draws them: those of one run, or each of them for several runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokenrl.runs.charts import Curve, chart
from tokenrl.runs.page import Html, section, tag
from tokenrl.runs.plots import HEALTH, drawable

Rows = Sequence[Mapping[str, Any]]

_REWARD = (
    "reward",
    "mean",
    {"reward": "training", "eval_reward": "held-out sampled", "eval_reward_greedy": "held-out greedy"},
)
_PANELS = {
    "sft": (("loss", "nats per token", {"loss": "training"}), _REWARD),
    "reward-model": (
        ("accuracy", "share of pairs", {"accuracy": "training batch", "eval_accuracy": "held out"}),
    ),
}
"""The large charts of a kind of run (of other kinds the reward): name, unit, and metrics with their names."""


def learning_curves(metrics: Rows, kind: str, mark: tuple[str, float] | None) -> Html:
    """Draw the learning curves of one run, and small charts of its health below them.

    Args:
        metrics: rows of metrics.jsonl.
        kind: the command that made the run.
        mark: name and value of a line to reach, such as the reward at which the task counts as solved.
    """
    charts = [
        chart(
            name,
            unit,
            [_curve(metrics, key, label, place) for place, (key, label) in enumerate(keys.items())],
            large=True,
            mark=mark,
        )
        for name, unit, keys in _PANELS.get(kind, (_REWARD,))
    ]
    charts += [chart(name, unit, [_curve(metrics, key)]) for key, name, unit in HEALTH]
    return _charts("Learning curve", charts)


def compared_curves(runs: Mapping[str, Rows], kind: str, mark: tuple[str, float] | None) -> Html:
    """Draw each metric of several runs in one chart, a curve per run.

    Args:
        runs: rows of metrics.jsonl by the name of the run.
        kind: the command that made the runs.
        mark: name and value of a line to reach, if it is the same for all.
    """
    charts = [
        chart(
            f"{name}: {label}",
            unit,
            [_curve(rows, key, run, place) for place, (run, rows) in enumerate(runs.items(), start=1)],
            large=True,
            mark=mark,
        )
        for name, unit, keys in _PANELS.get(kind, (_REWARD,))
        for key, label in keys.items()
    ]
    charts += [
        chart(name, unit, [_curve(rows, key, "", place) for place, rows in enumerate(runs.values(), start=1)])
        for key, name, unit in HEALTH
    ]
    return _charts("Learning curves", charts)


def _curve(metrics: Rows, key: str, name: str = "", colour: int = 1) -> Curve:
    """Make the curve of a metric; that of an evaluation has dots and, if they are known, standard errors."""
    x, y = drawable(metrics, key)
    evaluated = key.startswith("eval_")  # the band of a single step would hide the running mean
    known = dict(zip(*drawable(metrics, key + "_stderr"), strict=True)) if evaluated else {}
    errors = [known.get(step, math.nan) for step in x] if known else []
    return Curve(x, y, name, errors, colour, dots=evaluated)


def _charts(heading: str, charts: Sequence[Html]) -> Html:
    if not any(charts):
        return Html()
    note = "By step (update; 0 is before training). Faint lines are single steps, the lines in them running "
    note += "means; dots are evaluations, with bands of ± one standard error where it is known."
    return section(heading, tag("p", note, class_="soft"), tag("div", *charts, class_="charts"))
