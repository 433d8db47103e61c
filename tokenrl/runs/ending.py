"""Leaves in the run directory how a run ended: its model, summary and report, or why it failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenrl.errors import Stopped, describe
from tokenrl.runs.checkpoint import latest_checkpoint, replace_directory
from tokenrl.runs.console import Console
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.files import NotWritten
from tokenrl.runs.outcome import Outcome

Report = Callable[[Path], Path]
"""Writes the report of a run directory and returns its path."""


def write_result(
    directory: RunDirectory,
    ended: Outcome,
    write_model: Callable[[Path], None],
    write_report: Report,
    console: Console,
) -> None:
    """Save the model, write summary, plot and report, and print the result.

    Raises:
        Stopped: the model or the summary could not be written.
    """
    replace_directory(directory.model, write_model)
    summary = ended.summary()
    directory.write_summary(summary)
    try:
        where = f"report  {write_report(directory.path)}"
    except Exception as error:  # of a full disk or of matplotlib; a trained model is not lost over a picture
        where = ""
        console.warn(f"No report could be made: {error} For another attempt: tokenrl report {directory.path}")
    console.finish(summary)
    console.note(f"model   {directory.model}\n{where}".strip())


def reason(error: Exception) -> str:
    """Say why a run failed."""
    return str(error) if isinstance(error, Stopped) else describe(error)


def save_or_rescue(save: Callable[[], Path | None], rescue: Callable[[], str], error: Exception) -> str:
    """Save the state of a run that failed; say why it failed, and what has become of the state.

    Args:
        save: saves a checkpoint; None if there is no whole state.
        rescue: saves in another place what there is, and says where.
        error: why the run failed.
    """
    said = [reason(error)]
    try:
        lost = save() is None and isinstance(error, NotWritten)
    except Stopped as fault:
        lost = True
        said.append(str(fault))
    if lost:
        said.append(rescue())
    return " ".join(dict.fromkeys(filter(None, said)))


def write_failure(
    directory: RunDirectory, ended: Outcome, flags: Sequence[str], said: str, write_report: Report
) -> str:
    """Write summary and report of a run that failed, as far as that is possible; return what is left of it.

    Args:
        directory: the run directory, which may be gone or on a full disk.
        ended: the result of the run.
        flags: warnings about the outcome.
        said: why the run failed.
        write_report: writes the report; some reports need a finished run.
    """
    with contextlib.suppress(Exception):
        directory.write_summary(ended.summary() | {"flags": flags, "error": said})
        write_report(directory.path)
    path = latest_checkpoint(directory.checkpoints).path
    if path is None:
        return "The run directory holds no checkpoint."
    return f"The last complete checkpoint is {path}; --resume auto continues from it."
