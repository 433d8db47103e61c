"""Writes numbers and texts for people, and keeps the output clean.

Texts cannot harm a terminal, libraries stay quiet, failed output ends in no traceback.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from tokenrl.errors import Stopped
from tokenrl.runs.metric_table import Row, is_rounding, metric_of

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

UNREAD = 141
"""Exit code of a command whose output nobody reads any more: 128 plus SIGPIPE, as of other programs."""
_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"  # all but newline and tab
CELL = 60
"""Characters of a text that a table shows, of which half may be of its end."""
_MAX_DECIMALS = 6  # of a number with its error
_FAILURES = ("policy-destroyed", "nothing-learnt")
"""Flags of a summary without which the reason why a run ended would mislead."""
_HARMFUL = re.compile(rf"[{_CONTROL}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def quantity(count: int, noun: str) -> str:
    """Return a number with its noun, as in '1 group' and '1,024 groups'."""
    ending = "" if count == 1 else "s"
    return f"{count:,} {noun}{ending}"


def hush_libraries() -> None:
    """Turn off what would hide the lines of a run; a user can turn it on again by the same variables.

    The libraries read these environment variables when they are imported, so call this first.
    """
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def without_warnings(quiet: bool) -> Iterator[None]:
    """Hide Python's warnings inside the block if `quiet`, such as a library's about its next version."""
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets` inside the block.

    From Python, `datasets` may have been imported before `hush_libraries` could be called.
    """
    import datasets

    were_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()


def prepare_streams() -> None:
    """Open /dev/null in place of each standard stream that was closed, as by `>&-`.

    Characters that the encoding of a stream lacks are written as their numbers; bytes that it lacks are read
    as halves of surrogate pairs, which no prompt may hold.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(
                errors="surrogateescape" if name == "stdin" else "backslashreplace"
            )


@contextlib.contextmanager
def checked_output() -> Iterator[None]:
    """Write all that the block has printed.

    Raises:
        Stopped: it could not be written, as on a full disk.
        BrokenPipeError: the program that read it has ended, as with `| head`.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        if isinstance(error, BrokenPipeError) or error.filename is not None:
            raise
        raise Stopped(
            f"The output could not be written ({error}). Send it to a place with space, and run again."
        ) from error


def drop_output() -> None:
    """Connect stdout with /dev/null: what it still buffers would fail again when Python ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def harmless(text: str) -> str:
    r"""Return a text in which characters that could change a terminal are written as escapes, such as \x1b.

    These are control characters but newline and tab, lone surrogates, and those that turn the direction of
    writing, with which a text can show something else than it says.
    """
    return _HARMFUL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def visible(text: str, limit: int | None = None, end: int = 0) -> str:
    r"""Return a harmless text on one line, at most `limit` characters, `end` of its end, newlines as \n."""
    if limit is not None and len(text) > limit:
        start = text[: limit - 1 - end]
        text = f"{start}…{text[len(text) - end :]}"
    return harmless(text).replace("\n", r"\n").replace("\t", r"\t")


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
    plain = partial(Plain, file=file, quiet=quiet, markup=False, emoji=False, highlight=False)
    console = plain()
    # rich would make an output of every line, and ipykernel passes for a terminal
    if console.is_jupyter:
        console = plain(force_jupyter=False, force_terminal=False)
    if not console.is_terminal:
        console.width = width
    return console


def rich_table(
    title: str = "",
    texts: Sequence[str] = (),
    numbers: Sequence[str] = (),
    header: bool = True,
    **options: Any,
) -> Table:
    """Make a table of the library rich.

    Args:
        title: text above the table, aligned left.
        texts: headers of the first columns, which are aligned left.
        numbers: headers of the columns after them, which are aligned right.
        header: whether the headers are shown.
        **options: options of rich for all these columns, such as `no_wrap`.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, show_header=header, title_style="bold", box=box.SIMPLE)
    table.title_justify = "left"
    for name in texts:
        table.add_column(name, **options)
    for name in numbers:
        table.add_column(name, justify="right", **options)
    return table


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
        return visible(str(value), CELL)


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
    flags = [flag for flag in summary.get("flags") or () if flag in _FAILURES]
    remarks = [f" ({words})" for words in (*flags, summary.get("reason")) if words]
    parts = [visible("".join([str(summary.get("exit_reason", "unfinished")), *remarks]))]
    if summary.get("steps") is not None:
        parts.append(f"{summary['steps']} steps")
    if summary.get("wall_seconds") is not None:
        parts.append(duration(summary["wall_seconds"]))
    return ", ".join([*parts, *rates(summary)])


def rates(metrics: Row) -> list[str]:
    """Return the rates that were measured, as text: tokens or environment steps per second."""
    return [
        f"{metrics[name]:,.0f} {metric_of(name).unit}"
        for name in ("tokens_per_second", "env_steps_per_second")
        if metrics.get(name)
    ]
