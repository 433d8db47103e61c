"""The result of a run, and the reader of all that it has written, for reports, diagnoses and comparisons.

`read_run` reads a run that has ended or is still at work. Files that cannot be read, as on a damaged disk,
are refused in one paragraph that names the file.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenrl.configuration import read_config
from tokenrl.errors import Refused
from tokenrl.runs.best import kept_weights
from tokenrl.runs.checkpoint import step_of, tables
from tokenrl.runs.directory import in_use
from tokenrl.runs.findings import evaluations
from tokenrl.runs.metric_table import Row, finite
from tokenrl.runs.metrics import read_completions, read_metrics
from tokenrl.runs.output import ending, evaluations as before_and_after
from tokenrl.runs.signals import SIGNALS, ended_by_itself

if TYPE_CHECKING:
    import pandas as pd

State = Literal["finished", "failed", "stopped", "running", "absent"]
"""How a run stands: it ended as its training decided; it broke off; a signal ended it; it is under way; or it has
not begun. Verdicts are about runs of the first two states alone."""
ENDED: tuple[State, ...] = ("finished", "failed")
LOG_TAIL = 400
"""Most characters of what a run has printed that say why it failed."""


class Tabled:
    """What is shown as a small table with some lines below it, in a terminal and in a notebook."""

    def _rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table, its header first."""
        return [(type(self).__name__,)]

    def _ending(self) -> list[str]:
        """Return the lines below the table."""
        return []

    def _table(self) -> pd.DataFrame:
        import pandas as pd

        header, *rows = self._rows()
        table = pd.DataFrame(rows, columns=header).set_index(header[0])
        return table.rename_axis(index=None, columns=header[0])

    def __repr__(self) -> str:
        return "\n".join([self._table().to_string(), *self._ending()])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return f"{self._table().to_html()}{'<br>'.join(map(escape, self._ending()))}"


