"""Writes and reads what a run records: metrics and times of each step as JSON lines, completions as parquet.

metrics.jsonl holds only numbers that the seed determines, so that two runs can be compared byte for byte.
Times, rates and memory go to timings.jsonl. Importing this module imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, describe
from tokenrl.runs.files import not_written, plain, replacing

_GIB = 1024**3


class MetricsLog:
    """Appends one line per step to metrics.jsonl and to timings.jsonl, and gives each to the system at once.

    Every line is strict JSON: NaN is written as null and an infinity as a string (see `runs.files`).
    """

    def __init__(self, run: Path) -> None:
        """Open both files in a run directory for appending.

        Raises:
            Stopped: a file cannot be written.
        """
        self._files = {}
        for path in (run / "metrics.jsonl", run / "timings.jsonl"):
            with _told(path):
                self._files[path] = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Append a line to each file: `step` first, then the other keys in alphabetical order.

        Args:
            step: number of updates made so far; 0 is before training.
            metrics: a number for each name; a tensor of one element counts as a number.
            timings: seconds and rates of the same step; without them timings.jsonl gets no line.

        Raises:
            Stopped: the disk is full.
        """
        for (path, file), row in zip(self._files.items(), (metrics, timings), strict=True):
            if row is None:
                continue
            rest = line_of({"step": int(step), **dict(sorted(row.items()))}).encode()
            with _told(path):
                while rest:  # what does not fit on the disk any more is left over
                    rest = rest[file.write(rest) :]

    def sync(self) -> None:
        """Flush both files to the disk, so that a checkpoint never has more steps than they have.

        Raises:
            Stopped: the disk is full.
        """
        for path, file in self._files.items():
            with _told(path):
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close both files."""
        for file in self._files.values():
            file.close()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


def line_of(row: Mapping[str, Any]) -> str:
    """Return the line of a file that holds this row of numbers, which `read_metrics` reads back."""
    return json.dumps(plain(row), allow_nan=False, ensure_ascii=False) + "\n"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read metrics.jsonl or timings.jsonl, one dict per line. A last line that a crash cut short is left out.

    Raises:
        Refused: the file cannot be read, or a line before the last is damaged.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise Refused(f"The metrics {path} cannot be read ({error}); give the directory of a run.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            infinite = {name: float(x) for name, x in row.items() if x in ("Infinity", "-Infinity")}
            rows.append({**row, **infinite, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if number == len(lines):  # it has no newline: a crash cut it short
                break
            fault = f"Line {number} of {path} is damaged ({describe(error)})"
            raise Refused(f"{fault}; remove it to read the others.") from error
    return rows


def write_completions(folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write sample rows (prompt, completion, rewards, advantage, ...) to a file such as step_000100.parquet.

    A column of text, of numbers or of booleans keeps its type. Any other (chat messages, lists, a mixture)
    is stored as JSON text. A key that a row lacks is null.

    Raises:
        Stopped: the disk is full or the folder cannot be written.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: _column([row.get(name) for row in rows]) for name in names})
    path = folder / f"step_{step:06d}.parquet"
    with replacing(path) as partial:
        folder.mkdir(exist_ok=True)
        parquet.write_table(table, partial)
    return path


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file that `write_completions` wrote.

    Raises:
        Refused: the file cannot be read, or it is no parquet file.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise Refused(f"{path} is damaged ({error}). Remove it, and the rest can be shown.") from error
    return rows


def _column(values: list[Any]) -> Any:
    """Make a column of one type, or else of JSON texts."""
    import pyarrow

    cells = [value if isinstance(value, float) else plain(value) for value in values]  # parquet has NaN
    if not any(isinstance(cell, dict | list) for cell in cells):
        with suppress(pyarrow.ArrowException, OverflowError):
            return pyarrow.array(cells)
    return [None if cell is None else json.dumps(plain(cell), ensure_ascii=False) for cell in cells]


def peak_memory() -> dict[str, float]:
    """Return the most memory that this process has held so far, in GiB, as far as the system tells it.

    Returns:
        `peak_memory_gib`, the resident set; where there is a GPU, `peak_cuda_memory_gib`, the tensors on it.
    """
    status = Path("/proc/self/status")  # `getrusage` would also count the process that started this one
    held = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    found = {"peak_memory_gib": int(held[1]) * 1024 / _GIB} if held else {}
    torch = sys.modules.get("torch")  # without it nothing is on a GPU
    if torch is not None and torch.cuda.is_available():
        found["peak_cuda_memory_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return found
