"""Says what settings of other toolkits, and of earlier versions of tokenrl, are called here. Imports no torch.

The table foreign.txt has the names of TRL (GRPOConfig, RLOOConfig, SFTConfig, keywords of its trainers and
scripts), the usual ones of OpenRLHF, verl and Stable-Baselines3, and those that tokenrl itself had. A keyword,
a flag or a line of a configuration with such a name is refused with one sentence: our name, or what happens
instead. The last line of the message is the whole command with our names. It starts from the toolkit's own
estimator, since names that are left out have its defaults; `...` stands for a number that a sentence computes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.errors import Refused, nearest, suggest

PLAIN = (str, int, float)
"""Types of values that are written as they are."""


class Row(NamedTuple):
    """A row of the table: what names of other toolkits are called here.

    Attributes:
        names: The names in other toolkits.
        values: Their values for which the row holds, in small letters; empty if it holds for any value.
        ours: Our settings with their values; a value is None where the row has none.
        remark: The end of the sentence, with a comma before it; without a setting of ours the whole sentence.
        needs: The settings that a command must have for the row to hold.
    """

    names: list[str]
    values: list[str]
    ours: dict[str, str | int | None]
    remark: str
    needs: set[str]

    def translate(self, value: Any) -> dict[str, Any]:
        """Return our settings with their values; a setting that is only renamed has the user's value."""
        if self.remark:
            return dict(self.ours)
        return {setting: value if ours is None else ours for setting, ours in self.ours.items()}


@cache
def _lines() -> list[str]:
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return text.splitlines()


@cache
def table() -> list[Row]:
    """Read the rows of foreign.txt."""
    return [_row(line) for line in _lines() if re.match("[a-z].* [|] ", line)]


@cache
def starts() -> list[list[str]]:
    """Read where a whole command starts, from foreign.txt: a preset, a setting of the command, and names."""
    return [line.split()[1:] for line in _lines() if line.startswith("starts ")]


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


def _rows(name: str, settings: set[str]) -> list[Row]:
    return [row for row in table() if name in row.names and row.needs <= settings]


def _row_for(name: str, settings: set[str], value: Any) -> Row | None:
    """Return the row of a name that holds for a value; a row for this very value comes first."""
    rows = _rows(name, settings)
    exact = [row for row in rows if value is not None and str(value).lower() in row.values]
    return next(iter([*exact, *(row for row in rows if not row.values)]), None)


def meaning(
    name: str,
    settings: Iterable[str],
    options: Mapping[str, Any] | None = None,
    *,
    flags: bool = False,
) -> str:
    """Say what a setting of another toolkit is called here.

    Args:
        name: The user's name of the setting, with underscores.
        settings: The settings that the command has, from `settings_of`.
        options: The options of the same call, their values by name, also that of `name`.
        flags: Write our names as flags of the command line, else as keywords.

    Returns:
        A sentence, or an empty text: the name is our own, or not in the table, or the command has no use for it.
    """
    settings = set(settings)
    options = options or {}
    value = options.get(name)
    axis = f"estimator.{name}"
    write = _flags if flags else partial(_keywords, opening=_opening(settings, options))
    if name in settings:
        return ""
    if axis in settings:
        return f"It is an axis of the estimator: {write({axis: value})}."
    row = _row_for(name, settings, value)
    if row is not None:
        return f"It is {write(row.translate(value))}{row.remark}." if row.ours else row.remark
    valued = [
        f"{' and '.join(row.values)} is {write(row.ours)}{row.remark}"
        for row in _rows(name, settings)
        if row.ours
    ]
    return f"Of its values {'; '.join(valued)}." if valued else ""


