"""Writes the page of a run, or of several runs side by side, from the files of their directories."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tokenrl.runs.markup as markup
from tokenrl.configuration import RECORDED
from tokenrl.errors import Refused, describe
from tokenrl.runs.best import kept_weights
from tokenrl.runs.console import distinct, ending, evaluations, number, with_errors
from tokenrl.runs.files import check_place, flat
from tokenrl.runs.metric_table import all_metrics, finite, metric_of
from tokenrl.runs.metrics import read_metrics
from tokenrl.runs.output import visible
from tokenrl.runs.plots import Chart, Curve
from tokenrl.runs.reader import RecordedRun, read_run, series

Rows = Sequence[Mapping[str, Any]]
Mark = tuple[str, float] | None

_FROM_PYTHON = (
    "Started from Python, with functions or objects that have no name: run that program again."
)
_CAUTION = (
    "Each column is one run. A standard error is over the held-out prompts, pairs or episodes of that run; "
    "so a difference between two runs says nothing yet about their settings: repeat them with several seeds."
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
_NOT_COMPARED = {*RECORDED, "output_dir", "overwrite", "quiet"}


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
    try:
        return markup.write_page(page, recorded.title, list(_sections(recorded)))
    except Refused:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        fault = f"{recorded.path / 'summary.json'} holds what no run writes ({describe(error)})"
        raise Refused(f"{fault}. Correct or remove it, and the run can be shown.") from error


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
    yield _learning("Learning curve", _charts({"": run.metrics}, run.kind, run.mark))
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
    warnings = [*failure, *filter(None, [run.fault]), *summary.get("warnings", ())]
    if warnings:
        heading = "The run failed" if failure else "Warnings"
        yield markup.verdict(heading, warnings, ())
    yield markup.paragraph(ending(summary), "soft")
    yield markup.paragraph(str(summary.get("verdict", "")), "strong")
    warm = summary.get("warm_started")
    if warm:
        yield markup.paragraph(f"Warm start on demonstrations: {warm['in_words']}.")
    yield markup.paragraph(kept_weights(summary))


def compare_runs(runs: Sequence[str | Path], output: str | Path = "comparison.html") -> Path:
    """Write a page that shows runs side by side: final numbers, settings that differ, and learning curves.

    Args:
        runs: the directories of at least two runs of one kind, finished or not.
        output: the file to write.

    Returns:
        The file.

    Raises:
        Refused: a directory holds no run, is given twice, or the runs are of different kinds.
        Stopped: the file could not be written.
    """
    recorded = {str(run): read_run(run) for run in runs}
    if len({run.path.resolve() for run in recorded.values()}) < len(runs):
        names = ", ".join(map(str, runs))
        raise Refused(f"A run is given twice among {names}; give each of them once.")
    kinds = {run.kind: name for name, run in recorded.items()}
    if len(kinds) > 1:
        names = " and ".join(f"{name} (tokenrl {kind})" for kind, name in kinds.items())
        raise Refused(
            f"Runs of different kinds have no curve in common: {names}. Compare runs of one kind."
        )
    output = Path(output)
    check_place(output)
    links = {}
    lines = {}
    for name, run in recorded.items():
        lines[name] = f"{run.title}; {ending(run.summary)}"
        page = run.path / "report.html"
        if page.is_file():
            links[name] = quote(Path(os.path.relpath(page, output.parent)).as_posix())
    marks = {run.mark for run in recorded.values()}
    mark = marks.pop() if len(marks) == 1 else None
    metrics = {name: run.metrics for name, run in recorded.items()}
    sections = [
        markup.Section("", [markup.paragraph(_CAUTION, "soft")]),
        markup.Section("Runs", [markup.run_list(lines, links)]),
        markup.Section("Final numbers (± standard error)", [_final_numbers(recorded)]),
        markup.Section("Settings that differ", _differences(recorded)),
        _learning("Learning curves", _charts(metrics, next(iter(kinds)), mark)),
    ]
    return markup.write_page(output, f"Comparison of {len(recorded)} runs", sections)


def _evaluations(run: RecordedRun) -> markup.Section:
    """Show the numbers of the evaluation before training and of the last one."""
    metrics = {0: dict[str, float | None]()}
    for row in run.evaluations:
        metrics[row["step"]] = {name: finite(row[name]) for name in row if name != "step"}
    last = max(metrics)
    both = {"eval_before": metrics[0]}
    if last:
        both["eval_after"] = metrics[last]
    texts = {name: (before, after) for name, before, after in evaluations(both)}
    heading = f"Held-out evaluation, before → after step {last} (± standard error)"
    return markup.Section(heading, [markup.cards(texts)])


def _learning(heading: str, charts: Sequence[Chart]) -> markup.Section:
    drawn = markup.drawings(charts)
    if not drawn:
        return markup.Section(heading, [])
    return markup.Section(heading, [markup.paragraph(_CURVES, "soft"), drawn])


def _charts(runs: Mapping[str, Rows], kind: str, mark: Mark) -> list[Chart]:
    """Return the large charts of a kind of run, and small ones of its rewards and of its health.

    Args:
        runs: rows of metrics.jsonl by the name of the run.
        kind: the command that made the runs.
        mark: name and value of a horizontal line.
    """
    charts = list(_large_charts(runs, kind, mark))
    charts += _reward_charts(runs)
    charts += _health_charts(runs)
    return charts


def _large_charts(runs: Mapping[str, Rows], kind: str, mark: Mark) -> Iterator[Chart]:
    """Yield a chart of each unit with all metrics of a single run, or of each metric with all runs."""
    for labels in _LARGE.get(kind, (_REWARD,)):
        name = next(iter(labels))
        unit = metric_of(name).unit or "mean"
        line = None if name == "loss" else mark
        if len(runs) > 1:
            for key, label in labels.items():
                curves = _curves(runs, key)
                yield Chart(f"{name}: {label}", unit, curves, large=True, mark=line)
            continue
        curves = []
        for rows in runs.values():
            for colour, (key, label) in enumerate(labels.items()):
                curves.append(_curve(rows, key, label, colour))
        yield Chart(name, unit, curves, large=True, mark=line)


def _reward_charts(runs: Mapping[str, Rows]) -> Iterator[Chart]:
    """Yield a chart of each reward function, if there are several.

    Where the mean of one rises while another falls, the policy trades the one for the other.
    """
    rows_of_runs = list(chain.from_iterable(runs.values()))
    names = dict.fromkeys(chain.from_iterable(rows_of_runs))
    means = [name for name in names if re.fullmatch("rewards/.+/mean", name)]
    if len(means) < 2:
        return
    for name in means:
        curves = _curves(runs, name, "")
        if len(runs) == 1:  # in the colours of the large chart
            training = _curve(rows_of_runs, name, "training", 0)
            held_out = _curve(rows_of_runs, f"eval_{name}", "held out", 1)
            curves = [training, held_out]
        yield Chart(name.removesuffix("/mean"), "mean, before its weight", curves)


def _health_charts(runs: Mapping[str, Rows]) -> Iterator[Chart]:
    """Yield a chart of each diagnostic that is not at its best value all the time."""
    for metric in all_metrics():
        if metric.panel != "health":
            continue
        curves = _curves(runs, metric.name, "last" if len(runs) == 1 else "")
        best = 1.0 if metric.better == "more" else 0.0
        values = chain.from_iterable(curve.y for curve in curves)
        if any(abs(value - best) > _ROUNDING for value in values):
            yield Chart(metric.name, metric.caption, curves)


def _curves(runs: Mapping[str, Rows], key: str, name: str | None = None) -> list[Curve]:
    """Return the curve of a metric for each run, with the name of the run unless another is given."""
    curves = []
    for colour, (run, rows) in enumerate(runs.items(), start=1):
        label = run if name is None else name
        curves.append(_curve(rows, key, label, colour))
    return curves


def _curve(metrics: Rows, key: str, name: str, colour: int) -> Curve:
    """Return the curve of a metric; an evaluation has dots, and a band of its standard errors."""
    import numpy as np

    steps, values = series(metrics, key)
    y = np.clip(values, -_MAX_NUMBER, _MAX_NUMBER)
    curve = Curve(steps, y.tolist(), name, colour)
    if not key.startswith("eval_"):  # the band of a single step would hide the running mean
        return curve
    curve = curve._replace(dots=True)
    error_at = dict(zip(*series(metrics, f"{key}_stderr"), strict=True))
    if not error_at or not steps:
        return curve
    errors = np.clip([error_at.get(step, 0.0) for step in steps], 0.0, _MAX_NUMBER)
    band = ((y - errors).tolist(), (y + errors).tolist())
    return curve._replace(band=band, error=error_at.get(steps[-1]))


def _completions(run: RecordedRun) -> list[dict[str, Any]]:
    """Return completions of the first step that was kept, of the last one and of some between them."""
    rows = []
    for row in run.completions(_MAX_STEPS, _MAX_ROWS):
        if row.get("ending") and "messages" in row:  # an episode is shown as a chat
            row["completion"] = row.pop("messages")
        row["characters"] = 0
        for name in ("completion", "chosen", "rejected"):
            if name in row:
                row["characters"] += len(str(row[name]))
        rows.append(distinct(row))
    return rows


def _final_numbers(runs: Mapping[str, RecordedRun]) -> markup.Block:
    columns = {}
    for name, run in runs.items():
        column = with_errors(distinct(run.summary.get("eval_after")))
        if run.summary.get("loss_after") is not None:
            column["loss of the last batch"] = number(run.summary["loss_after"])
        columns[name] = column
    rows = []
    for name in dict.fromkeys(chain.from_iterable(columns.values())):
        cells = [column.get(name, "-") for column in columns.values()]
        rows.append([name, *cells])
    return markup.table(["", *columns], rows, "wide")


def _differences(runs: Mapping[str, RecordedRun]) -> list[markup.Block]:
    """Show the settings in which runs differ, and warn where their rewards cannot be compared."""
    columns = {}
    for name, run in runs.items():
        compared = {key: value for key, value in run.config.items() if key not in _NOT_COMPARED}
        columns[name] = {key: visible(str(value)) for key, value in flat(compared).items()}
    rows = []
    for key in sorted(set(chain.from_iterable(columns.values()))):
        cells = [column.get(key, "-") for column in columns.values()]
        if len(set(cells)) > 1:
            rows.append([key, *cells])
    if not rows:
        return [markup.paragraph("None: the runs have the same settings.")]
    subjects = [key for key, *_ in rows if key in ("task", "reward", "env", "data")]
    warning = ""
    if subjects:
        warning = f"The runs differ in {' and '.join(subjects)}, so their numbers do not measure the same."
    table = markup.table(["", *columns], rows, "wide")
    return [markup.paragraph(warning, "strong"), table]
