"""Writes and reads what a run records: metrics and times of each step as JSON lines, completions as parquet.

metrics.jsonl holds only numbers that the seed determines, so that two runs can be compared byte for byte.
Times, rates and memory go to timings.jsonl. Importing this module imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, Stopped, describe, read_file, refusing, suggest
from tokenrl.files import appending, flat, plain, replacing, write_text, writing
from tokenrl.runs.metric_table import Row, Rows
from tokenrl.settings import Settings

LOGS = ("metrics.jsonl", "timings.jsonl")
"""The files of a run to which each step appends a line."""


def append_rows(run: Path, step: int, metrics: Row, timings: Row | None = None) -> None:
    """Append a line to metrics.jsonl and to timings.jsonl: `step`, then the other keys in alphabetical order.

    Every line is strict JSON: NaN is written as null and an infinity as a string (see `files`).

    Args:
        run: the run directory.
        step: number of updates made so far; 0 is before training.
        metrics: a number for each name; a tensor of one element counts as a number.
        timings: seconds and rates of the same step; without them timings.jsonl gets no line.

    Raises:
        Stopped: the disk is full, or the directory is gone.
    """
    for name, row in zip(LOGS, (metrics, timings), strict=True):
        text = ""
        if row is not None:
            ordered = {"step": step, **dict(sorted(row.items()))}
            text = json.dumps(plain(ordered), allow_nan=False, ensure_ascii=False) + "\n"
        with writing(run / name), appending(run / name) as file:
            file.write(text.encode())


def replace_last_row(run: Path, row: Row) -> None:
    """Write a row, its `step` included, in place of the last line of metrics.jsonl.

    Raises:
        Stopped: the file could not be written.
    """
    path = run / LOGS[0]
    earlier = path.read_text("utf-8").rstrip("\n").rpartition("\n")
    write_text(path, "".join(earlier[:2]))
    append_rows(run, row["step"], row)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read metrics.jsonl or timings.jsonl, one dict per line. A last line that a crash cut short is left out.

    Args:
        path: the file.

    Raises:
        Refused: the file cannot be read, or a line before the last is damaged.
    """
    with refusing(f"The metrics {path} cannot be read", "Give the directory of a run."):
        lines = read_file(Path(path)).split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name, value in row.items():
                if value in ("Infinity", "-Infinity"):
                    row[name] = float(value)
            rows.append({**row, "step": int(row["step"])})
        except Exception as error:  # a damaged line raises many kinds of errors
            if number == len(lines):  # it has no newline: a crash cut it short
                continue
            raise Refused(
                f"Line {number} of {path} is damaged ({describe(error)}); remove it to read the others."
            ) from error
    return rows


def write_completions(folder: Path, step: int, rows: Rows) -> Path:
    """Write sample rows (prompt, completion, rewards, advantage, ...) to a file such as step_000100.parquet.

    A column of text, of numbers or of booleans keeps its type, and so does one of lists of these whose name begins
    with `tokens/`. Any other (chat messages, other lists, a mixture) is stored as JSON text. A key that a row
    lacks is null.

    Raises:
        Stopped: the disk is full, the folder cannot be written, or a value is none that a table can hold.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    fault = "The completions cannot be written as a table"
    # values may be nested without end, or have methods that fail
    with refusing(fault, "Give log_extra numbers and text.", Stopped):
        columns = {name: [row.get(name) for row in rows] for name in names}
        table = pyarrow.table(
            {
                name: pyarrow.array(cells) if name.startswith("tokens/") else _column(cells)
                for name, cells in columns.items()
            }
        )
    path = folder / f"step_{step:06d}.parquet"
    with writing(path):
        folder.mkdir(exist_ok=True)
    with replacing(path) as file:
        parquet.write_table(table, file, write_page_checksum=True)
    return path


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file that `write_completions` wrote.

    Raises:
        Refused: the file cannot be read, or it is no parquet file.
    """
    import pyarrow.parquet as parquet

    with refusing(f"{path} is damaged", "Remove it, and the rest can be shown."):
        return list(parquet.read_table(path, page_checksum_verification=True).to_pylist())


def _column(values: list[Any]) -> Any:
    """Make a column of one type, or else of JSON texts."""
    import pyarrow

    cells = [plain(value) for value in values]
    if not any(isinstance(cell, dict | list) for cell in cells):
        numbers = [
            value if isinstance(value, float) else cell
            for value, cell in zip(values, cells, strict=True)
        ]
        with suppress(pyarrow.ArrowException, OverflowError):
            return pyarrow.array(numbers)  # parquet has NaN
    return [None if cell is None else json.dumps(cell, ensure_ascii=False) for cell in cells]


