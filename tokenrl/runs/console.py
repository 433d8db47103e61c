"""What a person sees of a run: a header, one live line (plain lines in a log), samples, before and after."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

_LOSS_NOTE = (
    "The loss is no measure of progress: it weighs log-probabilities by advantages, "
    "which average to about 0 by construction; watch the reward and the evaluation."
)
_CELL = 60  # characters of a prompt or completion shown in a table


def rich_console(*, width: int = 110, quiet: bool = False, file: TextIO | None = None) -> RichConsole:
    """Make a console of rich for texts that come from data and models.

    Args:
        width: characters in a line where there is no terminal to ask.
        quiet: print nothing.
        file: instead of stdout.
    """
    from rich.console import Console as RichConsole

    # no markup, no emoji codes, no guessing at what to highlight: the texts are not ours
    console = RichConsole(file=file, quiet=quiet, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def rich_table(
    title: str = "",
    left: Sequence[str] = (),
    right: Sequence[str] = (),
    *,
    show_header: bool = True,
    **column: Any,
) -> Table:
    """Make a table of rich.

    Args:
        title: above the table, at its left.
        left: heads of the columns of text, which stand at the left.
        right: heads of the columns of numbers, which stand at the right of the others.
        show_header: whether the heads are shown.
        **column: options of rich for all these columns, such as `no_wrap`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = Text(title, style="bold") if title else None
    table = Table(title=heading, title_justify="left", box=box.SIMPLE, show_header=show_header)
    for name in left:
        table.add_column(name, **column)
    for name in right:
        table.add_column(name, justify="right", **column)
    return table


class Console:
    """Prints the course of a run; every process but the first passes `quiet=True` and prints nothing."""

    def __init__(self, *, quiet: bool = False, file: TextIO | None = None, every: int = 10) -> None:
        """Set where to print.

        Args:
            quiet: print nothing.
            file: instead of stdout.
            every: steps between two lines where there is no terminal to redraw a line on.
        """
        self.every = every
        self.rich = rich_console(quiet=quiet, file=file)

    def start(self, title: str, facts: Mapping[str, Any], *, note: str = _LOSS_NOTE) -> None:
        """Print the header: what is trained and how, and what its loss means."""
        table = rich_table(title, show_header=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, fact in facts.items():
            table.add_row(self._visible(name), self._visible(fact))
        self.rich.print(table)
        self.rich.print(note, style="italic dim")

    def progress(self, total: int) -> Progress:
        """Make the live line of a run of `total` steps, a context manager."""
        return Progress(self, total)

    def completions_table(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Print prompt, completion, reward and advantage of each row; control characters made visible."""
        table = rich_table("Sample completions")
        for column in ("prompt", "completion"):
            table.add_column(column, overflow="fold", ratio=1)
        for column in ("reward", "advantage"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            texts = [self._visible(row.get(key, ""), _CELL) for key in ("prompt", "completion")]
            table.add_row(*texts, *(number(row.get(key)) for key in ("reward", "advantage")))
        self.rich.print(table)

    def note(self, message: str) -> None:
        """Print a message as it is, on lines of its own."""
        self.rich.print(message, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.rich.print(f"warning: {message}", style="yellow")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the evaluation before and after training, and how the run ended, from summary.json."""
        before, after = summary.get("eval_before") or {}, summary.get("eval_after") or {}
        table = rich_table("Evaluation", ("",), ("before",))
        table.add_column("after", justify="right", style="bold")
        for name in dict.fromkeys([*before, *after]):
            table.add_row(self._visible(name), number(before.get(name)), number(after.get(name)))
        if table.rows:
            self.rich.print(table)
        self.rich.print(ending(summary))

    def _visible(self, text: object, limit: int | None = None) -> str:
        line = visible(str(text), limit)
        encoding = self.rich.encoding or "utf-8"
        return line.encode(encoding, "backslashreplace").decode(encoding)


class Progress:
    """One live line: step, reward, last evaluation, rate, time left; in a log, a line each `every` steps."""

    def __init__(self, console: Console, total: int) -> None:
        """Prepare the line; it appears on entering the context."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as RichProgress, TextColumn

        self._console, self._total, self._first, self._began = console, total, 0, time.monotonic()
        self._evaluation = ""
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.fields[line]}"))
        self._live = RichProgress(*columns, console=console.rich, disable=not console.rich.is_terminal)
        self._task = self._live.add_task("", total=total, line="")

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a step.

        Args:
            step: updates made so far.
            metrics: reads reward (or loss, where there is none), eval_reward_greedy or eval_reward (the last
                one stays on the line), and tokens_per_second or env_steps_per_second, whichever are there.
        """
        evaluated = metrics.get("eval_reward_greedy", metrics.get("eval_reward"))
        if evaluated is not None:
            self._evaluation = f"eval {number(evaluated)}"
        shown = next((name for name in ("reward", "loss") if name in metrics), None)
        value = "" if shown is None else f"{shown} {number(metrics[shown])}"
        rate = next((f"{metrics[f'{unit}_per_second']:,.0f} {word}/s" for unit, word in _RATES
                     if metrics.get(f"{unit}_per_second")), "")  # fmt: skip
        line = "  ".join(part for part in (value, self._evaluation, rate, self._left(step)) if part)
        self._live.update(self._task, completed=step, line=line)
        plain = not self._console.rich.is_terminal
        if plain and (step % self._console.every == 0 or step in (1, self._total) or evaluated is not None):
            self._console.rich.print(
                f"step {step:>{len(str(self._total))}}/{self._total}  {line}", soft_wrap=True
            )

    def _left(self, step: int) -> str:
        if not 0 < step < self._total:
            return ""
        seconds = round((time.monotonic() - self._began) / step * (self._total - step))
        return f"ETA {duration(seconds)}"


_RATES = (("tokens", "tokens"), ("env_steps", "env steps"))


def visible(text: str, limit: int | None = None) -> str:
    r"""Put a text on one line, control characters as \n or \x1b, cut to `limit` characters."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: Any) -> str:
    """Write a number with four figures; a dash for none."""
    if value is None:
        return "-"
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return visible(str(value), _CELL)


def duration(seconds: float) -> str:
    """Write seconds as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def ending(summary: Mapping[str, Any]) -> str:
    """Say in one line how a run ended: reason, steps, time, rate; takes what summary.json holds."""
    parts = [visible(str(summary.get("exit_reason", "unfinished")))]
    if summary.get("steps") is not None:
        parts.append(f"{summary['steps']} steps")
    if summary.get("wall_seconds") is not None:
        parts.append(duration(summary["wall_seconds"]))
    for unit, word in _RATES:
        if summary.get(f"{unit}_per_second"):
            parts.append(f"{summary[f'{unit}_per_second']:,.0f} {word}/s")
    return ", ".join(parts)
