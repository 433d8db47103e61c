"""Writes the page of a run from the files of its directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import tokenrl.runs.markup as markup
from tokenrl.runs.best import kept_weights
from tokenrl.runs.console import distinct, ending, evaluations as before_and_after
from tokenrl.runs.findings import evaluations
from tokenrl.runs.metric_table import Rows, all_metrics, metric_of
from tokenrl.runs.metrics import read_metrics
from tokenrl.runs.plots import Chart, Curve
from tokenrl.runs.reader import RecordedRun, read_run

_FROM_PYTHON = (
    "Started from Python, with functions or objects that have no name: run that program again."
)
_CURVES = (
    "By step (update; 0 is before training). Faint lines are single steps, the lines in them running means; "
    "dots are evaluations, with bands of ± one standard error where it is known."
)
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
    return markup.write_page(page, recorded.title, list(_sections(recorded)))


def _sections(run: RecordedRun) -> Iterator[markup.Section]:
    config = run.config
    yield markup.Section("", list(_outcome(run)))
    yield _evaluations(run)
    stage = run.path / "warm_start" / "metrics.jsonl"
    if config.get("warm_started") and stage.is_file():
        curve = _curve(read_metrics(stage), "loss", "loss of demonstrations", 2)
        yield _learning(
            "Warm start", [Chart("Warm start", "nats per token, by update", [curve], large=True)]
        )
    yield _learning("Learning curve", _charts(run))
    command = str(config.get("command") or _FROM_PYTHON)
    yield markup.Section("To repeat", [markup.preformatted(command)])
    settings = {key: value for key, value in config.items() if key not in ("versions", "command")}
    yield markup.Section("Configuration", [markup.preformatted(settings)], closed=True)
    yield markup.Section("Versions", [markup.preformatted(config.get("versions", {}))], closed=True)
    yield markup.Section("Completions", [markup.completions(_completions(run))])


def _outcome(run: RecordedRun) -> Iterator[markup.Block]:
    """Yield what went wrong, how the run ended, its verdict, and remarks."""
    summary = run.summary
    failure = [summary[name] for name in ("error", "remedy") if summary.get(name)]
    warnings = [*failure, *summary.get("warnings", ())]
    if warnings:
        heading = "The run failed" if failure else "Warnings"
        yield markup.verdict(heading, warnings, ())
    yield markup.paragraph(ending(summary), "soft")
    yield markup.paragraph(str(summary.get("verdict", "")), "strong")
    warm = summary.get("warm_started")
    if warm:
        yield markup.paragraph(f"Warm start on demonstrations: {warm['in_words']}.")
    yield markup.paragraph(kept_weights(summary))


def _evaluations(run: RecordedRun) -> markup.Section:
    """Show the numbers of the evaluation before training and of the last one."""
    metrics = {0: dict[str, float | None]()}
    for row in run.evaluations:
        metrics[row["step"]] = {name: row[name] for name in row if name != "step"}
    last = max(metrics)
    both = {"eval_before": metrics[0], "eval_after": metrics[last] if last else None}
    texts = {name: (before, after) for name, before, after in before_and_after(both)}
    heading = f"Held-out evaluation, before → after step {last} (± standard error)"
    return markup.Section(heading, [markup.cards(texts)])


def _learning(heading: str, charts: Iterable[Chart]) -> markup.Section:
    drawn = markup.drawings(list(charts))
    return markup.Section(heading, [markup.paragraph(_CURVES, "soft"), drawn] if drawn else [])


def _charts(run: RecordedRun) -> Iterator[Chart]:
    """Yield the large charts of a kind of run, then small ones of its rewards and of its health."""
    for labels in _LARGE.get(run.kind, (_REWARD,)):
        curves = [
            _curve(run.metrics, key, label, colour)
            for colour, (key, label) in enumerate(labels.items())
        ]
        name = next(iter(labels))
        line = None if name == "loss" else run.mark
        yield Chart(name, metric_of(name).unit or "mean", curves, large=True, mark=line)
    yield from _reward_charts(run.metrics)
    for metric in all_metrics():
        if metric.panel == "health":
            curve = _curve(run.metrics, metric.name, "last", 1)
            best = 1.0 if metric.better == "more" else 0.0
            if any(abs(value - best) > _ROUNDING for value in curve.y):
                yield Chart(metric.name, metric.caption, [curve])


def _reward_charts(metrics: Rows) -> Iterator[Chart]:
    """Yield a chart of each reward function, if there are several.

    Where the mean of one rises while another falls, the policy trades the one for the other.
    """
    names = dict.fromkeys(chain.from_iterable(metrics))
    means = [name for name in names if re.fullmatch("rewards/.+/mean", name)]
    for name in means if len(means) > 1 else ():
        training = _curve(metrics, name, "training", 0)
        held_out = _curve(metrics, f"eval_{name}", "held out", 1)
        yield Chart(name.removesuffix("/mean"), "mean, before its weight", [training, held_out])


def _curve(metrics: Rows, key: str, name: str, colour: int) -> Curve:
    """Return the curve of a metric; an evaluation has dots, and a band of its standard errors."""
    import numpy as np

    means = evaluations(metrics, key)
    y = np.clip([mean.value for mean in means], -_MAX_NUMBER, _MAX_NUMBER)
    curve = Curve([mean.step for mean in means], y.tolist(), name, colour)
    if not key.startswith("eval_") or not means:  # else the band would hide the running mean
        return curve
    curve = curve._replace(dots=True, error=means[-1].error)
    errors = np.nan_to_num(np.clip([mean.error for mean in means], 0.0, _MAX_NUMBER))
    if not errors.any():
        return curve
    return curve._replace(band=((y - errors).tolist(), (y + errors).tolist()))


def _completions(run: RecordedRun) -> list[dict[str, Any]]:
    """Return completions of the first step that was kept, of the last one and of some between them."""
    rows = []
    for row in run.completions(_MAX_STEPS, _MAX_ROWS):
        if row.get("ending") and "messages" in row:  # an episode is shown as a chat
            row["completion"] = row.pop("messages")
        texts = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
        row["characters"] = sum(len(str(text)) for text in texts)
        rows.append(distinct(row))
    return rows