def peak_memory() -> dict[str, float]:
    """Return the most memory that this process has held so far, in GiB, as far as the system tells it.

    Returns:
        `peak_memory_gib`, the resident set; where there is a GPU, `peak_cuda_memory_gib`, the tensors on it.
    """
    peaks = {}
    status = Path("/proc/self/status")  # `getrusage` would count the process that started this one
    if status.exists():
        kibibytes = re.search(r"VmHWM:\s*(\d+)", status.read_text())
        if kibibytes:
            peaks["peak_memory_gib"] = int(kibibytes[1]) / 2**20
    torch = sys.modules.get("torch")  # without it nothing is on a GPU
    if torch is not None and torch.cuda.is_available():
        peaks["peak_cuda_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks


_NAME_OF_RUN = {
    "clearml": "task_name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "trackio": "name",
    "wandb": "name",
}
"""The keyword by which a tracker takes the name of a run; the others have none."""


@dataclass(frozen=True)
class TrackerArguments(Settings, group="trackers"):
    """Where a run is recorded besides its own directory."""

    report_to: tuple[str, ...] = ()
    """Experiment trackers: tensorboard (into output_dir), wandb, trackio, mlflow and others that accelerate
    supports; all for those that are installed, none for none."""
    tracker_project: str | None = None
    """Project of the run in the trackers. Default: the tracker's own variable such as WANDB_PROJECT, else
    tokenrl."""
    run_name: str | None = None
    """Name of the run in the trackers. Default: the last part of output_dir."""


class Trackers:
    """The trackers of one run, which are those of accelerate; each is left out from its first error on."""

    def __init__(self, args: TrackerArguments, every: int, warn: Callable[[str], None]) -> None:
        """Look the trackers up; none is started yet.

        Args:
            args: which trackers there are, and what they call the run.
            every: steps between two records.
            warn: prints a warning.

        Raises:
            Refused: accelerate has no tracker of that name, or its package is not installed.
        """
        self._args = args
        self._warn = warn
        self._names = _installed(args.report_to)
        self._every = every
        self._started: dict[str, Any] = {}

    def start(self, config: Mapping[str, Any], output_dir: Path) -> None:
        """Start the trackers and send them the configuration, flattened to `estimator.baseline` and so on."""
        for name in self._names:
            with self._attempt(name):
                from accelerate import PartialState
                from accelerate.tracking import LOGGER_TYPE_TO_CLASS

                PartialState()  # the trackers ask it whether this is the main process
                kind = LOGGER_TYPE_TO_CLASS[name]
                variable = os.environ.get(f"{name.upper()}_PROJECT")
                project = self._args.tracker_project or variable or "tokenrl"
                if name == "tensorboard":  # it knows neither project nor name: a run is a folder
                    project = name
                folder = [str(output_dir)] if kind.requires_logging_directory else []
                names = {}
                if name in _NAME_OF_RUN:
                    names[_NAME_OF_RUN[name]] = self._args.run_name or output_dir.name
                tracker = self._started[name] = kind(project, *folder, **names)
                tracker.start()
                tracker.store_init_configuration(flat(config))

    def write(self, step: int, metrics: Row) -> None:
        """Send the finite numbers of a step, if it is due or has been evaluated."""
        if step % self._every and not any(name.startswith("eval_") for name in metrics):
            return
        values = plain(metrics)
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for name, tracker in list(self._started.items()) if numbers else []:
            with self._attempt(name):
                tracker.log(numbers, step=step)

    def close(self) -> None:
        """End the runs of the trackers; a second call does nothing."""
        for name in list(self._started):
            with self._attempt(name):
                self._started.pop(name).finish()

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Call a tracker; one that fails, for instance for want of a network, is told of and left out."""
        try:
            yield
        except (Exception, SystemExit) as error:  # a tracker must never end a run
            self._started.pop(name, None)
            self._warn(
                f"The tracker {name} failed ({describe(error)}) and gets nothing more. The run goes on, and "
                "its own files have everything."
            )


def _installed(names: tuple[str, ...]) -> list[str]:
    """Return the trackers to use, each once.

    Raises:
        Refused: there is no such tracker, or its package is not installed.
    """
    if names in ((), ("none",)):
        return []
    from accelerate.tracking import get_available_trackers

    installed = list(map(str, get_available_trackers()))
    if names == ("all",):
        return installed
    for name in names:
        if name not in installed:
            raise Refused(
                f"report_to was given as {name!r}; it must be all, none, or a tracker of accelerate whose package is "
                f"installed.{suggest(name, installed)}"
            )
    return list(dict.fromkeys(names))


def of_evaluation(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation by their names in metrics.jsonl."""
    return {f"eval_{name}": value for name, value in metrics.items()}