def translated(
    names: Iterable[str], settings: Iterable[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return our settings that names of other toolkits stand for together.

    A value is `...` where it has to be computed. Unless the options or the names say which estimator, it is
    the default of their toolkit.

    Args:
        names: The names, with underscores.
        settings: The settings that the command has, from `settings_of`.
        options: The options of the same call, their values by name.
    """
    names = set(names)
    settings = set(settings)
    ours = dict[str, Any]()
    for name in [name for name in options if name in names]:
        row = _row_for(name, settings, options[name])
        if f"estimator.{name}" in settings:
            ours[f"estimator.{name}"] = options[name]
        elif row is not None:
            ours |= row.translate(options[name])
    ours = {setting: ... if value is None else value for setting, value in ours.items()}
    if ours and not {"estimator", "arms"} & {*options, *ours}:
        for preset, needed, *signs in starts():
            if needed in settings and names & {*signs}:
                return {"estimator": preset} | ours
    return ours


def _opening(settings: Iterable[str], options: Mapping[str, Any]) -> str:
    """Return the text that opens the estimator of a call, such as `Estimator.preset('grpo', `."""
    if "arms" in settings:
        return "dict("
    preset = options.get("estimator")
    return f"Estimator.preset({preset!r}, " if isinstance(preset, str) else "Estimator("


def _keywords(ours: Mapping[str, Any], opening: str) -> str:
    """Write settings as keywords of a call; `opening` begins the estimator that has the axes among them."""
    axes = list[str]()
    keywords = dict[str, str]()
    for setting, value in ours.items():
        _, is_axis, axis = setting.partition("estimator.")
        name = axis if is_axis else setting
        if isinstance(value, PLAIN):
            text = f"{name}={value!r}"
        else:
            text = name if value is None and not is_axis else f"{name}=..."
        if is_axis:
            axes.append(text)
            text = f"estimator={opening}{', '.join(axes)})"
        keywords["estimator" if is_axis else setting] = text
    return ", ".join(keywords.values())


def _flags(ours: Mapping[str, Any]) -> str:
    """Write settings as flags; one that is on or off has no value."""
    words = []
    for setting, value in ours.items():
        name = setting.replace("_", "-")
        if str(value).lower() in ("true", "false"):
            words.append(f"--{name}" if str(value).lower() == "true" else f"--no-{name}")
        elif value is None:
            words.append(f"--{name}")
        else:
            text = str(value) if isinstance(value, PLAIN) else "..."
            words.append(f"--{name} {shlex.quote(text)}")
    return " ".join(words)


def check_names(options: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse keywords that are no settings.

    Args:
        options: The keywords with their values.
        hints: The type of each setting that there is.

    Raises:
        Refused: There is no setting of such a name; the message has for each our name, or lists the settings.
    """
    names = [name for name in options if name not in hints]
    settings = settings_of(hints)
    ours = translated(names, settings, options)
    sentences = {}
    for name in names:
        sentence = meaning(name, settings, {**options, **ours})
        sentences[repr(name)] = sentence or suggest(name, hints).strip()
    call = {name: value for name, value in options.items() if name in hints} | ours
    _refuse("setting", sentences, ours, _keywords(call, _opening(settings, call)))


def check_flags(
    unknown: list[str],
    hints: Mapping[str, Any],
    prog: str,
    options: Mapping[str, Any],
    typed: Iterable[str] = (),
) -> None:
    """Refuse words of a command line that are no flags of the command.

    Args:
        unknown: The words; those that are not flags are values of the flags before them.
        hints: The type of each setting that the command has.
        prog: The command.
        options: The settings that the command line gives, by name.
        typed: All words of the command line.

    Raises:
        Refused: There is such a word; the message has for each the name of its flag here, or the nearest flag.
    """
    values = dict[str, str]()
    flag = ""
    for word in unknown:
        if word.startswith("--") or not values:
            flag, _, values[flag] = word.partition("=")
        elif not values[flag]:
            values[flag] = word
    names = {flag: flag[2:].replace("-", "_") for flag in values}
    options = {**options, **{names[flag]: value or "true" for flag, value in values.items()}}
    settings = settings_of(hints)
    ours = translated(names.values(), settings, options)
    flags = _flags(dict.fromkeys(settings)).split()
    sentences = {}
    for flag, name in names.items():
        sentence = meaning(name, settings, options | ours, flags=True)
        sentences[flag] = sentence or f"{nearest(flag, flags)} See {prog} --help.".strip()
    words = [prog]
    rest = list(unknown)
    for word in typed:
        if rest[:1] == [word]:
            rest.pop(0)
        else:
            words.append(shlex.quote(word))
    _refuse("flag", sentences, ours, " ".join([*words, _flags(ours)]))


def _refuse(kind: str, sentences: Mapping[str, str], ours: Mapping[str, Any], whole: str) -> None:
    """Refuse names that do not exist, with one line for each sentence; names with the same sentence share it.

    Args:
        kind: The kind of the names.
        sentences: A sentence for each name.
        ours: Our settings that the names stand for together.
        whole: The call with these instead. It is shown if it says more than the sentences do.
    """
    if not sentences:
        return
    by_sentence: dict[str, list[str]] = {}
    for name, sentence in sentences.items():
        by_sentence.setdefault(sentence, []).append(name)
    lines = [f"There is no {kind} {' or '.join(n)}. {text}" for text, n in by_sentence.items()]
    if ours and (len(sentences) > 1 or len(ours) > 1):
        lines.append(f"All together: {whole}")
    raise Refused("\n".join(lines))
