"""Sends what a run records to experiment trackers, through accelerate's classes for them. Imports no torch.

A tracker never decides about a run: one that raises is told of in a warning, and gets nothing more. One that
never returns holds the run up, because a call in this process cannot be given up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, describe
from tokenrl.runs.files import flat, plain
from tokenrl.settings import Settings, check_choice

_NAME_OF_RUN = {"clearml": "task_name", "mlflow": "run_name", "swanlab": "experiment_name"}
_NAME_OF_RUN |= {"trackio": "name", "wandb": "name"}
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
    """The trackers of one run; each of them is left out from its first error on."""

    def __init__(self, args: TrackerArguments, warn: Callable[[str], None]) -> None:
        """Look the trackers up; none is started yet.

        Args:
            args: the settings; a `logging_steps` among them is the number of steps between two records.
            warn: prints a warning.

        Raises:
            Refused: accelerate has no tracker of that name, or its package is not installed.
        """
        self._args, self._warn = args, warn
        self._names = _installed(args.report_to)
        self._every = getattr(args, "logging_steps", 1)
        self._started: dict[str, Any] = {}

    def start(self, config: Mapping[str, Any], output_dir: Path) -> None:
        """Start the trackers and send them the configuration, flattened to `estimator.baseline` and so on."""
        for name in self._names:
            with self._attempt(name, "at its start"):
                self._start(name, flat(config), output_dir)

    def _start(self, name: str, config: dict[str, Any], output_dir: Path) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers ask it whether this is the main process
        kind, args = LOGGER_TYPE_TO_CLASS[name], self._args
        project = args.tracker_project or os.environ.get(f"{name.upper()}_PROJECT") or "tokenrl"
        if name == "tensorboard":  # it knows neither project nor name: a run is a folder
            project = name
        folder = [str(output_dir)] if kind.requires_logging_directory else []
        named = {_NAME_OF_RUN[name]: args.run_name or output_dir.name} if name in _NAME_OF_RUN else {}
        tracker = self._started[name] = kind(project, *folder, **named)
        tracker.start()
        tracker.store_init_configuration(config)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the finite numbers of a step, if it is due or has been evaluated."""
        if step % self._every and not any(name.startswith("eval_") for name in metrics):
            return
        numbers = {key: value for key, value in plain(metrics).items() if isinstance(value, int | float)}
        for name, tracker in list(self._started.items()) if numbers else ():
            with self._attempt(name, f"at step {step}"):
                tracker.log(numbers, step=step)

    def close(self) -> None:
        """End the runs of the trackers; a second call does nothing."""
        for name in list(self._started):
            with self._attempt(name, "at its end"):
                self._started.pop(name).finish()

    @contextlib.contextmanager
    def _attempt(self, name: str, when: str) -> Iterator[None]:
        """Call a tracker; one that fails, for instance for want of a network, is told of and left out."""
        try:
            yield
        except (Exception, SystemExit) as error:  # a run is not lost over its picture
            said = f"The tracker {name} failed {when} ({describe(error)}) and gets nothing more."
            self._warn(f"{said} The run goes on, and its own files have everything.")
            with contextlib.suppress(Exception, SystemExit):
                self._started.pop(name).finish()  # keep what it has already got


def _installed(names: tuple[str, ...]) -> list[str]:
    """Return the trackers to use, each once.

    Raises:
        Refused: there is no such tracker, or its package is not installed.
    """
    if names in ((), ("none",)):
        return []
    if "none" in names:
        raise Refused(f"report_to was given as {' '.join(names)}; none stands alone, or is left out.")
    from accelerate import utils
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS as KNOWN

    there = [name for name in KNOWN if getattr(utils, f"is_{name}_available", lambda: True)()]
    for name in names:
        check_choice("report_to", name, (*sorted(KNOWN), "all", "none"))
        if name in KNOWN and name not in there:
            mend = f"pip install {name.replace('_', '-')}, or leave report_to out"
            raise Refused(f"report_to was given as {name!r}, but that tracker is not installed: {mend}.")
    return there if "all" in names else list(dict.fromkeys(names))
