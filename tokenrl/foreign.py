"""Says what settings of other toolkits, and of earlier versions of tokenrl, are called here. Imports no torch.

The table foreign.txt has the names of TRL (GRPOConfig, RLOOConfig, SFTConfig, keywords of its trainers and
scripts), the usual ones of OpenRLHF, verl and Stable-Baselines3, and those that tokenrl itself had. A keyword,
a flag or a line of a configuration with such a name is refused with one sentence: our name, or what happens
instead. So is a preset or a choice that tokenrl had in earlier versions.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.errors import Refused, nearest, suggest


class Row(NamedTuple):
    """A row of the table: what names of other toolkits are called here.

    Attributes:
        names: The names in other toolkits.
        values: Their values for which the row holds, in small letters; empty if it holds for any value.
        ours: Our settings with their values; a value is None where the user's value stays.
        remark: The end of the sentence, with a comma before it; without a setting of ours the whole sentence.
        needs: The settings that a command must have for the row to hold.
    """

    names: list[str]
    values: list[str]
    ours: dict[str, Any]
    remark: str
    needs: set[str]

    def sentence(self, value: Any, *, flags: bool) -> str:
        """Return what the row says of a value of the user, which stays unless the row has a remark or values."""
        if not self.ours:
            return self.remark
        users = None if self.remark else value
        ours = {name: users if our is None else our for name, our in self.ours.items()}
        return f"It is {_written(ours, flags=flags)}{self.remark}."


@cache
def table() -> list[Row]:
    """Read the rows of foreign.txt."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return [_row(line) for line in lines if re.match("[a-z].* [|] ", line)]


def _row(line: str) -> Row:
    theirs, target, *remarks = (part.strip() for part in line.split("|"))
    names, _, values = theirs.partition(" = ")
    target, _, need = target.partition("(")
    words: list[Any] = [int(word) if word.isdigit() else word for word in target.split()]
    ours = dict(zip(words[::2], words[1::2] or [None], strict=False))
    needs = {*ours, need.removesuffix(")")} - {""}
    remark = ", ".join(["", *remarks] if ours else remarks)
    return Row(names.split(), values.split(), ours, remark, needs)


def settings_of(hints: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings of a command, and `estimator.AXIS` for each axis of its estimator."""
    axes = hints.get("estimator")
    if not is_dataclass(axes):
        return [*hints]
    return [*hints, *(f"estimator.{axis.name}" for axis in fields(axes))]


def meaning(name: str, settings: Iterable[str], value: Any = None, *, flags: bool = False) -> str:
    """Say what a setting of another toolkit is called here.

    Args:
        name: The user's name of the setting, with underscores; of one with dots the last part is known too.
        settings: The settings that the command has, from `settings_of`; none for a value that a setting of ours
            had in earlier versions.
        value: The user's value.
        flags: Write our names as flags of the command line, else as keywords.

    Returns:
        A sentence, or an empty text: the name is our own, or not in the table, or the command has no use for it.
    """
    settings = set(settings)
    if name in settings:
        return ""
    last = name.rpartition(".")[2]
    axis = f"estimator.{last}"
    if axis in settings:
        return f"It is an axis of the estimator: {_written({axis: value}, flags=flags)}."
    rows = [row for row in table() if {name, last} & {*row.names} and row.needs <= settings]
    for row in rows:
        if value is not None and str(value).lower() in row.values:
            return row.sentence(value, flags=flags)
    for row in rows:
        if not row.values:
            return row.sentence(value, flags=flags)
    of_values = [
        f"{' and '.join(row.values)} is {_written(row.ours, flags=flags)}{row.remark}"
        for row in rows
        if row.ours
    ]
    return f"Of its values {'; '.join(of_values)}." if of_values else ""


def _written(ours: Mapping[str, Any], *, flags: bool) -> str:
    """Write settings as flags or as keywords; the value of a keyword that is None is left out, of an axis open."""
    if flags:
        return " ".join(_flag(name.replace("_", "-"), value) for name, value in ours.items())
    keywords = []
    axes = []
    for name, value in ours.items():
        _, is_axis, axis = name.partition("estimator.")
        if is_axis:
            axes.append(f"{axis}={'...' if value is None else repr(value)}")
        else:
            keywords.append(name if value is None else f"{name}={value!r}")
    if axes:
        keywords.append(f"estimator=Estimator({', '.join(axes)})")
    return ", ".join(keywords)


def _flag(name: str, value: Any) -> str:
    """Write a setting as a flag; a switch has no value."""
    text = "true" if value is None else str(value)
    if text.lower() in ("true", "false"):
        return f"--{name}" if text.lower() == "true" else f"--no-{name}"
    return f"--{name} {shlex.quote(text)}"


def check_names(options: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse keywords that are no settings.

    Args:
        options: The keywords with their values.
        hints: The type of each setting that there is.

    Raises:
        Refused: There is no setting of such a name; the message has for each our name, or lists the settings.
    """
    settings = settings_of(hints)
    sentences = {
        repr(name): meaning(name, settings, value) or suggest(name, hints).strip()
        for name, value in options.items()
        if name not in hints
    }
    _refuse("setting", sentences)


def check_flags(unknown: list[str], hints: Mapping[str, Any], prog: str) -> None:
    """Refuse words of a command line that are no flags of the command.

    Args:
        unknown: The words. Those that are not flags are values of the flags before them, or NAME=VALUE as verl
            writes its settings.
        hints: The type of each setting that the command has.
        prog: The command.

    Raises:
        Refused: There is such a word; the message has for each the name of its flag here, or the nearest flag.
    """
    values = dict[str, str]()
    flag = ""
    for word in unknown:
        if word.startswith("--") or not values or (values[flag] and "=" in word):
            flag, _, values[flag] = word.partition("=")
        elif not values[flag]:
            values[flag] = word
    settings = settings_of(hints)
    flags = _written(dict.fromkeys(settings), flags=True).split()
    sentences = {}
    for flag, value in values.items():
        name = flag.removeprefix("--").replace("-", "_")
        sentence = meaning(name, settings, value or "true", flags=True)
        if not (sentence or flag.startswith("--")):
            sentence = (
                "No flag takes this word: a text with spaces stands in quotes, a switch takes no value, as --quiet "
                f"or --no-quiet, and a run follows its flag, such as --model. See {prog} --help."
            )
        sentences[flag] = sentence or f"{nearest(flag, flags)} See {prog} --help.".strip()
    _refuse("flag", sentences)


def _refuse(kind: str, sentences: Mapping[str, str]) -> None:
    """Refuse names that do not exist, with a line for each sentence, which several may share."""
    names = defaultdict[str, list[str]](list)
    for name, sentence in sentences.items():
        names[sentence].append(name)
    lines = [f"There is no {kind} {' or '.join(n)}. {text}" for text, n in names.items()]
    if lines:
        raise Refused("\n".join(lines))
