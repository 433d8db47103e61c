"""Writes the page of a run, or of several runs side by side, from the files of their directories."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tokenrl.runs.markup as markup
from tokenrl.configuration import RECORDED
from tokenrl.errors import Refused, describe
from tokenrl.runs.best import kept_weights
from tokenrl.runs.console import distinct, ending, number, visible, with_errors
from tokenrl.runs.files import check_place, flat
from tokenrl.runs.metrics import read_metrics
from tokenrl.runs.plots import Chart, Curve, picture
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
_REWARD = ("reward", "mean", {"reward": "training", "eval_reward": "held-out sampled",
                              "eval_reward_greedy": "held-out greedy"})  # fmt: skip
_ACCURACY = {"accuracy": "training batch", "eval_accuracy": "held out"}
_LARGE = {
    "sft": (("loss", "nats per token", {"loss": "training"}), _REWARD),
    "reward-model": (("accuracy", "share of pairs", _ACCURACY),),
}
"""The large charts of a kind of run (of other kinds the reward): name, unit, and metrics with their names."""
DIAGNOSTICS = {
    "entropy": ("entropy", "nats per action; near 0 the policy no longer explores"),
    "completions/mean_length": ("completion length", "tokens"),
    "episode_length": ("episode length", "steps, mean of the episodes that ended"),
    "explained_variance": ("critic", "explained variance of the returns; below 0 it does harm"),
    "frac_reward_zero_std": ("groups without signal", "fraction of prompts with equal rewards"),
    "kl": ("KL to the reference", "nats per completion"),
    "grad_norm": ("gradient norm", "before clipping"),
    "grad_clipped": (
        "clipped gradients",
        "share of updates that max_grad_norm scaled down; 1 means all",
    ),
    "completions/clipped_ratio": ("truncated", "fraction of completions cut at the length limit"),
    "clip_ratio": ("clipped ratios", "fraction of tokens at which the ratio was beyond its bounds"),
    "sampling/logp_difference/mean": ("sampler off the trainer", "nats per token, without sign"),
    "sampling/effective_sample_size": (
        "effective samples",
        "share of completions, by importance weights",
    ),
    "skipped_steps": ("skipped steps", "updates skipped because the gradient was not finite"),
    "idle_steps": ("idle steps", "updates without any gradient, which left the weights alone"),
}
"""The small charts, of a run's health: metrics with the name and the meaning of each."""
_USUAL = {"sampling/logp_difference/mean": (0, 1e-4), "sampling/effective_sample_size": (1, 0.01)}
"""The usual value of a diagnostic that is not 0, or how far rounding moves it."""
_LARGEST = 1e300  # a number that can be drawn: beyond it means and ranges of axes would overflow
_STEPS, _ROWS = 8, 16  # most steps, and most completions of each, on a page
_NOT_COMPARED = {*RECORDED, "output_dir", "overwrite", "quiet"}


def report_from_directory(run: str | Path) -> Path:
    """Write the page of a run, finished or not, from its directory, and the PNG of its learning curve.

    Returns:
        The page. That of a comparison of several arms is left as it is.

    Raises:
        Refused: the directory holds no run, or a file of it is damaged.
    """
    page = Path(run) / "report.html"
    if os.path.isfile(Path(run) / "plan.json") and page.is_file():
        return page
    recorded = read_run(run)
    try:
        about = {
            "title": recorded.title,
            "subtitle": ending(recorded.summary),
            "kind": recorded.kind,
        }
        learning_curve(
            recorded.path / "learning_curve.png", recorded.metrics, mark=recorded.mark, **about
        )
        return markup.write_page(page, recorded.title, list(_sections(recorded)))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, Refused):
            raise
        fault = f"{recorded.path / 'summary.json'} holds what no run writes ({describe(error)})"
        raise Refused(f"{fault}. Mend or remove it, and the run can be shown.") from error


def learning_curve(
    path: Path,
    metrics: Rows,
    *,
    title: str,
    subtitle: str = "",
    kind: str = "train",
    mark: Mark = None,
) -> Path:
    """Draw the learning curve of a run as a PNG of 1200 x 600 pixels.

    Args:
        path: the file to write.
        metrics: rows of metrics.jsonl; a missing key, null or NaN leaves a gap.
        title: heading of the figure.
        subtitle: a line of small print below the title.
        kind: the command that made the run, which decides what is drawn.
        mark: name and value of a line to reach.
    """
    charts = [chart for chart in _charts({"": metrics}, kind, mark) if chart.large]
    return picture(path, charts, title=title, subtitle=subtitle)