@dataclass(frozen=True, repr=False)
class Outcome(Tabled):
    """The result of a run; each kind of training adds its fields. It is shown as a small table.

    Attributes:
        output_dir: the run directory.
        exit_reason: `finished`, `check`, `SIGTERM`, `SIGINT`, or another reason that the training gives.
        exit_code: 0; 2 if a check found a problem; 128 plus the number of the signal that ended the run.
        steps: number of updates made.
        eval_before: metrics of the evaluation before training.
        eval_after: metrics of the evaluation after the last update; may be empty after a signal.
        wall_seconds: seconds since the run began.
        best: with `keep="best"` the `step` whose weights model/ holds, its `value` of the `metric` that
            decided, and the number of `evaluations`; else empty.
    """

    output_dir: Path
    exit_reason: str
    exit_code: int
    steps: int
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    wall_seconds: float
    best: dict[str, Any] = field(kw_only=True, default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json: the fields with `repr`, without directory and exit code."""
        return {
            part.name: getattr(self, part.name)
            for part in fields(self)
            if part.repr and part.name not in ("output_dir", "exit_code")
        }

    @property
    def weights(self) -> str:
        """In words, which weights model/ holds."""
        return kept_weights(self.summary()) or "of the last step"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl in order, each with its `step`; empty if the run wrote none."""
        return _rows_of(self.output_dir / "metrics.jsonl")

    def tokens(self, step: int | None = None, row: int = 0) -> pd.DataFrame:
        """Return the tokens of a completion that was kept; see `RecordedRun.tokens`."""
        return read_run(self.output_dir).tokens(step, row)

    def _rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table: evaluations before and after training."""
        return [(type(self).__name__, "before", "after"), *before_and_after(self.summary())]

    def _ending(self) -> list[str]:
        """Return the lines below the table: how the run ended, which weights it kept, and its directory."""
        summary = self.summary()
        return [*filter(None, [ending(summary), kept_weights(summary)]), str(self.output_dir)]


@dataclass(frozen=True)
class RecordedRun:
    """What the files of a run directory say.

    Attributes:
        path: the run directory.
        config: config.json; empty if the file is missing.
        metrics: the rows of metrics.jsonl in order, each with its `step` and otherwise numbers or None.
        summary: summary.json; empty if the file is missing, as long as the run has not ended.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def title(self) -> str:
        """The title of the run, or else the name of its directory."""
        return str(self.config.get("title") or self.path.resolve().name)

    @property
    def kind(self) -> str:
        """The command that made the run: train, control, sft or reward-model."""
        return str(self.config.get("kind", "train"))

    @property
    def learns_by_loss(self) -> bool:
        """Whether its loss is a measure of progress, as that of policy gradients is not."""
        return self.kind not in ("train", "control")

    @property
    def mark(self) -> tuple[str, float] | None:
        """Name and value of a line to reach: where a task counts as solved, or a reward model's ceiling."""
        ceiling = (self.summary.get("eval_after") or {}).get("noise_ceiling")
        marks = {"solved": self.config.get("solved"), "gold reward on these labels": ceiling}
        for name, value in marks.items():
            if not math.isnan(number := finite(value)):
                return name, number
        return None

    @cached_property
    def timings(self) -> list[dict[str, Any]]:
        """The rows of timings.jsonl in order; empty if the file is missing."""
        return _rows_of(self.path / "timings.jsonl")

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations in order: `step`, and the metrics by their names without `eval_`."""
        rows = []
        for row in self.metrics:
            metrics = {
                name.removeprefix("eval_"): value
                for name, value in row.items()
                if name.startswith("eval_")
            }
            if metrics:
                rows.append({"step": row["step"], **metrics})
        return rows

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric is a finite number, and those numbers."""
        means = evaluations(self.metrics, name)
        return [mean.step for mean in means], [mean.value for mean in means]

    def completions(self, steps: int = 1, most: int | None = None) -> list[dict[str, Any]]:
        """Return rows of completions, each with its `step`: of the newest table, or of several steps.

        Args:
            steps: number of tables; the oldest and others evenly spread are added to the newest.
            most: most rows of each table, evenly spread over it, beside those whose tokens were kept; None for all.

        Raises:
            Refused: a table is damaged.
        """
        rows = []
        files = tables(self.path / "completions")
        last = len(files) - 1
        numbers = {last - round(i * last / max(1, steps - 1)) for i in range(steps) if files}
        for number in sorted(numbers):
            step = {"step": step_of(files[number])}
            table = read_completions(files[number])
            stride = max(1, math.ceil(len(table) / (most or math.inf)))
            for index, row in enumerate(table):
                if index % stride == 0 or row.get("tokens/text"):
                    rows.append(step | row)
        return rows

    def tokens(self, step: int | None = None, row: int = 0) -> pd.DataFrame:
        """Return what each token of a completion carried, a row for a token.

        Args:
            step: the step, of which `completions/` has a table; by default the newest.
            row: which of the completions of that table whose tokens were kept, in its order.

        Returns:
            The columns `text` and `special`, True on special tokens. Then, in nats, NaN on tokens that an
            environment wrote: `logprob` under the policy and its `entropy`. `weight` is the weight of the
            token's score in the gradient of the first update, in units of the advantage of a row. `reference` or
            `teacher` is the log-probability under that model, and `k1` is `logprob` minus it. With several
            updates a step, `ratio` is the probability at its last update over the one at sampling.

        Raises:
            Refused: nothing was kept of that step, or its table has fewer such completions.
        """
        files = {step_of(file): file for file in tables(self.path / "completions")}
        step = max(files, default=0) if step is None else step
        if step not in files:
            steps = ", ".join(map(str, files)) or "none"
            raise Refused(
                f"No completions of step {step} were kept (--log-completions); steps: {steps}."
            )
        token_tables = [*map(token_table, read_completions(files[step]))]
        frames = [frame for frame in token_tables if frame is not None]
        if not 0 <= row < len(frames):
            raise Refused(
                f"Step {step} has the tokens of {len(frames)} completions, from row 0; give one of them."
            )
        return frames[row]


def token_table(row: Row) -> pd.DataFrame | None:
    """Return the tokens of a row of completions, as `RecordedRun.tokens` does; None where they were not kept."""
    import pandas as pd

    beginning = "tokens/"
    columns = {
        name.removeprefix(beginning): values
        for name, values in row.items()
        if name.startswith(beginning) and values is not None
    }
    if not columns:
        return None
    kinds = {
        "text": object,
        "special": bool,
    }  # an episode that failed at once has no token to infer them from
    frame = pd.DataFrame(columns).astype({name: kinds.get(name, float) for name in columns})
    for name in ("reference", "teacher"):
        if name in frame:
            frame["k1"] = frame["logprob"] - frame[name]
    return frame


def read_run(run: str | os.PathLike[str]) -> RecordedRun:
    """Read the directory of a run, finished or not.

    Raises:
        Refused: the directory holds no metrics.jsonl, or a file of it is damaged.
    """
    path = Path(run)
    if not os.path.isfile(path / "metrics.jsonl"):
        if os.path.isfile(path / "plan.json"):
            raise Refused(f"{path} holds a comparison, not a run; its runs are in {path / 'runs'}.")
        raise Refused(f"{path} holds no metrics.jsonl; give the output directory of a run.")
    files = {}
    for name in ("config", "summary"):
        file = path / f"{name}.json"
        files[name] = read_config(file) if file.exists() else {}
    return RecordedRun(path=path, metrics=read_metrics(path / "metrics.jsonl"), **files)


def state_of(directory: Path, run: RecordedRun | None, printed: str) -> tuple[State, str]:
    """Return how a run stands, and in words why it has not finished.

    Args:
        directory: its directory.
        run: what its files say; None where it has written none.
        printed: what its process has printed.
    """
    summary = run.summary if run else {}
    if ended_by_itself(summary):
        return "finished", ""
    if in_use(directory):
        return "running", "It is under way."
    if summary.get("exit_reason") in SIGNALS.values():
        return "stopped", f"{summary['exit_reason']} stopped it; the same command goes on with it."
    if not (run or printed.strip()):
        return "absent", "It has not begun."
    error = summary.get("error") or " ".join(printed.strip()[-LOG_TAIL:].split())
    return "failed", str(error or "It was ended from outside, as for want of memory.")


def _rows_of(log: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl or timings.jsonl; none of a file that is missing."""
    return read_metrics(log) if log.exists() else []
