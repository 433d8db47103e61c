"""Keeps one run of a training: directory, header, log, checkpoints, signals, failure, summary, report.

Each training writes its own loop and asks the session what is due::

    with Session("train", args) as session:         # the directory is locked, and nothing in it has changed
        session.open(args, model, provenance, {"run": run}, header)  # a continuation has its state again
        if not session.continues:
            session.evaluated(evaluate())
        for step in session.steps():                # from here on the directory holds this run
            with session.update():
                metrics = learn()
            if session.due(args.eval_every):
                metrics |= session.evaluated(evaluate())
            session.record(metrics)
        session.finish(Outcome(**session.outcome()), write_model)

Checkpoints are saved between two steps, and at the end before the last evaluation; a step that fails saves nothing.
What a user can mend is `Refused` before `steps`, and `Stopped` later.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrl.configuration import note_code
from tokenrl.errors import USER_CODE_FAILED, Lost, Refused, Silent, Stopped, explain
from tokenrl.files import State, atomic_directory, plain, write_json
from tokenrl.runs.checkpoint import Model, Resumable, Saver, copy_of, step_of
from tokenrl.runs.console import Console, next_commands
from tokenrl.runs.directory import directory_path, numbered, remove_run_files
from tokenrl.runs.metric_table import Row
from tokenrl.runs.metrics import (
    LOGS,
    Trackers,
    append_rows,
    of_evaluation,
    peak_memory,
    read_metrics,
    replace_last_row,
)
from tokenrl.runs.origin import origin_of, typed_command, versions
from tokenrl.runs.output import without_warnings
from tokenrl.runs.processes import all_reduce_max
from tokenrl.runs.reader import Outcome
from tokenrl.runs.report import report_from_directory
from tokenrl.runs.resume import Provenance, claim, cut_back, is_main, together, write_failure
from tokenrl.runs.rules import Finding
from tokenrl.runs.signals import SIGNALS, GracefulStop
from tokenrl.runs.threads import without_cudnn_attention
from tokenrl.user_code import leave, own_process

_STATE = ("eval_before", "evaluation", "_warned", "flags", "training_seconds", "ended", "reason")
"""The fields of a `Session` that a continuation goes on from, besides the seconds."""


class Session:
    """One run of a training, as a context manager. Only the main process writes files and prints.

    Attributes:
        kind, args: the command that runs, as in config.json, and the settings.
        accelerator, main: accelerate's handle of the processes, and whether this is the main process.
        directory, output_dir: the run directory as it was named or numbered, and as an absolute path.
        continues: whether the run goes on from a checkpoint.
        console, saver, stop: print, hold the checkpoints, and catch the signals that end the run.
        command, provenance: how it was started, see `origin_of`, and what it is made from, its settings too.
        step, rows: number of the current step, 0 before the first; the rows of metrics.jsonl up to it.
        eval_before, evaluation: metrics of the evaluations before training and of this step, or empty.
        step_seconds, training_seconds: seconds of the last update, and of all updates.
        flags, ended, reason: warnings about the outcome; why the run ends early (see `BY_ITSELF`), and in words.
        signal, exit_code: number of the signal that ends all processes of the run, or 0; the code of the outcome.
    """

    signal = exit_code = 0
    reason = ""
    step_seconds = training_seconds = _wall_seconds = 0.0  # the last where a run had ended
    saver: Saver
    command: str
    provenance: Provenance

    def __init__(self, kind: str, args: Any, *, every: int = 10, accelerator: Any = None) -> None:
        """Make and lock the directory. A run that it already holds stays untouched until `steps`.

        Args:
            kind: the command that runs.
            args: its settings; None as `output_dir` takes the next of the numbered directories.
            every: steps between two printed lines.
            accelerator: accelerate's handle of the processes; None in a run of one.

        Raises:
            Refused: the directory, the checkpoint to continue from, or a tracker cannot be used.
        """
        self.kind = kind
        self.args = args
        self.accelerator = accelerator
        self.main = is_main(accelerator)
        quiet = args.quiet or not self.main
        self._owner = os.getpid()
        self.console = Console(quiet=quiet, every=every)
        self.stop = GracefulStop(quiet=quiet)
        self._trackers = Trackers(args, getattr(args, "logging_steps", 1), self.console.warn)
        with contextlib.ExitStack() as locks:
            locks.callback(self._trackers.close)  # last, since a tracker may be slow to end
            claimed = together(accelerator, lambda: claim(kind, args, locks, main=self.main))
            self._skipped, *numbers = claimed
            number, step = all_reduce_max(accelerator, numbers)
            self._atexit = locks.pop_all()
        self.directory = str(directory_path(args.output_dir or numbered(kind, number)))
        self.output_dir = Path(self.directory).absolute()
        self.continues = step > 0
        self._checkpoint = self.output_dir / "checkpoints" / f"step_{step:06d}"
        self._has_begun = self._writes = False  # whether `steps` was called; and steps are recorded
        self.ended: str | None = None
        self.step = self._recorded = 0  # recorded: the last step in the log
        self.rows: list[dict[str, Any]] = [{"step": 0}]
        self.flags, self._warned = list[str](), dict[str, str]()  # warnings by their topic
        self.eval_before, self.evaluation = dict[str, float](), dict[str, float]()
        self._began = time.monotonic()

    def __enter__(self) -> Session:
        self._atexit.enter_context(without_warnings(self.console.rich.quiet))
        self._atexit.enter_context(without_cudnn_attention())
        return self

    def __exit__(self, _: Any, error: BaseException | None, traceback: Any) -> None:
        """Close the run. Record an error that ended it, as `Refused` before `steps` and `Stopped` after it."""
        leave(self._owner)
        with self._atexit:
            stopped = error if isinstance(error, Stopped) else error and explain(error)
            if not self._has_begun and stopped:
                kind = Silent if isinstance(stopped, Lost) and not self.main else Refused
                raise kind(f"Before the first step: {stopped}") from error
            if self._has_begun and isinstance(error, USER_CODE_FAILED):
                failed = self._failed(stopped or error)
                if stopped or isinstance(error, Refused):
                    raise failed from error
                self.console.warn(str(failed))  # and the error itself goes on, with its traceback
        if error is None and self.exit_code == 0 and not typed_command():
            self.stop.pass_on()  # a signal after the outcome is not lost; a command ends anyway

    def open(
        self,
        args: Any,
        model: Model,
        provenance: Provenance,
        parts: dict[str, Resumable],
        header: Mapping[str, Any],
        *,
        names: Mapping[str, str | None] | None = None,
        **facts: Any,
    ) -> None:
        """Prepare for the first step, or restore the state of the checkpoint from which the run continues.

        From here on a signal lets the step end and saves. The files of the directory stay as they are.

        Args:
            args: the settings, complete but for the directory.
            model: what is trained.
            provenance: what the run is made from, which is compared with the checkpoint's.
            parts: what else a checkpoint must hold, by name.
            header: the rest of the header.
            names: by field, the text in config.json for an object given from Python.
            **facts: further entries of config.json, such as the title.

        Raises:
            Refused: a state cannot be saved; the checkpoint, or another process, has other settings or data.
        """
        self.args = args
        values = {**vars(args), "output_dir": self.directory, "kind": self.kind}
        config = self.output_dir / "config.json"
        settings, self.command = origin_of(self.kind, values, names or {}, config)
        self.provenance = provenance
        provenance.settings = settings
        provenance.take_code(type(args))
        if self.main:
            note_code(type(args), plain(settings))
        self._config = {"versions": versions(), **settings, **facts, "command": self.command}
        held: Any = {"maker": provenance, "session": self, **parts}
        self.saver = Saver(self._checkpoint.parent, args, model, held, provenance.write)
        together(self.accelerator, lambda: self.saver.check(parts, main=self.main))
        self._atexit.enter_context(self.stop)
        self.console.facts("", header)
        if self.continues and not getattr(args, "check", False):
            self._restore(provenance)

    def _restore(self, provenance: Provenance) -> None:
        """Restore the state of the checkpoint, and say from where and how exactly the run continues."""
        self.saver.restore(self._checkpoint)
        self.step = self._recorded = step_of(self._checkpoint)
        self.rows = read_metrics(copy_of("metrics.jsonl", self._checkpoint))
        goes_on = self.step < self.args.max_steps and self.ended in (None, "callback", "finished")
        if goes_on:
            self.ended, self.reason = None, ""
        for fault in self._skipped:
            self.console.warn(f"skipped: {fault}")
        self.console.note(f"The run continues after step {self.step}, from {self._checkpoint}")
        if goes_on and (causes := "; ".join(provenance.inexact)):
            self.console.warn(f"The continuation may not be bit-exact: {causes}.")

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left; they end early after a signal, or once `end` is called.

        First config.json and step 0 are written; an older run in the directory, or what followed the checkpoint, goes.

        Raises:
            Refused: what the directory holds cannot be removed.
        """
        if self.continues:
            self.console.warnings += self._warned.values()
            if self.main:
                seconds = cut_back(self.output_dir, self._checkpoint)
                if self.ended or self.step >= self.args.max_steps:
                    self._wall_seconds = seconds or self.wall_seconds
        self._has_begun = True
        if self.main:
            self._begin()
        while self.step < self.args.max_steps and not (self.ended or self._is_stopped()):
            self.step += 1
            yield self.step
        self._is_stopped()  # also where the run ends by itself
        self.save()

    def _begin(self) -> None:
        """Write config.json and step 0, and start the trackers."""
        if not self.continues:
            stages = ("warm_start",) if "warm_started" in self._config else ()
            remove_run_files(self.output_dir, keep=stages)
        hashes = self.provenance.chosen | self.provenance.state_dict()["code"]
        write_json(self.output_dir / "config.json", {**self._config, "hashes": hashes})
        if self._wall_seconds:
            self.console.note("Nothing is left to do: the run had ended.")
            return
        self._trackers.start(self._config, self.output_dir)
        self._writes = True
        if not self.continues:
            append_rows(self.output_dir, 0, of_evaluation(self.eval_before))
            self._trackers.write(0, of_evaluation(self.eval_before))

    def _is_stopped(self) -> bool:
        """Save if it is time. Return whether any process got a signal: all agree, or some would wait."""
        numbers = [self.stop.requested or 0, int(self._writes and self.saver.due(self.step))]
        self.signal, save = all_reduce_max(self.accelerator, numbers)
        if save:
            self.save()
        self.stop.requested = self.signal or self.stop.requested  # or a signal that came in between
        return bool(self.signal)

    def due(self, every: int) -> bool:
        """Return whether something is due in this step: every `every` steps (0: never)."""
        return every > 0 and self.step % every == 0

    def evaluated(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Record the evaluation of this step; return its metrics under their names in metrics.jsonl."""
        leave(self._owner)  # an environment may have forked this process
        self.evaluation = dict(metrics)
        row = of_evaluation(metrics)
        if self.step == 0:
            self.eval_before = self.evaluation
            self.rows = [{"step": 0, **row}]
        elif self.step == self._recorded:  # after the last step, whose line is already written
            self.rows[-1] |= row
            if self.main:
                replace_last_row(self.output_dir, self.rows[-1])
            self._trackers.write(self.step, row)
        self.saver.best.judge(self.step, metrics)
        if self.saver.best.exhausted and self.ended is None and self.step > self._recorded:
            self.end("no-improvement")
        return row

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Time the block, an update. Its seconds count as seconds of training; evaluations do not."""
        began = time.perf_counter()
        with own_process():
            yield
        self.evaluation = {}
        self.step_seconds = time.perf_counter() - began
        self.training_seconds += self.step_seconds

    def rate(self, count: float) -> float:
        """Return the rate per second of things; all updates so far have processed `count` of them."""
        return count / max(self.training_seconds, 1e-9)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the run ended by itself, not by a signal, and its last step has not been evaluated."""
        return not self.evaluation and not self.signal

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken, without those between its end and its continuation."""
        return self._wall_seconds or time.monotonic() - self._began

    def record(self, metrics: Row, timings: Row | None = None) -> None:
        """Write metrics of this step to metrics.jsonl, timings to timings.jsonl, and show and track both."""
        times = {"step_seconds": self.step_seconds, **(timings or {}), **peak_memory()}
        both = {**metrics, **times}
        if self._writes:
            append_rows(self.output_dir, self.step, metrics, times)
            self._trackers.write(self.step, both)
        self.rows.append({"step": self.step, **metrics})
        self._recorded = self.step
        self.console.step(self.step, self.args.max_steps, both)

    def end(self, reason: str, words: str = "") -> None:
        """End the run after this step, for a reason of `BY_ITSELF` or `check`."""
        self.ended, self.reason = reason, words

    def conclude(self, parts: str, lines: Mapping[str, str], findings: Sequence[Finding]) -> None:
        """End a check and print what came of it, see `Console.checked`; with a problem its exit code is 2."""
        problems = [finding for finding in findings if finding.weight == "void"]
        remarks = [finding for finding in findings if finding.weight != "void"]
        self.end("check")
        self.exit_code = self.stop.exit_code or (Refused.exit_code if problems else 0)
        self.flags += [finding.flag for finding in (*problems, *remarks)]
        if self.main:
            self.console.checked(parts, lines, problems, remarks)

    def warn_once(self, topic: str, message: str) -> None:
        """Print a warning the first time that its topic comes up, and never again."""
        if topic not in self._warned:
            self._warned[topic] = message
            self.console.warn(message)

    def state_dict(self) -> State:
        """Return what a continuation must know."""
        return {name: getattr(self, name) for name in (*_STATE, "wall_seconds")}

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned."""
        for name in _STATE:
            setattr(self, name, state[name])
        self._began -= state["wall_seconds"]

    def outcome(self) -> dict[str, Any]:
        """Return the fields of `Outcome`. The exit reason is a signal, `ended`, or `finished`."""
        code = 128 + self.signal if self.signal else self.exit_code
        return {
            "output_dir": self.output_dir,
            "exit_reason": SIGNALS.get(code, self.ended or "finished"),
            "exit_code": code,
            "steps": self.step,
            "eval_before": self.eval_before,
            "eval_after": self.evaluation,
            "wall_seconds": self.wall_seconds,
            "best": self.saver.best.summary(),
        }

    def finish(
        self, ended: Outcome, write: Callable[[Path], None], findings: Sequence[Finding] = ()
    ) -> None:
        """Write the model, the summary and the report of a run that has ended, and print the result.

        Args:
            ended: the result.
            write: writes the model into an empty folder. The model has the best weights if `keep` says so.
            findings: what the rules say of the whole run; printed as warnings after the result.

        Raises:
            Stopped: the best weights are lost, or the model could not be written.
        """
        self.exit_code = ended.exit_code
        self.saver.read_best(self.step)
        if not self.main:
            return
        with atomic_directory(self.output_dir / "model") as folder:
            write(folder)
            self.provenance.write(folder)
        summary = ended.summary() | {"warnings": [*self.console.warnings, *map(str, findings)]}
        write_json(self.output_dir / "summary.json", summary)
        try:
            report_from_directory(self.output_dir)
        except Exception as error:  # a report that fails must not lose the trained model
            again = f"tokenrl report {self.directory}"
            self.console.warn(f"No report could be made ({error}); {again} tries again.")
        settings = self.args.seed, summary, bool(self.command)
        commands = next_commands(self.kind, self.directory, *settings)
        self.console.finish(summary, findings, self.directory, commands)

    def save(self) -> None:
        """Save a checkpoint of the current step, unless only a part of it has been done."""
        if self._writes and self._recorded == self.step:
            self.saver.save(self.step, [self.output_dir / name for name in LOGS])

    def _failed(self, error: BaseException) -> Stopped:
        """Save the state of a run that failed, write its summary and report; return the error to tell."""
        errors = [error]
        try:
            self.save()
        except USER_CODE_FAILED as fault:  # the state of a memory is made by user code too
            errors.append(explain(fault) or fault)
        if not self.main:
            return Stopped(str(error))
        outcome = self.outcome() | {"steps": self._recorded}
        words = write_failure(outcome, errors, flags=self.flags, warnings=self.console.warnings)
        return Stopped(f"At step {self.step}: {words}")