def _sections(run: RecordedRun) -> Iterator[markup.Section]:
    config, summary = run.config, run.summary
    settings = {key: value for key, value in config.items() if key not in ("versions", "command")}
    command = (
        config.get("command", f"tokenrl {run.kind} --config {run.path / 'config.json'}")
        or _FROM_PYTHON
    )
    words = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    warm = (summary.get("warm_started") or {}).get("in_words")
    remarks = [f"Warm start on demonstrations: {warm}." if warm else "", kept_weights(summary)]
    engine, gaps = config.get("generator"), run.series("sampling/logp_difference/max")[1]
    if gaps and engine not in (None, "transformers"):
        gap = f"{number(max(gaps))} nats between its log-probability of a token and the trainer's"
        remarks.append(f"Sampled by {engine}, with at most {gap}.")
    verdict = markup.paragraph(str(summary.get("verdict", "")), "strong")
    told = [*filter(None, map(summary.get, ("error", "remedy"))), *summary.get("warnings", ())]
    box = (
        markup.verdict("The run failed" if "error" in summary else "Warnings", told, ())
        if told
        else {}
    )
    texts = markup.paragraph(ending(summary), "soft"), verdict, *map(markup.paragraph, remarks)
    yield markup.Section("", [box, *texts])
    evaluations, when = _evaluations(run)
    before, after = (with_errors(distinct(metrics)) for metrics in evaluations)
    both = {name: (before.get(name, "-"), after.get(name, "-")) for name in before | after}
    yield markup.Section(
        f"Held-out evaluation, before → {when} (± standard error)", [markup.cards(both)]
    )
    stage = run.path / "warm_start.jsonl"
    if stage.is_file():
        curve = _curve(read_metrics(stage), "loss", "loss of demonstrations", 2)
        yield _learning(
            "Warm start", [Chart("Warm start", "nats per token, by update", [curve], large=True)]
        )
    yield _learning("Learning curve", _charts({"": run.metrics}, run.kind, run.mark))
    yield markup.Section("To repeat", [markup.preformatted(words)])
    yield markup.Section("Configuration", [markup.preformatted(settings)], closed=True)
    yield markup.Section("Versions", [markup.preformatted(config.get("versions", {}))], closed=True)
    yield markup.Section("Completions", [markup.completions(_completions(run))])


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
        raise Refused(
            f"A run is given twice among {', '.join(map(str, runs))}; give each of them once."
        )
    kinds = {run.kind: name for name, run in recorded.items()}
    if len(kinds) > 1:
        named = " and ".join(f"{name} (tokenrl {kind})" for kind, name in kinds.items())
        raise Refused(
            f"Runs of different kinds have no curve in common: {named}. Compare runs of one kind."
        )
    output = Path(output)
    check_place(output)
    links = {}
    for name, run in recorded.items():
        if (page := run.path / "report.html").is_file():
            links[name] = quote(Path(os.path.relpath(page, output.parent)).as_posix())
    about = {name: f"{run.title}; {ending(run.summary)}" for name, run in recorded.items()}
    marks = {run.mark for run in recorded.values()}
    mark = marks.pop() if len(marks) == 1 else None
    charts = _charts({name: run.metrics for name, run in recorded.items()}, next(iter(kinds)), mark)
    sections = [
        markup.Section("", [markup.paragraph(_CAUTION, "soft")]),
        markup.Section("Runs", [markup.run_list(about, links)]),
        markup.Section("Final numbers (± standard error)", [_final_numbers(recorded)]),
        markup.Section("Settings that differ", _differences(recorded)),
        _learning("Learning curves", charts),
    ]
    return markup.write_page(output, f"Comparison of {len(recorded)} runs", sections)


def _evaluations(run: RecordedRun) -> tuple[list[Mapping[str, Any]], str]:
    """Return the evaluations before and after training, and when the latter was.

    That of a run that has failed, or goes on, is its last one.
    """
    rows = {}
    for row in run.metrics:
        if metrics := {key[5:]: value for key, value in row.items() if key.startswith("eval_")}:
            rows[row["step"]] = metrics
    before, after = (run.summary.get(name) for name in ("eval_before", "eval_after"))
    last = max(rows, default=0)
    if after or not last:
        return [before or rows.get(0, {}), after or {}], "after training"
    return [before or rows.get(0, {}), rows[last]], f"at step {last}, the last evaluation"


def _learning(heading: str, charts: Sequence[Chart]) -> markup.Section:
    drawn = markup.drawings(charts)
    return markup.Section(heading, [markup.paragraph(_CURVES, "soft"), drawn] if drawn else [])


