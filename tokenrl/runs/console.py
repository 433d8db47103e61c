"""Prints a run for people: header, one live line (plain lines in a log), sample completions, final table."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any, TextIO

from tokenrl.runs.best import kept_weights
from tokenrl.runs.origin import untested_versions
from tokenrl.runs.output import drop_output

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

_LOSS_NOTE = (
    "The loss is no measure of progress: it weights log-probabilities by advantages, "
    "which average to about 0 by construction; watch the reward and the evaluation."
)
PATIENCE = 5.0  # seconds without a line, after which one is printed
_RECENT = 20  # steps whose median time foretells those to come
TimeLeft = Callable[[int, float], float]
_DECIMALS = 6  # most decimal places of a number with its error
FAILURES = ("policy-destroyed", "nothing-learnt")
"""Flags of a summary without which the reason why a run ended would mislead."""
_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"  # all but newline and tab
_HARMFUL = re.compile(rf"[{_CONTROL}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_CELL = 60  # characters of a prompt or completion shown in a table
_EPISODE = 300  # the same of an episode


def rich_console(
    *, width: int = 110, quiet: bool = False, file: TextIO | None = None
) -> RichConsole:
    """Make a console of the library rich that prints texts of data and models as they are, but `harmless`.

    Args:
        width: characters per line where the output is no terminal.
        quiet: print nothing.
        file: where to print; None for stdout.
    """
    from rich.console import Console as RichConsole
    from rich.text import Text

    class Plain(RichConsole):
        def on_broken_pipe(self) -> None:
            raise  # where rich would end the program at once, before the run is saved

        def render_str(self, text: str, **options: Any) -> Text:  # of every text, in tables too
            return super().render_str(harmless(text), **options)

    # Brackets, colons and numbers in such texts must not be read as markup, emoji codes or highlights.
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Plain(file=file, quiet=quiet, **plain)
    if (
        console.is_jupyter
    ):  # rich would make every line an output of its own; ipykernel says it is a terminal
        console = Plain(file=file, quiet=quiet, force_jupyter=False, force_terminal=False, **plain)
    if not console.is_terminal:
        console.width = width
    return console


def rich_table(
    title: str = "",
    texts: Sequence[str] = (),
    numbers: Sequence[str] = (),
    header: bool = True,
    **of: Any,
) -> Table:
    """Make a table of the library rich.

    Args:
        title: text above the table, aligned left.
        texts: headers of the first columns, which are aligned left.
        numbers: headers of the columns after them, which are aligned right.
        header: whether the headers are shown.
        **of: options of rich for all these columns, such as `no_wrap`.
    """
    from rich import box
    from rich.table import Table

    look: Any = {"title_style": "bold", "title_justify": "left", "box": box.SIMPLE}
    table = Table(title=title or None, show_header=header, **look)
    for name in (*texts, *numbers):
        table.add_column(name, justify="left" if name in texts else "right", **of)
    return table


class Console:
    """Prints the progress of a run. Every process but the main one passes `quiet=True` and prints nothing."""

    def __init__(self, *, quiet: bool = False, file: TextIO | None = None, every: int = 10) -> None:
        """Set where to print.

        Args:
            quiet: print nothing.
            file: where to print; None for stdout.
            every: steps between two printed lines where the output is no terminal; one is also printed when
                five seconds have passed without any.
        """
        self.every, self.each = every, "step"
        self.rich = rich_console(quiet=quiet, file=file)
        self.warnings = list[str]()  # so far, printed or not

    def start(self, title: str, facts: Mapping[str, Any], *, note: str = _LOSS_NOTE) -> None:
        """Print the header: a table of facts about the run and of untested libraries, and a note below it."""
        self.facts(title, {**facts, **untested_versions()})
        self.print(note, style="italic dim")

    @contextmanager
    def status(self, activity: str) -> Iterator[None]:
        """Print what the block does, and every five seconds how long that has taken so far."""
        self.note(f"{activity} ...")
        ended, began = threading.Event(), time.monotonic()

        def tell() -> None:
            while not ended.wait(PATIENCE):
                self.note(f"{activity}: {time.monotonic() - began:.0f} s so far")

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """Print a table of facts by name, if there are any."""
        table = rich_table(title, header=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, fact in facts.items():
            table.add_row(visible(name), visible(str(fact)))
        if facts:
            self.print(table)

    def completions_table(
        self, rows: Iterable[Mapping[str, Any]], numbers: Sequence[str] = ("reward", "advantage")
    ) -> None:
        """Print prompt, completion and some numbers of each row; control characters are made visible."""
        table = rich_table("Sample completions", ("prompt", "completion"), overflow="fold", ratio=1)
        for column in numbers:
            table.add_column(column.removeprefix("rewards/"), justify="right", no_wrap=True)
        for row in rows:
            # Of an episode the end is shown too, as the answer comes after the calls of tools.
            most, end = (_EPISODE, _EPISODE // 2) if "messages" in row else (_CELL, 0)
            texts = [visible(str(row.get("prompt", "")), _CELL)]
            texts.append(visible(str(row.get("completion", "")), most, end))
            table.add_row(*texts, *(number(row.get(key)) for key in numbers))
        self.print(table)

    def note(self, message: str) -> None:
        """Print a message without wrapping its lines."""
        self.print(message, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning, and keep it for the report."""
        self.warnings += [message] if message not in self.warnings else []
        self.print(f"warning: {message}", style="yellow")

    def check(
        self,
        parts: str,
        measured: Mapping[str, str],
        problems: Iterable[str],
        remarks: Iterable[str],
    ) -> None:
        """Print what a check of a training measured and found.

        The table and the remarks go to the standard output, which `quiet` switches off; the problems go to
        the standard error, as errors do.

        Args:
            parts: what was checked, in words, such as "model, data and rewards".
            measured: the lines of the table.
            problems: what makes training pointless or wrong.
            remarks: what else was found.
        """
        numbered = [harmless(f"  {index}. {problem}") for index, problem in enumerate(problems, 1)]
        if not numbered:
            self.note(f"Check passed: {parts} work together. Nothing was trained.")
        self.facts("", measured)
        for remark in remarks:
            self.warn(remark)
        if numbered:
            sys.stdout.flush()  # the table first, where both go to one place
            count = f"{len(numbered)} problem{'s' * (len(numbered) > 1)}"
            headline = f"tokenrl: Check not passed: {count}. Nothing was trained."
            print(headline, *numbered, sep="\n", file=sys.stderr)

    def finish(self, summary: Mapping[str, Any]) -> None:
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

    def print(self, *objects: Any, **options: Any) -> None:
        """Print with rich; see `attempt`."""
        self.attempt(self.rich.print, *objects, **options)

    def attempt(self, show: Callable[..., object], *objects: Any, **options: Any) -> None:
        """Show something, and go on without output where that fails, as in a terminal that was closed.

        Raises:
            BrokenPipeError: the program that read the output has ended, as with `| head`.
        """
        try:
            show(*objects, **options)
        except BrokenPipeError:
            raise
        except OSError:  # the files of the run have everything
            self.rich.quiet = True
            drop_output()


