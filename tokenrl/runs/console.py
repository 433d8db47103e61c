"""Prints a run for people: header, a line every few steps, sample completions, final table."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tokenrl.errors import Refused
from tokenrl.runs.best import kept_weights
from tokenrl.runs.metric_table import Row, Rows, is_rounding, metric_of
from tokenrl.runs.output import drop_output, harmless, quantity, rich_console, rich_table, visible

if TYPE_CHECKING:
    import pandas as pd

    from tokenrl.runs.rules import Finding
    from tokenrl.runs.session import Session

_LOSS_NOTE = (
    "The loss is no measure of progress: it is made for its gradient, and its value says little; "
    "watch the reward and the evaluation."
)
MAX_SILENCE = 5.0  # seconds without a line, after which one is printed
_MAX_DECIMALS = 6  # of a number with its error
FAILURES = ("policy-destroyed", "nothing-learnt")
"""Flags of a summary without which the reason why a run ended would mislead."""
_CELL = 60  # characters of a prompt or completion shown in a table, of which half are of its end
_EPISODE = 300  # the same of an episode, whose answer comes after the calls of tools


class Console:
    """Prints the progress of a run. Every process but the main one passes `quiet=True` and prints nothing."""

    def __init__(self, *, quiet: bool = False, file: TextIO | None = None, every: int = 10) -> None:
        """Set where to print.

        Args:
            quiet: print nothing.
            file: where to print; None for stdout.
            every: steps between two printed lines; one is also printed when five seconds have passed without
                any.
        """
        self.every = every
        self.rich = rich_console(quiet=quiet, file=file)
        self.warnings = list[str]()  # so far, printed or not
        self._evaluation = list[str]()
        self._printed_at = time.monotonic()
        # the first step, which is slower, and its end
        self._timed_from: tuple[int, float] | None = None

    def start(self, title: str, facts: Mapping[str, Any], *, note: str = _LOSS_NOTE) -> None:
        """Print the header: a table of facts about the run, and a note below it."""
        self.facts(title, facts)
        self.print(note, style="italic dim")

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """Print a table of facts by name, if there are any."""
        table = rich_table(title, header=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, fact in facts.items():
            table.add_row(visible(name), visible(str(fact)))
        if facts:
            self.print(table)

    def frame(self, title: str, frame: pd.DataFrame) -> None:
        """Print a data frame, its rows by their names."""
        table = rich_table(title, ("",), [*frame])
        for cells in frame.itertuples():
            table.add_row(*map(number, cells))
        self.print(table)

    def completions_table(
        self, rows: Rows, numbers: Sequence[str] = ("reward", "advantage")
    ) -> None:
        """Print prompt, completion and some numbers of each row; control characters are made visible."""
        table = rich_table("Sample completions", ("prompt", "completion"), overflow="fold", ratio=1)
        numbers = [key for key in numbers if any(row.get(key) is not None for row in rows)]
        for column in numbers:
            table.add_column(column.removeprefix("rewards/"), justify="right", no_wrap=True)
        for row in rows:
            most = _EPISODE if "messages" in row else _CELL
            texts = [str(row.get(name, "")) for name in ("prompt", "completion")]
            table.add_row(
                *(visible(text, most, end=most // 2) for text in texts),
                *(number(row.get(key)) for key in numbers),
            )
        self.print(table)

    def note(self, message: str) -> None:
        """Print a message without wrapping its lines."""
        self.print(message, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning, and keep it for the report."""
        if message not in self.warnings:
            self.warnings.append(message)
        self.print(f"warning: {message}", style="yellow")

    def finish(self, summary: Row) -> None:
        """Print the evaluation before and after training, and how the run ended, from summary.json."""
        table = rich_table("Evaluation (± standard error)", ("",), ("before",))
        table.add_column("after", justify="right", style="bold")
        for row in evaluations(summary):
            table.add_row(*row)
        if table.rows:
            self.print(table)
        self.print(ending(summary))
        if weights := kept_weights(summary):
            self.print(weights)

    def step(self, step: int, total: int, metrics: Row) -> None:
        """Print a line about a step: the first two, every `every` steps, an evaluation, and after a silence.

        Args:
            step: number of updates made so far.
            total: number of the last step.
            metrics: of this step. Shown are `reward` (or else `kl`, or else `loss`),
                `eval_reward_greedy` (or else `eval_reward`; the last evaluation stays on the line), and
                `tokens_per_second` or `env_steps_per_second`, as far as they are present.
        """
        names = [name for name in ("reward", "kl", "loss") if name in metrics][:1]
        parts = [f"{name} {number(metrics[name])}" for name in names]
        evaluated = metrics.get("eval_reward_greedy", metrics.get("eval_reward"))
        if evaluated is not None:
            self._evaluation = [f"eval {number(evaluated)}"]
        parts += [*self._evaluation, *_rates(metrics)]
        now = time.monotonic()
        if self._timed_from is None:
            self._timed_from = step, now
        elif step < total:
            first, began = self._timed_from
            step_seconds = (now - began) / (step - first)
            parts.append(f"ETA {duration((total - step) * step_seconds)}")
        is_due = step % self.every == 0 or step in (1, 2, total) or evaluated is not None
        if is_due or now > self._printed_at + MAX_SILENCE:
            line = "  ".join(parts)
            self.note(f"step {step:>{len(str(total))}}/{total}  {line}")
            self._printed_at = now

    def print(self, *objects: Any, **options: Any) -> None:
        """Print with rich, and go on without output where that fails, as in a terminal that was closed.

        Raises:
            BrokenPipeError: the program that read the output has ended, as with `| head`.
        """
        try:
            self.rich.print(*objects, **options)
        except BrokenPipeError:
            raise
        except OSError:  # the files of the run have everything
            self.rich.quiet = True
            drop_output()