def _charts(runs: Mapping[str, Rows], kind: str, mark: Mark) -> list[Chart]:
    """Return the large charts of a kind of run, and small ones of its health.

    Args:
        runs: rows of metrics.jsonl by the name of the run. Several runs have a large chart for each metric,
            a single one has its metrics of one unit together.
        kind: the command that made the runs.
        mark: name and value of a line to reach.
    """
    charts = []
    for name, unit, metrics in _LARGE.get(kind, (_REWARD,)):
        line = None if name == "loss" else mark
        if len(runs) == 1:
            (rows,) = runs.values()
            curves = [
                _curve(rows, key, label, colour)
                for colour, (key, label) in enumerate(metrics.items())
            ]
            charts.append(Chart(name, unit, curves, large=True, mark=line))
        for key, label in metrics.items() if len(runs) > 1 else ():
            curves = [
                _curve(rows, key, run, colour) for colour, (run, rows) in enumerate(runs.items(), 1)
            ]
            charts.append(Chart(f"{name}: {label}", unit, curves, large=True, mark=line))
    last = "last" if len(runs) == 1 else ""  # the colours of several runs are told once, above
    rewards = _rewards(runs)
    for key, (name, unit) in (rewards | DIAGNOSTICS).items():
        curves = [_curve(rows, key, last, colour) for colour, rows in enumerate(runs.values(), 1)]
        if last and key in rewards:  # in the colours of the reward above
            curves = [
                _curve(runs[""], key, "training", 0),
                _curve(runs[""], f"eval_{key}", "held out", 1),
            ]
        usual, rounding = _USUAL.get(key, (0, 0))  # which all the time is not worth a look
        if key in rewards or any(
            abs(value - usual) > rounding for curve in curves for value in curve.y
        ):
            charts.append(Chart(name, unit, curves))
    return charts


def _rewards(runs: Mapping[str, Rows]) -> dict[str, tuple[str, str]]:
    """Return the metric of each reward function with its name and meaning, if there are several.

    Where one of them rises while another falls, the policy trades the one for the other.
    """
    keys = dict.fromkeys(key for rows in runs.values() for row in rows for key in row)
    means = [key for key in keys if key.startswith("rewards/") and key.endswith("/mean")]
    unit = "mean of this reward, before its weight"
    return {key: (key.removesuffix("/mean"), unit) for key in means if len(means) > 1}


def _curve(metrics: Rows, key: str, name: str, colour: int) -> Curve:
    """Make the curve of a metric; that of an evaluation has dots, and a band of its standard errors."""
    x, y = series(metrics, key)
    y = [min(max(value, -_LARGEST), _LARGEST) for value in y]
    evaluated = key.startswith("eval_")  # the band of a single step would hide the running mean
    error_at = dict(zip(*series(metrics, key + "_stderr"), strict=True)) if evaluated else {}
    errors = [min(error_at.get(step, 0.0), _LARGEST) for step in x]
    low, high = ([value + sign * e for value, e in zip(y, errors, strict=True)] for sign in (-1, 1))
    band = (low, high) if error_at else None
    return Curve(x, y, name, colour, evaluated, band, error_at.get(x[-1]) if x else None)


def _completions(run: RecordedRun) -> list[dict[str, Any]]:
    """Return completions of the first step that was kept, of the last one and of some between them."""
    rows = []
    for row in run.completions(_STEPS, _ROWS):
        if row.get("ending") and "messages" in row:  # an episode is shown as a chat
            row["completion"] = row.pop("messages")
        answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
        rows.append({**distinct(row), "characters": sum(map(len, map(str, answers)))})
    return rows


def _final_numbers(runs: Mapping[str, RecordedRun]) -> markup.Block:
    columns = {
        name: with_errors(distinct(run.summary.get("eval_after"))) for name, run in runs.items()
    }
    for name, run in runs.items():
        if run.summary.get("loss_after") is not None:
            columns[name]["loss of the last batch"] = number(run.summary["loss_after"])
    return _side_by_side(columns)


def _differences(runs: Mapping[str, RecordedRun]) -> list[markup.Block]:
    """Show the settings in which runs differ, and warn where their rewards cannot be compared."""
    configs = {
        name: {k: v for k, v in run.config.items() if k not in _NOT_COMPARED}
        for name, run in runs.items()
    }
    settings = {
        run: {k: visible(str(v)) for k, v in flat(config).items()}
        for run, config in configs.items()
    }
    names = sorted({key for column in settings.values() for key in column})
    differ = [key for key in names if len({column.get(key) for column in settings.values()}) > 1]
    if not differ:
        return [markup.paragraph("None: the runs have the same settings.")]
    apart = " and ".join(key for key in ("task", "reward", "env", "data") if key in differ)
    warning = (
        f"The runs differ in {apart}, so their numbers do not measure the same." if apart else ""
    )
    columns = {
        name: {key: column.get(key, "-") for key in differ} for name, column in settings.items()
    }
    return [markup.paragraph(warning, "strong"), _side_by_side(columns)]


def _side_by_side(columns: Mapping[str, Mapping[str, str]]) -> markup.Block:
    """Make a table with a column per run; what a run lacks is a dash."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    return markup.table(["", *columns], rows, "wide")