class Progress:
    """Shows step, reward, last evaluation, rate and time left, as a live line or as lines of a log."""

    def __init__(
        self, console: Console, total: int, first: int = 0, seconds_left: TimeLeft | None = None
    ) -> None:
        """Prepare the line for steps after `first`; it appears on entering the context.

        Args:
            console: where the line is shown.
            total: number of the last step.
            first: steps made before.
            seconds_left: returns the seconds that are left after a step, from its number and the seconds of a
                step; None takes the mean of all steps so far, evaluations included.
        """
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress as RichProgress,
            TextColumn,
        )

        self._console, self._total, self._evaluation = console, total, ""
        self._left, self._seconds = seconds_left, list[float]()
        self._at = time.monotonic()  # of the last printed line
        line = TextColumn("{task.fields[line]}")
        columns = (TextColumn(console.each), MofNCompleteColumn(), BarColumn(20), line)
        where: Any = {"console": console.rich, "disable": not console.rich.is_terminal}
        self._live = RichProgress(
            *columns, speed_estimate_period=math.inf, **where
        )  # steps may take minutes
        self._live.add_task("", total=total, completed=first, line="")

    def __enter__(self) -> Progress:
        self._console.attempt(self._live.start)
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the live line away; a second call does nothing."""
        self._console.attempt(self._live.live.stop)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a step.

        Args:
            step: number of updates made so far.
            metrics: of this step, with its `step_seconds`. Shown are `reward` (or else `loss`),
                `eval_reward_greedy` (or else `eval_reward`; the last evaluation stays on the line), and
                `tokens_per_second` or `env_steps_per_second`, as far as they are present.
        """
        evaluated = metrics.get("eval_reward_greedy", metrics.get("eval_reward"))
        if evaluated is not None:
            self._evaluation = f"eval {number(evaluated)}"
        parts = [
            f"{name} {number(metrics[name])}" for name in ("reward", "loss") if name in metrics
        ][:1]
        parts += [self._evaluation, *_rates(metrics)]
        self._live.update(self._live.task_ids[0], completed=step)
        self._seconds.append(metrics.get("step_seconds", 0.0))
        if remaining := self._live.tasks[0].time_remaining:
            seconds = median_low(
                self._seconds[-_RECENT:]
            )  # without the first step, which is slower
            parts.append(f"ETA {duration(self._left(step, seconds) if self._left else remaining)}")
        line = "  ".join(part for part in parts if part)
        self._console.attempt(self._live.update, self._live.task_ids[0], line=line)
        due = (
            step % self._console.every == 0 or step in (1, 2, self._total) or evaluated is not None
        )
        if not self._console.rich.is_terminal and (due or time.monotonic() > self._at + PATIENCE):
            position = f"{self._console.each} {step:>{len(str(self._total))}}/{self._total}"
            self._console.print(f"{position}  {line}", soft_wrap=True)
            self._at = time.monotonic()


