"""Keeps one run of a training: directory, header, log, checkpoints, signals, failure, summary, report.

All trainings use it: of a policy, an agent, a reward model, and the supervised warm start. Each training
writes its own loop and asks the session what is due::

    with Session("train", args.output_dir, overwrite=args.overwrite) as session:
        ...                                     # load and prepare; an error here is a refusal
        session.open("tokenrl train", facts)    # from here on a signal lets the step end and saves
        session.evaluated(evaluate())           # before the first step
        session.begin(args, names={})           # from here on the directory holds this run
        for step in session.steps(args.max_steps):
            metrics = update()
            if session.due(args.eval_every):
                metrics |= session.evaluated(evaluate())
            session.record(metrics)
            if session.due(args.save_every, at_the_end=False):
                session.save(write_weights, keep=2)
        session.finish(Outcome(**session.outcome("finished")), write_model)

Before `begin`, every error that a user can mend is raised as `Refused`. After it, the error is raised as
`Stopped`: summary.json says why the run failed, and the message names the last complete checkpoint.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, Stopped
from tokenrl.runs.checkpoint import Resumable, latest_checkpoint, replace_directory, save_checkpoint
from tokenrl.runs.console import Console, Progress
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.files import write_json
from tokenrl.runs.metrics import MetricsLog
from tokenrl.runs.origin import Origin
from tokenrl.runs.outcome import Outcome
from tokenrl.runs.quiet import without_warnings
from tokenrl.runs.report import report_from_directory
from tokenrl.runs.signals import SIGNALS, GracefulStop
from tokenrl.runs.timings import peak_memory
from tokenrl.runs.trackers import TrackerArguments, Trackers


class Session:
    """One run of a training, as a context manager. Only the main process writes files and prints.

    Attributes:
        kind: the command that runs, as in config.json: train, control, reward-model or sft.
        console: prints for people.
        directory: the run directory; None on every process but the main one.
        stop: catches the signals that ask the run to stop.
        step: number of the current step, from 1; 0 before the first.
        origin: how the run was started; known from `begin` on.
    """

    origin: Origin

    def __init__(
        self,
        kind: str,
        output_dir: str | Path,
        *,
        overwrite: bool = False,
        quiet: bool = False,
        every: int = 10,
        main: bool = True,
        agreed: Callable[[int], int] = lambda number: number,
        report: Callable[[Path], Path] = report_from_directory,
        tracking: TrackerArguments | None = None,
    ) -> None:
        """Make and lock the directory. A run that it already holds stays untouched until `begin`.

        Args:
            kind: the command that runs.
            output_dir: the run directory.
            overwrite: replace the run that the directory already holds.
            quiet: print nothing, and hide the warnings of libraries.
            every: steps between two printed lines where the output is no terminal.
            main: whether this is the main process.
            agreed: returns the largest of the numbers that all processes pass to it, so that all of them stop
                at the same step.
            report: writes the report of a run directory and returns its path.
            tracking: the experiment trackers that the run is recorded by too.

        Raises:
            Refused: the directory (see `RunDirectory.create`) or a tracker cannot be used.
        """
        self.kind, self.output_dir, self.step = kind, Path(output_dir), 0
        self.flags: list[str] = []  # warnings about the outcome
        quiet = quiet or not main
        self.console, self._warnings = Console(quiet=quiet, every=every), without_warnings(quiet)
        self._trackers = Trackers(tracking or TrackerArguments(), self.console.warn)
        self.directory = RunDirectory.create(output_dir, overwrite=overwrite) if main else None
        self.stop = GracefulStop(quiet=quiet)
        self._agreed, self._report = agreed, report
        self._parts: dict[str, Resumable] = {}
        self._logs: list[MetricsLog | Trackers] = []
        self._progress: Progress | None = None
        self._begun, self._began, self._total = False, time.monotonic(), 0
        self._evaluations: dict[int, dict[str, float]] = {}  # metrics by step
        self._recorded = 0  # the last step in the logs
        self._warned: set[str] = set()
        self._told: int | None = None  # the exit code in the outcome

    def __enter__(self) -> Session:
        self._warnings.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Close the run. If a `Stopped` ended it, record the failure in summary.json and raise it again.

        Raises:
            Refused: a `Stopped` came before `begin`, so that nothing has been lost.
            Stopped: a `Stopped` came after `begin`; the message adds the step and the last checkpoint.
        """
        try:
            self._close_progress()  # still shown if an error has left the loop
            if isinstance(error, Stopped) and not self._begun:
                raise Refused(f"Before the first step: {error}") from error
            if isinstance(error, Stopped):
                raise self._failed(error) from error
        finally:
            self._warnings.__exit__(None, None, None)
            self.stop.__exit__()
            if self.directory is not None:
                self.directory.release()
            for log in self._logs:  # last, since a tracker may be slow to end
                log.close()
        if error is None and self._told == 0:  # a signal after the outcome, as during the report, is not lost
            self.stop.pass_on()

    def open(self, title: str, facts: Mapping[str, Any], **options: Any) -> None:
        """Print the header (see `Console.start`), start the clock, and from here on catch signals."""
        self.stop.__enter__()
        self.console.start(title, facts, **options)
        self._began = time.monotonic()

    def begin(self, args: Any, *, names: Mapping[str, str | None], **facts: Any) -> None:
        """Remove the run that the directory held, and write config.json and the evaluation of step 0.

        Args:
            args: the settings, a dataclass.
            names: by field, the text that stands in config.json for an object given from Python.
            **facts: further entries of config.json that the report needs, such as the title.
        """
        self._begun = True
        self.origin = Origin.of(self.kind, args, names, self.output_dir / "config.json")
        if self.directory is None:
            return
        config = {**self.origin.settings, **facts, "kind": self.kind, "command": self.origin.command}
        self.directory.write_config(config)
        self._trackers.start(config, self.output_dir)
        self._logs = [MetricsLog(self.directory.metrics, self.directory.timings), self._trackers]
        for log in self._logs:
            log.write(0, _named(self.eval_before))

    def steps(self, total: int) -> Iterator[int]:
        """Yield the numbers of the steps, 1 to `total`; end early once any process is asked to stop."""
        self._total = total
        self._progress = self.console.progress(total).__enter__()
        try:
            while self.step < total and not self._asked_to_stop():
                self.step += 1
                yield self.step
        finally:
            self._close_progress()

    def due(self, every: int, *, at_the_end: bool = True) -> bool:
        """Return whether something is due now: every `every` steps (0: never), and in the last step."""
        last = at_the_end and self.step == self._total
        return last or bool(every and self.step % every == 0)

    def evaluated(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Record the evaluation of this step; return its metrics under their names in metrics.jsonl."""
        self._evaluations[self.step] = dict(metrics)
        if self.step == self._recorded:  # after the last step, whose line is already written
            self._trackers.write(self.step, _named(metrics))
        return _named(metrics)

    @property
    def eval_before(self) -> dict[str, float]:
        """The metrics of the evaluation before training; empty if there was none."""
        return self._evaluations.get(0, {})

    @property
    def is_evaluated(self) -> bool:
        """Whether the current step has been evaluated."""
        return self.step in self._evaluations

    @property
    def owes_evaluation(self) -> bool:
        """Whether the run ended by itself, not by a signal, and its last step has not been evaluated."""
        return not self.is_evaluated and not self.stop.requested

    def record(self, metrics: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Write metrics of this step to metrics.jsonl, timings to timings.jsonl, and show and track both."""
        timings = {**(timings or {}), **peak_memory()}
        for log in self._logs:
            log.write(self.step, metrics, timings)
        self._recorded = self.step
        if self._progress is not None:
            self._progress.update(self.step, {**metrics, **timings})

    def warn_once(self, topic: str, message: str) -> None:
        """Print a warning the first time that its topic comes up, and never again."""
        if topic not in self._warned:
            self._warned.add(topic)
            self.console.warn(message)

    def register(self, **parts: Resumable) -> None:
        """Register the parts that have a state; every checkpoint holds the state of each of them."""
        self._parts |= parts

    def save(self, write: Callable[[Path], None], *, keep: int | None) -> None:
        """Save a checkpoint of this step.

        Args:
            write: writes the weights into the empty folder that it is given; the states of the registered
                parts go beside them, into trainer_state.json.
            keep: how many checkpoints to keep, with this one; None keeps all.

        Raises:
            Stopped: the checkpoint could not be saved; older checkpoints are unchanged.
        """
        if self.directory is None:
            return
        state = {"step": self.step, **{name: part.state_dict() for name, part in self._parts.items()}}

        def fill(folder: Path) -> None:
            write(folder)
            write_json(folder / "trainer_state.json", state)

        save_checkpoint(self.directory.checkpoints, self.step, fill, keep=keep)

    def outcome(self, reason: str) -> dict[str, Any]:
        """Make the fields of `Outcome`. If a signal ended the run, its name replaces `reason`."""
        code = self._told = self.stop.exit_code
        return {
            "output_dir": self.output_dir,
            "exit_reason": SIGNALS.get(code, reason),
            "exit_code": code,
            "steps": self.step,
            "eval_before": self.eval_before,
            "eval_after": self._evaluations.get(self.step, {}),
            "wall_seconds": time.monotonic() - self._began,
        }

    def finish(self, ended: Outcome, write_model: Callable[[Path], None]) -> None:
        """Save the model, write summary, plot and report, and print the result.

        Args:
            ended: the result of the run.
            write_model: writes the model into the empty folder that it is given, which then becomes `model/`.
        """
        if self.directory is None:
            return
        self._close_progress()
        replace_directory(self.directory.model, write_model)
        summary = ended.summary()
        self.directory.write_summary(summary)
        report = self._report(self.directory.path)
        self.console.finish(summary)
        self.console.note(f"model   {self.directory.model}\nreport  {report}")

    def _asked_to_stop(self) -> bool:
        """Return whether any process was asked to stop. All must agree, or some would wait for the others."""
        asked = self._agreed(self.stop.requested or 0)
        if asked:  # otherwise a signal that came in between would be overwritten
            self.stop.requested = asked
        return bool(asked)

    def _close_progress(self) -> None:
        progress, self._progress = self._progress, None  # closed once: closing prints a line
        if progress is not None:
            progress.__exit__()

    def _failed(self, error: Stopped) -> Stopped:
        """Write summary and report of a run that failed; return the error with step and last checkpoint."""
        if self.directory is None:
            return error
        steps = max(0, self.step - 1)  # the current step is lost
        found = self.outcome("failed") | {"exit_reason": "failed", "steps": steps, "eval_after": None}
        self.directory.write_summary(Outcome(**found).summary() | {"flags": self.flags, "error": str(error)})
        with contextlib.suppress(Refused):  # some reports need a finished run
            self._report(self.directory.path)
        last = latest_checkpoint(self.directory.checkpoints).path
        kept = f"The last complete checkpoint is {last}." if last else "No checkpoint had been saved."
        return Stopped(f"At step {self.step}: {error} {kept}")


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {"eval_" + name: value for name, value in metrics.items()}
