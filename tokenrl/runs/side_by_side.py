"""Shows runs side by side: the settings and hashes in which they differ, and a page with their curves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenrl.configuration import RECORDED
from tokenrl.files import check_place, flat
from tokenrl.runs.markup import write_page
from tokenrl.runs.output import ending, with_errors
from tokenrl.runs.reader import RecordedRun, read_run
from tokenrl.runs.report import charts, curve
from tokenrl.runs.resume import APART

if TYPE_CHECKING:
    import pandas as pd

HASH = "hash of "
"""How the name of a fact begins that is a hash."""


def facts_of(run: RecordedRun) -> dict[str, str]:
    """Return settings and hashes of a run as text, by name; what changes no number is left out."""
    left_out = RECORDED | APART
    settings = {name: value for name, value in run.config.items() if name not in left_out}
    hashes = {f"{HASH}{name}": text for name, text in run.config.get("hashes", {}).items()}
    return {name: str(x) for name, x in flat({"kind": run.kind, **settings, **hashes}).items()}


def differences(runs: Mapping[str, RecordedRun], left_out: Collection[str] = ()) -> pd.DataFrame:
    """Return the facts in which runs differ, a row for each, with a column for each run and - where one has none.

    Args:
        runs: the runs by their names.
        left_out: facts that do not matter.
    """
    import pandas as pd

    table = pd.DataFrame({name: facts_of(run) for name, run in runs.items()}).fillna("-")
    table = table.drop(index=[*table.index.intersection([*left_out])])
    return table[table.nunique(axis=1) > 1]


def compare_runs(runs: Sequence[str | Path], output: str | Path = "comparison.html") -> Path:
    """Write a page that shows runs side by side: final numbers, settings that differ, and learning curves.

    Args:
        runs: the directories of the runs, finished or not. Runs of different commands have few numbers in
            common.
        output: the file to write.

    Returns:
        The file.

    Raises:
        Refused: a directory holds no run, or the file cannot be written there.
        Stopped: the file could not be written.
    """
    import pandas as pd

    recorded = {str(run): read_run(run) for run in runs}
    output = Path(output)
    check_place(output)
    numbers = {}
    for name, run in recorded.items():
        numbers[name] = {
            "title": run.title,
            "ended": ending(run.summary),
            **with_errors(run.summary.get("eval_after")),
        }
    marks = {run.mark for run in recorded.values()}
    loss = all(run.learns_by_loss for run in recorded.values())

    def drawn(name: str) -> dict[str, dict[str, pd.DataFrame]]:
        """Return the curves of a metric in training and of evaluations, by run."""
        return {
            metric: {label: curve(run.metrics, metric) for label, run in recorded.items()}
            for metric in (name, f"eval_{name}")
        }

    return write_page(
        output,
        "comparison.html",
        title=f"Comparison of {len(recorded)} runs",
        numbers=pd.DataFrame(numbers),
        settings=differences(recorded),
        learning=[*charts(drawn, marks.pop() if len(marks) == 1 else None, loss)],
    )
