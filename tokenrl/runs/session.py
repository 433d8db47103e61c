"""Keeps one run of a training: directory, header, log, checkpoints, signals, failure, summary, report.

All trainings use it: of a policy, an agent, a reward model, and the supervised warm start. Each training
writes its own loop and asks the session what is due::

    with Session("train", args) as session:
        session.console.start("tokenrl train", facts)  # the header: what is known before the model is loaded
        session.keep(model, provenance, run=run)     # what checkpoints hold
        session.open(more_facts)                # from here on a signal lets the step end and saves
        if not session.continues:
            session.evaluated(evaluate())       # before the first step
        session.begin(args, names={})           # from here on the directory holds this run
        for step in session.steps(args.max_steps):
            metrics = session.timed(update)
            if session.due(args.eval_every):
                metrics |= session.evaluated(evaluate())
            session.record(metrics)
        session.finish(Outcome(**session.outcome("finished")), write_model)

Checkpoints are saved between two steps and at the end; a step that fails saves nothing. What a user can mend
is `Refused` before `begin`, and `Stopped` after it: summary.json says why, the message names a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.configuration import signatures
from tokenrl.errors import (
    USER_CODE_FAILED,
    Lost,
    Refused,
    Silent,
    Stopped,
    describe,
    explain,
    leave,
)
from tokenrl.runs.best import kept_weights
from tokenrl.runs.checkpoint import Model, Resumable, Saver
from tokenrl.runs.console import Console, Progress, TimeLeft, next_commands
from tokenrl.runs.directory import numbered, remove_run_files
from tokenrl.runs.files import atomic_directory, plain, write_json
from tokenrl.runs.metrics import MetricsLog, Trackers, of_evaluation, peak_memory, read_metrics
from tokenrl.runs.origin import Origin, typed_command, versions
from tokenrl.runs.output import without_warnings
from tokenrl.runs.reader import Outcome
from tokenrl.runs.report import report_from_directory
from tokenrl.runs.resume import (
    Agreed,
    Provenance,
    check_processes,
    claim,
    cut_back,
    how_to_continue,
    together,
)
from tokenrl.runs.signals import SIGNALS, GracefulStop

T = TypeVar("T")
Names = Mapping[str, str | None]
_KEPT = ("eval_before", "_evaluated", "_told", "flags", "ended", "training_seconds")
"""The fields of a `Session` that a continuation goes on from."""


class Session:
    """One run of a training, as a context manager. Only the main process writes files and prints.

    Attributes:
        kind: the command that runs, as in config.json: train, control, reward-model or sft.
        args: its settings; until `begin` the arguments that are known so far.
        directory, output_dir: the run directory as it was named or numbered, and as an absolute path.
        console, saver, stop: print for people, hold the checkpoints, and catch the signals that end the run.
        continues: whether the run goes on from a checkpoint.
        origin: how the run was started; known from `begin` on.
        step: number of the current step, from 1; 0 before the first.
        rows: the rows of metrics.jsonl up to the current step.
        eval_before: the metrics of the evaluation before training; empty if there was none.
        step_seconds, training_seconds: seconds of the last update, and of all updates.
        flags: warnings about the outcome.
        ended: why the run ended by itself before its last step; None if it did not.
    """

    def __init__(
        self, kind: str, args: Any, *, every: int = 10, main: bool = True, agreed: Agreed = list
    ) -> None:
        """Make and lock the directory. A run that it already holds stays untouched until `begin`.

        Args:
            kind: the command that runs.
            args: its settings; None as `output_dir` takes the next of the numbered directories.
            every: steps between two printed lines where the output is no terminal.
            main: whether this is the main process; an attribute too.
            agreed: returns the largest of each of the numbers that all processes pass; an attribute too.

        Raises:
            Refused: the directory, the checkpoint to continue from, or a tracker cannot be used.
        """
        self.kind, self.main, self._quiet, self.agreed = kind, main, args.quiet or not main, agreed
        self._owner, self.console = os.getpid(), Console(quiet=self._quiet, every=every)
        self._trackers = Trackers(args, self.console.warn)
        claimed = together(main, agreed, partial(claim, kind, args, main=main))
        self._directory, self._skipped, *numbers = claimed
        number, step = agreed(numbers)
        self.directory = str(numbered(kind, number) if args.output_dir is None else args.output_dir)
        self.args, self.output_dir = args, Path(self.directory).absolute()
        self._continued = self.output_dir / "checkpoints" / f"step_{step:06d}" if step else None
        self.continues = self._continued is not None
        self.stop = GracefulStop(quiet=self._quiet)
        self.saver = Saver(self.output_dir / "checkpoints", args, active=main)
        self._provenance = Provenance()
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        self._atexit = contextlib.ExitStack()
        self.step = self._recorded = self._total = (
            0  # the current step, the last in the log, that of the end
        )
        self.rows: list[dict[str, Any]] = []
        self.flags, self._told = list[str](), dict[str, str]()  # warnings by their topic
        self.ended: str | None = None
        self._spent: Callable[[], bool] = bool
        self._begun = False
        self._exit_code: int | None = None  # the one in the outcome
        self.eval_before: dict[str, float] = {}
        self._evaluated: tuple[int, dict[str, float]] = (
            -1,
            {},
        )  # the last evaluation, with its step
        self.step_seconds = self.training_seconds = 0.0
        self._began, self._seconds = time.monotonic(), 0.0  # seconds before the run was continued

    def compare(self, values: Mapping[str, Any]) -> None:
        """Refuse values by name, such as settings, in which the processes of this run differ."""
        together(self.main, self.agreed, partial(check_processes, values, self.agreed))

    def __enter__(self) -> Session:
        self._atexit.callback(self._trackers.close)  # last, since a tracker may be slow to end
        if self._directory is not None:
            self._atexit.callback(self._directory.release)
        self._atexit.enter_context(without_warnings(self._quiet))
        return self

    def __exit__(self, _: Any, error: BaseException | None, traceback: Any) -> None:
        """Close the run. If an error ended it, save its state, record the failure, and raise it again.

        Raises:
            Refused: a `Stopped` or `sys.exit` came before `begin`, so that nothing has been lost.
            Stopped: one of them came after `begin`; the message adds the step and the last checkpoint.
        """
        leave(self._owner)
        with self._atexit:
            if self._progress is not None:
                self._progress.__exit__()  # the live line is still shown if an error has left the loop
            stopped = error if isinstance(error, Stopped) else explain(error) if error else None
            if stopped is not None and not self._begun:
                kind = Silent if isinstance(stopped, Lost) and not self.main else Refused
                raise kind(f"Before the first step: {stopped}") from error
            stopped = Stopped(str(error)) if isinstance(error, Refused) else stopped
            if isinstance(error, USER_CODE_FAILED) and self._begun:
                failed = self._failed(stopped or error)
                if stopped is not None:
                    raise failed from error
                self.console.warn(str(failed))  # and the error itself goes on, with its traceback
        if error is None and self._exit_code == 0 and not typed_command():
            self.stop.pass_on()  # a signal after the outcome is not lost; a command ends anyway

    def keep(self, model: Model, provenance: Provenance, **parts: Resumable) -> None:
        """Register what checkpoints hold, and refuse what could not be read again (see `Saver.check`)."""
        self._provenance = provenance
        self.saver.keep(model, {"maker": provenance, "session": self, **parts})
        self.saver.check(parts, self.agreed)

    def open(self, facts: Mapping[str, Any]) -> None:
        """Print the rest of the header, and catch signals from here on."""
        self._atexit.enter_context(self.stop)
        self.console.facts("", facts)

    def begin(
        self, args: Any, *, names: Names, spent: Callable[[], bool] = bool, **facts: Any
    ) -> None:
        """Write config.json and the evaluation of step 0, or continue from the checkpoint that was found.

        A run that the directory held and that is not continued is removed.

        Args:
            args: the settings, a dataclass, complete and with the directory in `output_dir`.
            names: by field, the text that stands in config.json for an object given from Python.
            spent: returns whether another budget than the steps is used up, so that this step is the last.
            **facts: further entries of config.json that the report needs, such as the title.

        Raises:
            Refused: the checkpoint is of other settings, data or models, or another process of this run is.
        """
        self.args, self._spent = args, spent
        self.origin = Origin.of(self.kind, args, names, self.output_dir / "config.json")
        settings = {**self.origin.settings, "kind": self.kind}
        self._provenance.settings = settings
        self.compare({**settings, **self._provenance.fingerprints})
        self.rows = [{"step": 0, **of_evaluation(self.eval_before)}]
        if self._continued is not None:
            self._continue(self._continued)
        self._begun = True
        if not self.main:
            return
        if not self.continues:
            remove_run_files(self.output_dir)
        config = {
            **settings,
            **facts,
            "command": self.origin.command,
            "code": signatures(plain(settings)),
        }
        write_json(self.output_dir / "config.json", {"versions": versions(), **config})
        if self.step >= args.max_steps or self._over():
            self.console.note("Nothing is left to do: the run had ended.")
            return
        self._trackers.start(config, self.output_dir)
        self._log = MetricsLog(self.output_dir)
        self._atexit.callback(self._log.close)
        if self.step == 0:
            self.record(of_evaluation(self.eval_before))

    def _continue(self, path: Path) -> None:
        """Restore the state of a checkpoint, and remove what the run wrote after it."""
        self.step = self._recorded = self.saver.restore(path, self.console.warn)
        if self.main:
            cut_back(self.output_dir, self.step)
        self.rows = [
            r for r in read_metrics(self.output_dir / "metrics.jsonl") if r["step"] <= self.step
        ]
        for fault in self._skipped:
            self.console.warn(f"skipped: {fault}")
        self.console.note(f"The run continues after step {self.step}, from {path}")
        if causes := "; ".join(self._provenance.inexact):
            self.console.warn(f"The continuation may not be bit-exact: {causes}.")

    def steps(self, total: int, seconds_left: TimeLeft | None = None) -> Iterator[int]:
        """Yield the steps that are left (see `Progress` for `seconds_left`); end early if asked to stop."""
        self._total, self._progress = total, Progress(self.console, total, self.step, seconds_left)
        with self._progress:
            while self.step < total and not (self._over() or self._asked()):
                self.step += 1
                yield self.step

    def _over(self) -> bool:
        """Return whether the run has ended by itself, whatever the number of its steps."""
        return self._spent() or self.ended is not None or self.saver.best.exhausted

    def _asked(self) -> bool:
        """Save if it is time; return whether any process was asked to stop: all agree, or some would wait."""
        signal, save = self.agreed([self.stop.requested or 0, int(self.saver.due(self.step))])
        if save:
            self.save()
        self.stop.requested = signal or self.stop.requested  # or one that came in between
        return bool(signal)

    def due(self, every: int) -> bool:
        """Return whether something is due now: every `every` steps (0: never), and in the last step."""
        return self.step == self._total or self._spent() or bool(every and self.step % every == 0)

    def evaluated(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Record the evaluation of this step; return its metrics under their names in metrics.jsonl."""
        self._evaluated = self.step, dict(metrics)
        self.saver.best.judge(self.step, metrics)
        if self.step == 0:
            self.eval_before = dict(metrics)
        if self.step == self._recorded:  # after the last step, whose line is already written
            self._trackers.write(self.step, of_evaluation(metrics))
        return of_evaluation(metrics)

    def timed(self, update: Callable[[], T]) -> T:
        """Make an update and return what it returns; its seconds count, those of evaluations do not."""
        began = time.perf_counter()
        result = update()
        self.step_seconds = time.perf_counter() - began
        self.training_seconds += self.step_seconds
        return result

    def rate(self, count: float) -> float:
        """Return how many things a second that is, if all updates so far have processed `count` of them."""
        return count / max(self.training_seconds, 1e-9)

    @property
    def is_evaluated(self) -> bool:
        """Whether the current step has been evaluated."""
        return self._evaluated[0] == self.step

    @property
    def evaluation(self) -> dict[str, float]:
        """The metrics of the latest evaluation."""
        return self._evaluated[1]

    @property
    def owes_evaluation(self) -> bool:
        """Whether the run ended by itself, not by a signal, and its last step has not been evaluated."""
        return not self.is_evaluated and not self.stop.requested

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken, without those between its end and its continuation."""
        return self._seconds + time.monotonic() - self._began

    def record(self, metrics: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Write metrics of this step to metrics.jsonl, timings to timings.jsonl, and show and track both."""
        timings = {"step_seconds": self.step_seconds, **(timings or {}), **peak_memory()}
        both = {**metrics, **timings} if self.step else metrics
        if self._log is not None:
            self._log.write(self.step, metrics, timings if self.step else None)
            self._trackers.write(self.step, both)
        if self.step:
            self.rows.append({"step": self.step, **metrics})
        self._recorded = self.step
        if self._progress is not None:
            self._progress.update(self.step, both)

    def warn_once(self, topic: str, message: str) -> None:
        """Print a warning the first time that its topic comes up, and never again."""
        if topic not in self._told:
            self._told[topic] = message
            self.console.warn(message)

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation must know."""
        return {name: getattr(self, name) for name in _KEPT} | {"wall_seconds": self.wall_seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for name in _KEPT:
            setattr(self, name, state.get(name, getattr(self, name)))
        self._seconds = state["wall_seconds"]
        self.console.warnings += self._told.values()

    def outcome(self, reason: str) -> dict[str, Any]:
        """Make the fields of `Outcome`. If a signal ended the run, its name replaces `reason`."""
        code = self._exit_code = self.stop.exit_code
        if reason == "finished" and self.step < self._total and self.saver.best.exhausted:
            reason = "no-improvement"
        goes_on = (
            code or self._spent() or reason == "callback"
        )  # a budget may grow in a continuation
        if self.step < self._total and not goes_on:
            self.ended = reason
        return {
            "output_dir": self.output_dir,
            "exit_reason": SIGNALS.get(code, reason),
            "exit_code": code,
            "steps": self.step,
            "eval_before": self.eval_before,
            "eval_after": self._evaluated[1] if self.is_evaluated else {},
            "wall_seconds": self.wall_seconds,
            "best": self.saver.whole_best(self.step, self.console.warn),
        }

    def finish(
        self, ended: Outcome, write: Callable[[Path], None], warnings: Iterable[str] = ()
    ) -> None:
        """Save a checkpoint and the model, write summary, plot and report, and print the result.

        `write` fills the empty folder that becomes `model/`, from here on with the weights of the best
        evaluation, if these are to be kept; `warnings` come after the result.

        Raises:
            Stopped: the weights are not finite, the best ones are lost, or the model could not be written.
        """
        try:
            self.save()
        except Stopped as error:  # of a full disk: the model is smaller
            self.console.warn(str(error))
        self.saver.read_best(self.step)
        if not self.main:
            return
        self.saver.check_finite(self.step)
        with atomic_directory(self.output_dir / "model") as folder:
            write(folder)
        summary = ended.summary() | {
            "warnings": [*self.console.warnings, *(texts := list(warnings))]
        }
        write_json(self.output_dir / "summary.json", summary)
        try:
            report_from_directory(self.output_dir)
            report = f"\nreport  {Path(self.directory, 'report.html')}"
        except Exception as error:  # a report that fails must not lose the trained model
            report, again = "", f"For another attempt: tokenrl report {self.output_dir}"
            self.console.warn(f"No report could be made: {error} {again}")
        self.console.finish(summary)
        for text in texts:
            self.console.warn(text)
        self.console.note(f"model   {Path(self.directory, 'model')}{report}")
        for command in next_commands(self.kind, self.args, summary, bool(self.origin.command)):
            self.console.note(f"next    {command}")

    def save(self) -> None:
        """Save a checkpoint of the current step, unless only a part of it has been done."""
        if self._log is not None and self._recorded == self.step:
            if self._log.sync(
                self.rows
            ):  # a checkpoint must never know more steps than metrics.jsonl
                self.console.warn(
                    "Another program changed metrics.jsonl, which has been written again."
                )
            self.saver.save(self.step, self._log.rows_hash.hexdigest())

    def _failed(self, error: BaseException) -> Stopped:
        """Save the state of a run that failed, write its summary and report; return the error to tell."""
        errors = [error]
        try:
            self.save()
        except USER_CODE_FAILED as fault:  # the state of a memory is made by user code too
            errors.append(explain(fault) or fault)
        messages = [
            *dict.fromkeys(str(e) if isinstance(e, Stopped) else describe(e) for e in errors)
        ]
        if not self.main:
            return Stopped(messages[0])
        failed = {"exit_reason": "failed", "steps": self._recorded, "eval_after": None}
        summary = Outcome(**self.outcome("failed") | failed).summary()
        remedy = how_to_continue(self.output_dir)
        facts: dict[str, Any] = {"flags": self.flags, "warnings": self.console.warnings}
        facts |= {"error": " ".join(messages), "remedy": remedy}
        with contextlib.suppress(Exception):  # the directory may be gone, or its disk full
            write_json(self.output_dir / "summary.json", summary | facts)
            report_from_directory(self.output_dir)
        words = f"At step {self.step}:", *messages, remedy, kept_weights(summary)
        return Stopped(" ".join(filter(None, words)))
