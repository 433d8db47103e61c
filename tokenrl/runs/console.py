"""Prints a run for people: header, a line every few steps, sample completions, final table."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tokenrl.runs.best import kept_weights
from tokenrl.runs.metric_table import Row, Rows
from tokenrl.runs.output import (
    CELL,
    drop_output,
    duration,
    ending,
    evaluations,
    harmless,
    number,
    quantity,
    rates,
    rich_console,
    rich_table,
    visible,
)
from tokenrl.runs.rules import Finding

if TYPE_CHECKING:
    import pandas as pd

_LOSS_NOTE = (
    "The loss is no measure of progress: it is made for its gradient, and its value says little; "
    "watch the reward and the evaluation. The training reward is the mean of this step's samples; the held-out greedy "
    "reward, of the latest evaluation, is that of the most probable completions or actions."
)
_SHOWN = {"reward": "training reward", "kl": "kl", "loss": "loss"}
MAX_SILENCE = 5.0  # seconds without a line, after which one is printed
_EPISODE = 300
"""Characters of an episode that a table shows, whose answer comes after the calls of tools."""


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
        table = rich_table(title, ("",), [*frame], overflow="fold")
        for name, *cells in frame.itertuples():
            table.add_row(visible(name), *map(number, cells))
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
            most = _EPISODE if "messages" in row else CELL
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

    def finish(
        self,
        summary: Row,
        findings: Sequence[Finding] = (),
        directory: str = "",
        commands: Sequence[str] = (),
    ) -> None:
        """Print the evaluation before and after training, how the run ended, and what the rules say of it.

        Args:
            summary: how the run ended, as in summary.json.
            findings: what the rules say, printed as warnings.
            directory: the directory of the run.
            commands: what most people want next.
        """
        table = rich_table("Evaluation (± standard error)", ("",), ("before",))
        table.add_column("after", justify="right", style="bold")
        for row in evaluations(summary):
            table.add_row(*row)
        if table.rows:
            self.print(table)
        self.print(ending(summary))
        if weights := kept_weights(summary):
            self.print(weights)
        for finding in findings:
            self.warn(str(finding))
        if directory:
            files = Path(directory, "model"), Path(directory, "report.html")
            self.note("model   {}\nreport  {}".format(*files))
        for command in commands:
            self.note(f"next    {command}")

    def checked(
        self,
        parts: str,
        measurements: Mapping[str, str],
        problems: Sequence[Finding],
        remarks: Sequence[Finding],
    ) -> None:
        """Print what a check of a training measured and found.

        The table and the remarks go to the standard output, which `quiet` switches off; the problems go to the
        standard error, as errors do.

        Args:
            parts: what was checked, in words, such as "model, data and rewards".
            measurements: the lines of the table.
            problems: what makes the run worthless.
            remarks: what else was found.
        """
        if not problems:
            self.note(f"Check passed: {parts} work together. Nothing was trained.")
        self.facts("", measurements)
        for finding in remarks:
            self.warn(str(finding))
        if problems:
            sys.stdout.flush()  # the table first, where both go to one place
            print(
                f"tokenrl: Check not passed: {quantity(len(problems), 'problem')}. Nothing was trained.",
                *(harmless(f"  {number}. {text}") for number, text in enumerate(problems, 1)),
                sep="\n",
                file=sys.stderr,
            )

    def step(self, step: int, total: int, metrics: Row) -> None:
        """Print a line about a step: the first two, every `every` steps, an evaluation, and after a silence.

        Args:
            step: number of updates made so far.
            total: number of the last step.
            metrics: of this step. Shown are `reward` (or else `kl`, or else `loss`),
                `eval_reward_greedy` (the last evaluation stays on the line), and
                `tokens_per_second` or `env_steps_per_second`, as far as they are present.
        """
        parts = [
            f"{word} {number(metrics[key])}" for key, word in _SHOWN.items() if key in metrics
        ][:1]
        evaluated = metrics.get("eval_reward_greedy")
        if evaluated is not None:
            self._evaluation = [f"held-out greedy reward {number(evaluated)}"]
        parts += [*self._evaluation, *rates(metrics)]
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
