"""A run on disk and on screen: directory, session, metrics, checkpoints, signals, console, plots, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.names import lazily

if TYPE_CHECKING:
    from tokenrl.runs.files import write_json as write_json
    from tokenrl.runs.metrics import read_completions as read_completions, read_metrics as read_metrics
    from tokenrl.runs.outcome import Outcome as Outcome
    from tokenrl.runs.plots import learning_curve as learning_curve, smooth as smooth
    from tokenrl.runs.report import report_from_directory as report_from_directory
    from tokenrl.runs.session import Session as Session

PUBLIC = {
    "tokenrl.runs.files": ("write_json",),
    "tokenrl.runs.metrics": ("read_completions", "read_metrics"),
    "tokenrl.runs.outcome": ("Outcome",),
    "tokenrl.runs.plots": ("learning_curve", "smooth"),
    "tokenrl.runs.report": ("report_from_directory",),
    "tokenrl.runs.session": ("Session",),
}
__getattr__, __dir__ = lazily(__name__, PUBLIC)