def conclude(
    session: Session, parts: str, measurements: Mapping[str, str], findings: Sequence[Finding]
) -> None:
    """Print what a check of a training measured and found, and keep the flags and the exit code in the session.

    The table and the remarks go to the standard output, which `quiet` switches off; the problems go to the
    standard error, as errors do. The exit code is 2 if there is a problem.

    Args:
        session: the session, which has been opened.
        parts: what was checked, in words, such as "model, data and rewards".
        measurements: the lines of the table.
        findings: what was found; a finding of weight `void` is a problem, another a remark.
    """
    findings = sorted(findings, key=lambda finding: finding.weight != "void")
    problems = [str(finding) for finding in findings if finding.weight == "void"]
    session.end("check", exit_code=Refused.exit_code if problems else 0)
    session.flags += [finding.flag for finding in findings]
    if not session.main:
        return
    console = session.console
    if not problems:
        console.note(f"Check passed: {parts} work together. Nothing was trained.")
    console.facts("", measurements)
    for finding in findings[len(problems) :]:
        console.warn(str(finding))
    if problems:
        sys.stdout.flush()  # the table first, where both go to one place
        print(
            f"tokenrl: Check not passed: {quantity(len(problems), 'problem')}. Nothing was trained.",
            *(harmless(f"  {number}. {text}") for number, text in enumerate(problems, 1)),
            sep="\n",
            file=sys.stderr,
        )


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a chat message, and the calls of tools in it as JSON."""
    parts = filter(None, (message["content"], *(message.get("tool_calls") or ())))
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts)


def number(value: Any) -> str:
    """Return a number as text with four significant figures, or a dash for None."""
    if value is None:
        return "-"
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError, OverflowError):
        return visible(str(value), _CELL)


def measured(value: Any, error: Any = None) -> str:
    """Return a number with its standard error as text, such as 0.912 ± 0.012; one without error as `number`.

    Both are rounded to the second significant figure of the error.
    """
    if value is None or not isinstance(error, (int, float)) or not math.isfinite(error):
        return number(value)
    error = 0.0 if is_rounding(error, value) else error
    if error < 10 ** (1 - _MAX_DECIMALS):
        return f"{number(value)} ± {error:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{float(value):.{decimals}f} ± {error:.{decimals}f}"


def with_errors(metrics: Row | None) -> dict[str, str]:
    """Return each metric as text by its name, with the standard error that the metrics hold beside it.

    The standard error of NAME is NAME_stderr; it has no entry of its own. The rewards come first, without
    those that repeat them (see `distinct`).
    """
    metrics = distinct(metrics)
    return {
        name: measured(metrics[name], metrics.get(f"{name}_stderr"))
        for name in sorted(metrics, key=lambda name: metric_of(name).panel != "reward")
        if not name.endswith("_stderr")
    }


def distinct(metrics: Row | None) -> dict[str, Any]:
    """Return metrics without the metrics of a single reward function, which repeat the reward itself."""
    metrics = dict(metrics or {})
    names = [name for name in metrics if name.startswith("rewards/")]
    if len({name.split("/")[1] for name in names}) == 1:
        for name in names:
            if metrics[name] == metrics.get("reward"):
                del metrics[name]
    return metrics


def evaluations(summary: Row) -> list[tuple[str, str, str]]:
    """Return for each metric its name and its values before and after training, from summary.json."""
    before = with_errors(summary.get("eval_before"))
    after = with_errors(summary.get("eval_after"))
    return [(visible(name), before.get(name, "-"), after.get(name, "-")) for name in before | after]


def duration(seconds: float) -> str:
    """Return seconds as text, such as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


def ending(summary: Row) -> str:
    """Return one line on how a run ended (reason with flags, steps, time, rate), from summary.json."""
    flags = [flag for flag in summary.get("flags") or () if flag in FAILURES]
    remarks = [f" ({words})" for words in (*flags, summary.get("reason")) if words]
    parts = [visible("".join([str(summary.get("exit_reason", "unfinished")), *remarks]))]
    if summary.get("steps") is not None:
        parts.append(f"{summary['steps']} steps")
    if summary.get("wall_seconds") is not None:
        parts.append(duration(summary["wall_seconds"]))
    return ", ".join([*parts, *_rates(summary)])


def next_commands(
    kind: str, directory: str, seed: int, summary: Row, repeatable: bool
) -> list[str]:
    """Return the one or two commands that most people want after a run.

    Args:
        kind: the command that ran.
        directory: its directory.
        seed: its seed.
        summary: how it ended, as in summary.json.
        repeatable: whether a command line can repeat the run; it cannot give objects of a Python program.
    """
    if Path(directory).name == "warm_start":  # the training follows
        return []
    run = shlex.quote(directory)
    repeat = f"tokenrl {kind} --config {run}"
    if summary["exit_reason"].startswith("SIG"):
        return [f"{repeat} --resume auto"] if repeatable else []
    command = f"tokenrl sample --model {run}"
    if kind == "control" or "nothing-learnt" in summary.get("flags", ()):
        command = f"tokenrl advise --run {run}"
    elif kind == "reward-model":
        command = f"tokenrl train --task TASK --reward {run}/model"
    return [command, f"{repeat} --seed {seed + 1}"] if repeatable else [command]


def _rates(metrics: Row) -> list[str]:
    """Return the rates that were measured, as text: tokens or environment steps per second."""
    return [
        f"{metrics[name]:,.0f} {metric_of(name).unit}"
        for name in ("tokens_per_second", "env_steps_per_second")
        if metrics.get(name)
    ]
