"""Writes the page of a run from the files of its directory, and makes the charts of its metrics."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrl.runs.best import kept_weights
from tokenrl.runs.findings import evaluations
from tokenrl.runs.markup import write_page
from tokenrl.runs.metric_table import Rows, all_metrics
from tokenrl.runs.metrics import read_metrics
from tokenrl.runs.output import distinct, ending, evaluations as before_and_after
from tokenrl.runs.plots import Chart
from tokenrl.runs.reader import RecordedRun, read_run, token_table

if TYPE_CHECKING:
    import pandas as pd

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
    evaluated = {row["step"]: row for row in recorded.evaluations}
    last = max(evaluated, default=0)
    both = {"eval_before": evaluated.get(0), "eval_after": evaluated[last] if last else None}
    learning = charts(partial(_curves, recorded), recorded.mark, recorded.learns_by_loss)
    return write_page(
        page,
        "run.html",
        run=recorded,
        ending=ending(recorded.summary),
        weights=kept_weights(recorded.summary),
        last_step=last,
        evaluated=[row for row in before_and_after(both) if row[0] != "step"],
        warm_start=[*_warm_start(recorded)],
        learning=[*learning, *_rewards(recorded)],
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


def charts(
    drawn: Callable[[str], Mapping[str, Mapping[str, pd.DataFrame]]],
    mark: tuple[str, float] | None,
    loss: bool = False,
) -> Iterator[Chart]:
    """Yield a chart of each metric that has a panel and values; the reward comes first, and health last.

    A metric of health is drawn if it leaves its best value, 0 or 1.

    Args:
        drawn: returns by heading the curves of a metric, which may be empty, by their labels.
        mark: name and value of a horizontal line in the charts of rewards and accuracies.
        loss: whether the loss is drawn; that of policy gradients says nothing.
    """
    panels = ("reward", "accuracy", *["loss"] * loss, "health")
    metrics = [metric for metric in all_metrics() if metric.panel in panels]
    for metric in sorted(metrics, key=lambda metric: (panels.index(metric.panel), metric.name)):
        best = 1.0 if metric.better == "more" else 0.0
        is_large = metric.panel != "health"
        line = mark if metric.panel in ("reward", "accuracy") else None
        for heading, curves in drawn(metric.name).items():
            full = {label: values for label, values in curves.items() if len(values)}
            leaves = [((x["value"] - best).abs() > _ROUNDING).any() for x in full.values()]
            if full and (is_large or any(leaves)):
                yield Chart(heading, metric.caption, full, is_large, line)


def _warm_start(run: RecordedRun) -> Iterator[Chart]:
    stage = run.path / "warm_start" / "metrics.jsonl"
    if run.config.get("warm_started") and stage.is_file():
        loss = {"loss of demonstrations": curve(read_metrics(stage), "loss")}
        yield Chart("Warm start", "nats per token, by update", loss)


def _rewards(run: RecordedRun) -> Iterator[Chart]:
    """Yield the mean of each reward: where one rises while another falls, the policy trades the one for the other."""
    names = dict.fromkeys(name for row in run.metrics for name in row)
    means = [name for name in names if re.fullmatch("rewards/.+/mean", name)]
    for name in means if len(means) > 1 else ():
        drawn = _curves(run, name)[name].items()
        curves = {label: values for label, values in drawn if len(values)}
        yield Chart(name.removesuffix("/mean"), "mean, before its weight", curves, large=False)


def _curves(run: RecordedRun, name: str) -> dict[str, dict[str, pd.DataFrame]]:
    """Return the curves of a metric in training and on held-out prompts, which may be empty, under its name."""
    if name.endswith("_greedy"):  # which stands beside the reward of samples
        return {}
    names = {
        "training": name,
        "held out": f"eval_{name}",
        "held out, greedy": f"eval_{name}_greedy",
    }
    return {name: {label: curve(run.metrics, metric) for label, metric in names.items()}}


def _completions(run: RecordedRun) -> list[dict[str, Any]]:
    """Return completions of the first step that was kept, of the last one and of some between them."""
    rows = []
    for row in run.completions(_MAX_STEPS, _MAX_ROWS):
        if row.get("ending") and "messages" in row:  # an episode is shown as a chat
            row["completion"] = row.pop("messages")
        texts = {name: value for name, value in row.items() if not name.startswith("tokens/")}
        rows.append(distinct(texts) | {"tokens": token_table(row)})
    return rows