def harmless(text: str) -> str:
    r"""Return a text in which characters that could change a terminal are written as escapes, such as \x1b.

    These are control characters but newline and tab, lone surrogates, and those that turn the direction of
    writing, with which a text can show something else than it says.
    """
    return _HARMFUL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a chat message, and the calls of tools in it as JSON."""
    parts = [message["content"], *(message.get("tool_calls") or ())]
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts if part)


def visible(text: str, limit: int | None = None, end: int = 0) -> str:
    r"""Return a harmless text on one line, at most `limit` characters, `end` of its end, newlines as \n."""
    if limit is not None and len(text) > limit:
        text = f"{text[: limit - 1 - end]}…{text[len(text) - end :]}"
    return harmless(text).replace("\n", r"\n").replace("\t", r"\t")


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
    decimals = 1 - math.floor(math.log10(error)) if error > 0 else _DECIMALS + 1
    if decimals > _DECIMALS:
        return f"{number(value)} ± {error:.1g}"
    decimals = max(0, decimals)
    return f"{float(value):.{decimals}f} ± {error:.{decimals}f}"


def with_errors(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return each metric as text by its name, with the standard error that the metrics hold beside it.

    The standard error of NAME is NAME_stderr; it has no entry of its own. The rewards come first.
    """
    names = [name for name in metrics if not (name.endswith("_stderr") and name[:-7] in metrics)]
    names.sort(key=lambda name: name not in ("reward", "reward_greedy"))
    return {name: measured(metrics[name], metrics.get(name + "_stderr")) for name in names}


def distinct(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return metrics without those of a single reward function, which repeat those of the reward itself."""
    metrics = dict(metrics or {})
    names = [name for name in metrics if name.startswith("rewards/")]
    repeated = names if len({name.split("/")[1] for name in names}) == 1 else []
    return {
        k: value
        for k, value in metrics.items()
        if k not in repeated or value != metrics.get("reward")
    }


def evaluations(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return for each metric its name and its values before and after training, from summary.json."""
    before, after = (
        with_errors(distinct(summary.get(f"eval_{when}"))) for when in ("before", "after")
    )
    return [(visible(name), before.get(name, "-"), after.get(name, "-")) for name in before | after]


def duration(seconds: float) -> str:
    """Return seconds as text, such as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def ending(summary: Mapping[str, Any]) -> str:
    """Return one line on how a run ended (reason with flags, steps, time, rate), from summary.json."""
    failed = [f"({flag})" for flag in summary.get("flags") or () if flag in FAILURES]
    parts = [visible(" ".join([str(summary.get("exit_reason", "unfinished")), *failed]))]
    if summary.get("steps") is not None:
        parts.append(f"{summary['steps']} steps")
    if summary.get("wall_seconds") is not None:
        parts.append(duration(summary["wall_seconds"]))
    return ", ".join([*parts, *_rates(summary)])


def next_commands(kind: str, args: Any, summary: Mapping[str, Any], repeatable: bool) -> list[str]:
    """Return the one or two commands that most people want after a run.

    Args:
        kind: the command that ran.
        args: its settings.
        summary: how it ended, as in summary.json.
        repeatable: whether a command line can repeat the run; it cannot give objects of a Python program.
    """
    run = shlex.quote(args.output_dir)
    repeat = f"tokenrl {kind} --config {run}"
    if summary["exit_reason"].startswith("SIG"):
        return [f"{repeat} --resume auto"] * repeatable
    used = {
        "control": f"advise --run {run}",
        "reward-model": f"train --task TASK --reward {run}/model",
    }
    judged = "control" if "nothing-learnt" in summary.get("flags", ()) else kind
    commands = [f"tokenrl {used.get(judged, f'sample --model {run}')}"]
    name, _, number = args.output_dir.rpartition("-")
    earlier = f"{name}-{int(number) - 1}" if number.isdecimal() else ""
    if earlier and Path(earlier, "config.json").exists():
        commands.append(f"tokenrl report {shlex.quote(earlier)} {run}")
    elif repeatable:
        commands.append(f"{repeat} --seed {args.seed + 1}")
    return commands


def _rates(measured: Mapping[str, Any]) -> list[str]:
    """Return the rates that were measured, as text: tokens or environment steps per second."""
    counts = {unit: measured.get(f"{unit}_per_second") for unit in ("tokens", "env_steps")}
    return [f"{count:,.0f} {unit.replace('_', ' ')}/s" for unit, count in counts.items() if count]
