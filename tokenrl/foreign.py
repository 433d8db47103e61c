"""Says what settings of other toolkits are called here. Imports no torch.

The table foreign.txt has the names of TRL (GRPOConfig, RLOOConfig, SFTConfig, keywords of its trainers and
scripts), the commonest ones of OpenRLHF and verl, and names that tokenrl itself had before. Whoever gives one
as a keyword, as a flag or in a configuration is told ours with the value that it has here; of what tokenrl
has not, a sentence says what happens instead.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.errors import Refused, nearest, suggest

TRL = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 8}
"""The defaults of TRL for numbers of its arithmetic."""
THEIRS = {"per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size", "ratio"}
THEIRS |= {"steps_per_generation", "ppo_mini_batch_size", "processes", "rows", "epochs"}
"""Names in the arithmetic of the table that are no settings of ours."""
OF_DATA = {"prompts_per_step": 16, "batch_size": 64}
"""Our defaults for data that is given from Python."""
NAME, POSITIVE = re.compile("[a-z_]{2,}"), re.compile(r"(?=.*[1-9])\d{0,15}[.]?\d{0,15}")


class Row(NamedTuple):
    """A row of the table: what names of other toolkits are called here.

    Attributes:
        names: the names in other toolkits.
        values: their values for which the row holds, in small letters; empty if it holds for any value.
        ours: our settings with their values; a value is None where it is the one that was given.
        formula: arithmetic that gives the value of the only setting, such as `a x b / c`; or empty.
        remark: what ends the sentence, with a comma before it; without a setting of ours the whole sentence.
        needs: the settings that a command must have for the row to hold.
    """

    names: list[str]
    values: list[str]
    ours: dict[str, str | None]
    formula: str
    remark: str
    needs: set[str]


@cache
def table() -> list[Row]:
    """Read the rows of foreign.txt."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return [_row(line) for line in text.splitlines() if re.match("[a-z].* [|] ", line)]


def _row(line: str) -> Row:
    theirs, target, remark = (part.strip() for part in f"{line} | ".split("|")[:3])
    names, _, values = theirs.partition(" = ")
    target, _, formula = target.partition(" = ")
    words: list[Any] = target.split()
    ours = dict(zip(words[::2], words[1::2] or [None], strict=True))
    needs = {name.strip("()") for name in ours} | {*NAME.findall(formula)} - THEIRS
    ours = {} if target.startswith("(") else ours
    remark = f", {remark}" if ours and remark else remark
    return Row(names.split(), values.split(), ours, formula, remark, needs)


