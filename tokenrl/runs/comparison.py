"""Writes one page that shows several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tokenrl.configuration import RECORDED
from tokenrl.errors import Refused
from tokenrl.runs.charts import Curve
from tokenrl.runs.console import ending, number, visible, with_errors
from tokenrl.runs.page import Html, section, table, tag, write_page
from tokenrl.runs.panels import compared_curves
from tokenrl.runs.reader import RecordedRun, read_run

_NOT_COMPARED = {*RECORDED, "output_dir", "overwrite", "quiet"}
_CAUTION = (
    "Each column is one run. A standard error is over the held-out prompts, pairs or episodes of that run; "
    "it does not say how much a run would differ with another seed. So a difference between two runs says "
    "nothing yet about their settings: repeat each setting with several seeds before you conclude."
)


def compare_runs(runs: Sequence[str | Path], output: str | Path = "comparison.html") -> Path:
    """Write a page that compares runs: learning curves, settings that differ, and final numbers.

    Args:
        runs: the directories of at least two runs of one kind, finished or not.
        output: the file to write.

    Returns:
        The file.

    Raises:
        Refused: a directory holds no run, is given twice, or the runs are of different kinds.
        Stopped: the file could not be written.
    """
    found = {str(run): read_run(run) for run in runs}
    if len({run.path.resolve() for run in found.values()}) < len(runs):
        raise Refused(f"A run is given twice among {', '.join(map(str, runs))}; give each of them once.")
    kinds = {run.kind: name for name, run in found.items()}
    if len(kinds) > 1:
        named = " and ".join(f"{name} (tokenrl {kind})" for kind, name in kinds.items())
        raise Refused(f"Runs of different kinds have no curve in common: {named}. Compare runs of one kind.")
    output = Path(output)
    if os.path.isdir(output) or not os.path.isdir(output.parent):
        raise Refused(f"The page cannot be written to {output}; give a file in a folder that exists.")
    marks = {run.mark for run in found.values()}
    return write_page(
        output,
        f"Comparison of {len(found)} runs",
        tag("p", _CAUTION, class_="soft"),
        section("Runs", _legend(found, output)),
        section("Final numbers (± standard error)", _final_numbers(found)),
        section("Settings that differ", _differences(found)),
        compared_curves(
            {name: run.metrics for name, run in found.items()},
            next(iter(kinds)),
            marks.pop() if len(marks) == 1 else None,
        ),
    )


def _legend(runs: Mapping[str, RecordedRun], output: Path) -> Html:
    """List the runs in the colours of their curves, with links to those reports that exist."""
    items = []
    for place, (name, run) in enumerate(runs.items(), start=1):
        report = Path(os.path.relpath(run.path / "report.html", output.parent))
        link = tag("a", name, href=quote(report.as_posix())) if (run.path / "report.html").is_file() else name
        about = tag("span", f" {run.title}; {ending(run.summary)}", class_="soft")
        items.append(tag("li", tag("span", **Curve((), (), colour=place).look), link, about))
    return tag("ul", *items, class_="runs")


def _final_numbers(runs: Mapping[str, RecordedRun]) -> Html:
    columns = {name: with_errors(run.summary.get("eval_after") or {}) for name, run in runs.items()}
    for name, run in runs.items():
        if run.summary.get("loss_after") is not None:
            columns[name]["loss of the last batch"] = number(run.summary["loss_after"])
    return _side_by_side(columns)


def _differences(runs: Mapping[str, RecordedRun]) -> Html:
    settings = {name: _flat(run.config) for name, run in runs.items()}
    names = dict.fromkeys(key for column in settings.values() for key in column)
    differ = [key for key in sorted(names) if len({column.get(key) for column in settings.values()}) > 1]
    if not differ:
        return tag("p", "None: the runs have the same settings.")
    shown = {name: {key: column.get(key, "-") for key in differ} for name, column in settings.items()}
    apart = [key for key in ("task", "reward", "env", "data") if key in differ]
    warning = f"The runs differ in {' and '.join(apart)}, so their numbers do not measure the same."
    return Html((tag("p", tag("b", warning)) if apart else "") + _side_by_side(shown))


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Return settings as text by name; those of an estimator are named as its flags are."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        elif before or key not in _NOT_COMPARED:
            found[before + key] = visible(str(value))
    return found


def _side_by_side(columns: Mapping[str, Mapping[str, str]]) -> Html:
    """Make a table with a column per run; what a run lacks is a dash."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    return tag("div", table(["", *columns], rows), class_="wide") if rows else Html()
