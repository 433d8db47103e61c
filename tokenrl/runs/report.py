"""Writes the page of a run from the files of its directory, and makes the charts of its metrics."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrl.runs.best import kept_weights
from tokenrl.runs.console import distinct, ending, evaluations as before_and_after
from tokenrl.runs.findings import evaluations
from tokenrl.runs.markup import write_page
from tokenrl.runs.metric_table import Metric, Rows, all_metrics, metric_of
from tokenrl.runs.metrics import read_metrics
from tokenrl.runs.plots import Chart
from tokenrl.runs.reader import RecordedRun, read_run

if TYPE_CHECKING:
    import pandas as pd

_REWARD = {
    "reward": "training",
    "eval_reward": "held-out sampled",
    "eval_reward_greedy": "held-out greedy",
}
_LOSS = {"loss": "training"}
_ACCURACY = {"accuracy": "training batch", "eval_accuracy": "held out"}
_LARGE = {"sft": (_LOSS, _REWARD), "reward-model": (_ACCURACY,)}
"""The large charts of a kind of run (of other kinds the reward): metrics with the names of their curves."""
_ROUNDING = 1e-4
"""A diagnostic that never differs more from its best value, 0 or 1, is not drawn."""
_MAX_NUMBER = 1e300  # beyond it means and ranges of axes would overflow
_MAX_STEPS = 8  # on a page
_MAX_ROWS = 16  # completions of a step on a page


def report_from_directory(run: str | Path) -> Path:
    """Write the page of a run, finished or not, from its directory.

    Returns:
        The page. The page of a comparison of several arms is left as it is.

    Raises:
        Refused: the directory holds no run, or a file of it is damaged.
    """
    page = Path(run) / "report.html"
    if os.path.isfile(Path(run) / "plan.json") and page.is_file():
        return page
    recorded = read_run(run)
    summary = recorded.summary
    failure = [summary[name] for name in ("error", "remedy") if summary.get(name)]
    evaluated = {row["step"]: row for row in recorded.evaluations}
    last = max(evaluated, default=0)
    both = {"eval_before": evaluated.get(0), "eval_after": evaluated[last] if last else None}
    return write_page(
        page,
        "run.html",
        run=recorded,
        warnings=[*failure, *summary.get("warnings", ())],
        ending=ending(summary),
        weights=kept_weights(summary),
        last_step=last,
        evaluated=[row for row in before_and_after(both) if row[0] != "step"],
        learning={
            "Warm start": list(_warm_start(recorded)),
            "Learning curve": list(_charts(recorded)),
        },
        settings={k: v for k, v in recorded.config.items() if k not in ("versions", "command")},
        rows=_completions(recorded),
    )


def curve(rows: Rows, metric: str) -> pd.DataFrame:
    """Return the finite values of a metric by step; an evaluation has errors, and a band of them."""
    import numpy as np
    import pandas as pd

    means = np.array(evaluations(rows, metric), dtype=float).reshape(-1, 3)
    value, error, step = np.clip(means, -_MAX_NUMBER, _MAX_NUMBER).T
    band = {"low": value - np.nan_to_num(error), "high": value + np.nan_to_num(error)}
    frame = pd.DataFrame({"value": value, "error": error} | band, index=step)
    # the band of a running mean would hide it
    return frame if metric.startswith("eval_") else frame[["value"]]


def is_shown(metric: Metric, curves: Mapping[str, pd.DataFrame]) -> bool:
    """Return whether there are curves, and, of a metric of health, one that leaves its best value, 0 or 1."""
    best = 1.0 if metric.better == "more" else 0.0
    return any(
        metric.panel != "health" or ((values["value"] - best).abs() > _ROUNDING).any()
        for values in curves.values()
    )


def _warm_start(run: RecordedRun) -> Iterator[Chart]:
    stage = run.path / "warm_start" / "metrics.jsonl"
    if run.config.get("warm_started") and stage.is_file():
        loss = {"loss of demonstrations": curve(read_metrics(stage), "loss")}
        yield Chart("Warm start", "nats per token, by update", loss)


def _charts(run: RecordedRun) -> Iterator[Chart]:
    """Yield the large charts of a kind of run, then small ones of its rewards and of its health."""
    for labels in _LARGE.get(run.kind, (_REWARD,)):
        name = next(iter(labels))
        curves = _curves(run, labels)
        mark = None if name == "loss" else run.mark
        if curves:
            yield Chart(name, metric_of(name).unit or "mean", curves, mark=mark)
    # Where the mean of one reward rises while another falls, the policy trades the one for the other.
    names = dict.fromkeys(name for row in run.metrics for name in row)
    means = [name for name in names if re.fullmatch("rewards/.+/mean", name)]
    for name in means if len(means) > 1 else ():
        curves = _curves(run, {name: "training", f"eval_{name}": "held out"})
        yield Chart(name.removesuffix("/mean"), "mean, before its weight", curves, large=False)
    for metric in all_metrics():
        curves = _curves(run, {metric.name: "last"} if metric.panel == "health" else {})
        if is_shown(metric, curves):
            yield Chart(metric.name, metric.caption, curves, large=False)


def _curves(run: RecordedRun, labels: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """Return the curves of metrics that have values, by their labels."""
    curves = {label: curve(run.metrics, name) for name, label in labels.items()}
    return {label: values for label, values in curves.items() if len(values)}


def _completions(run: RecordedRun) -> list[dict[str, Any]]:
    """Return completions of the first step that was kept, of the last one and of some between them."""
    rows = run.completions(_MAX_STEPS, _MAX_ROWS)
    for row in rows:
        if row.get("ending") and "messages" in row:  # an episode is shown as a chat
            row["completion"] = row.pop("messages")
    return [distinct(row) for row in rows]