def settings_of(hints: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings of a command, and `estimator.AXIS` for each axis of its estimator."""
    axes = hints.get("estimator")
    return [*hints, *(f"estimator.{axis.name}" for axis in fields(axes))] if is_dataclass(axes) else [*hints]


def meaning(
    name: str, settings: Iterable[str], options: Mapping[str, Any] | None = None, *, flags: bool = False
) -> str:
    """Say what a setting of another toolkit is called here.

    Args:
        name: the name that was given, with underscores.
        settings: the settings that the command has, from `settings_of`.
        options: what the same call gives, its values by name, also that of `name`.
        flags: write our names as flags of the command line, else as keywords.

    Returns:
        A sentence, or an empty text: the name is our own, or not known, or has no meaning for this command.
    """
    settings, options = set(settings), options or {}
    value, preset = options.get(name), options.get("estimator")
    opening = f"Estimator.preset({preset!r}, " if isinstance(preset, str) else "Estimator("
    opening = "" if flags else "dict(" if "arms" in settings else opening
    if name in settings:
        return ""
    if f"estimator.{name}" in settings:
        return f"It is an axis of the estimator: {_written({f'estimator.{name}': value}, opening)}."
    rows = [row for row in table() if name in row.names and row.needs <= settings]
    exact = [row for row in rows if value is not None and str(value).lower() in row.values]
    for row in exact or [row for row in rows if not row.values]:
        return _sentence(row, name, options, opening)
    valued = [
        f"{' and '.join(row.values)} is {_written(row.ours, opening)}{row.remark}" for row in rows if row.ours
    ]
    return f"Of its values {'; '.join(valued)}." if valued else ""


def _sentence(row: Row, name: str, options: Mapping[str, Any], opening: str) -> str:
    """Return what a row says of a name, for the values that were given."""
    if not row.ours:
        return row.remark
    ours, arithmetic = dict[str, Any](row.ours), ""
    (first, value), *_ = ours.items()
    if row.formula:
        numbers = _numbers(name, options)
        words = {name: f"{name} {number:,.12g}" for name, number in numbers.items()}
        arithmetic = f" ({NAME.sub(lambda match: words.get(match[0], match[0]), row.formula)})"
        ours[first] = _result(row.formula, numbers)
    elif value is None and not row.remark:
        ours[first] = options.get(name)
    return f"It is {_written(ours, opening)}{arithmetic}{row.remark}."


def _result(formula: str, numbers: Mapping[str, float]) -> int | None:
    """Do arithmetic such as `a x b / c`, and round up; None if not all its numbers are known."""
    if not {*NAME.findall(formula)} <= numbers.keys():
        return None
    factors, _, divisor = formula.partition(" / ")
    result = prod(numbers[factor] for factor in factors.split(" x ")) / numbers.get(divisor, 1)
    return ceil(round(result, 9))


def _numbers(name: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that arithmetic about a setting may use, as far as they are known."""
    data = next((options[key] for key in ("task", "train_dataset") if options.get(key) is not None), "")
    data = data.get("train", "") if isinstance(data, Mapping) else data
    rows = {"rows": len(data)} if hasattr(data, "__len__") and not isinstance(data, str) else {}
    theirs = {**TRL, "processes": os.environ.get("WORLD_SIZE", 1), **options, **rows}
    theirs |= {"epochs": options.get(name), "ratio": options.get(name)}
    plain = {key: str(value) for key, value in theirs.items() if isinstance(value, str | int | float)}
    numbers = {key: float(value) for key, value in plain.items() if POSITIVE.fullmatch(value)}
    sizes: dict[str, Any] = OF_DATA if rows else {}
    if options.keys() & TRL.keys() - {"num_generations"}:
        batches = [row for row in table() if "gradient_accumulation_steps" in row.names]
        sizes = {setting: _result(row.formula, numbers) for row in batches for setting in row.ours}
    return {name: size for name, size in sizes.items() if size is not None} | numbers


def _written(ours: Mapping[str, Any], opening: str) -> str:
    """Write settings with their values where these are numbers or text.

    Args:
        ours: the settings with their values.
        opening: what opens an estimator as a keyword, such as `Estimator(`; empty to write flags.
    """
    plain = {name: value for name, value in ours.items() if isinstance(value, str | int | float)}
    if not opening:
        return " ".join(_flag(name, plain.get(name)) for name in ours)
    plain = {name: repr(int(v) if str(v).isdigit() else v) for name, v in plain.items()}
    axes = [f"{axis}={plain.get(name, '...')}" for name in ours if (axis := name.partition("estimator.")[2])]
    settings = [f"{n}={plain[n]}" if n in plain else n for n in ours if "." not in n]
    return ", ".join([f"estimator={opening}{', '.join(axes)})", *settings] if axes else settings)


def _flag(name: str, value: Any = None) -> str:
    """Write a setting as a flag; one that is on or off has no value."""
    words = "--" + name.replace("_", "-")
    if str(value).lower() in ("true", "false"):
        return words if str(value).lower() == "true" else f"--no-{words[2:]}"
    return words if value is None else f"{words} {shlex.quote(str(value))}"


def check_names(options: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse keywords that are no settings.

    Args:
        options: the keywords with their values.
        hints: the type of each setting that there is.

    Raises:
        Refused: there is no setting of such a name; the message says for each what it is here, or lists what
            there is.
    """
    settings, names = settings_of(hints), [name for name in options if name not in hints]
    _refuse("setting", {repr(n): meaning(n, settings, options) or suggest(n, hints).strip() for n in names})


def check_flags(unknown: list[str], hints: Mapping[str, Any], prog: str, options: Mapping[str, Any]) -> None:
    """Refuse words of a command line that are no flags of the command.

    Args:
        unknown: the words; those that are not flags are values of the flags before them.
        hints: the type of each setting that the command has.
        prog: the command.
        options: the settings that the command line gives, by name.

    Raises:
        Refused: there is such a word; the message says for each what its flag is called here, or is near.
    """
    settings, values, flag = settings_of(hints), dict[str, str | None](), ""
    for word in unknown:
        if word.startswith("--") or not values:
            flag, _, value = word.partition("=")
            values[flag] = value or None
        else:
            values[flag] = values[flag] or word
    flags, refused = [_flag(setting) for setting in settings], {}
    options = {**options, **{flag[2:].replace("-", "_"): value for flag, value in values.items()}}
    for flag in values:
        near = f"{nearest(flag, flags)} See {prog} --help.".strip()
        refused[flag] = meaning(flag[2:].replace("-", "_"), settings, options, flags=True) or near
    _refuse("flag", refused)


def _refuse(kind: str, hints: Mapping[str, str]) -> None:
    """Refuse names that there are not, in one paragraph; those with the same hint share it."""
    by_hint: dict[str, list[str]] = {}
    for name, hint in hints.items():
        by_hint.setdefault(hint, []).append(name)
    if hints:
        raise Refused(" ".join(f"There is no {kind} {' or '.join(n)}. {hint}" for hint, n in by_hint.items()))
