"""Says what settings of other toolkits are called here. Imports no torch.

The table foreign.txt has the names of TRL (GRPOConfig, RLOOConfig, SFTConfig, keywords of its trainers and
scripts), the commonest ones of OpenRLHF, verl and Stable-Baselines3, and names that tokenrl itself had
before. Whoever gives one as a keyword, as a flag or in a configuration is told ours with the value that it
has here; of what tokenrl has not, a sentence says what happens instead. At the end stands the whole command,
which starts from the toolkit's own estimator, since names that are left out have its defaults.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.errors import Refused, nearest, suggest

TRL = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 8}
"""The defaults of TRL for numbers of its arithmetic."""
THEIRS = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "ratio",
}
THEIRS |= {"steps_per_generation", "ppo_mini_batch_size", "processes", "rows", "epochs", "size"}
THEIRS |= {"total_timesteps"}
"""Names in the arithmetic of the table that are no settings of ours."""
OF_DATA = {"prompts_per_step": 16, "batch_size": 64}
"""Our defaults for data whose number of rows is known."""
OF_AGENTS = {"num_envs": 64}
"""Our defaults for agents."""
PLAIN = (str, int, float)
"""Types of values that are written as they are."""
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


@cache
def starts() -> list[list[str]]:
    """Read the lines of foreign.txt that say where a whole command starts: a preset, a setting, and names."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return [line.split()[1:] for line in text.splitlines() if line.startswith("starts ")]


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
    return (
        [*hints, *(f"estimator.{axis.name}" for axis in fields(axes))]
        if is_dataclass(axes)
        else [*hints]
    )


def meaning(
    name: str,
    settings: Iterable[str],
    options: Mapping[str, Any] | None = None,
    *,
    flags: bool = False,
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
    opening = "" if flags else _opening(settings, options)
    if name in settings:
        return ""
    if f"estimator.{name}" in settings:
        axis = {f"estimator.{name}": options.get(name)}
        return f"It is an axis of the estimator: {_written(axis, opening)}."
    rows = [row for row in table() if name in row.names and row.needs <= settings]
    for row in _holding(rows, options.get(name)):
        if not row.ours:
            return row.remark
        ours, arithmetic = _ours(row, name, options), ""
        if row.formula:
            numbers = {n: f"{n} {number:,.12g}" for n, number in _numbers(name, options).items()}
            words = re.split(f"({NAME.pattern})", row.formula)
            arithmetic = f" ({''.join(numbers.get(word, word) for word in words)})"
        return f"It is {_written(ours, opening)}{arithmetic}{row.remark}."
    valued = [
        f"{' and '.join(row.values)} is {_written(row.ours, opening)}{row.remark}"
        for row in rows
        if row.ours
    ]
    return f"Of its values {'; '.join(valued)}." if valued else ""


def _opening(settings: Iterable[str], options: Mapping[str, Any]) -> str:
    """Return what opens the estimator of a call, such as `Estimator.preset('grpo', `."""
    preset = options.get("estimator")
    opening = f"Estimator.preset({preset!r}, " if isinstance(preset, str) else "Estimator("
    return "dict(" if "arms" in settings else opening


def _holding(rows: Sequence[Row], value: Any) -> Sequence[Row]:
    """Return the rows of a name that hold for a value, the first of which counts."""
    exact = [row for row in rows if value is not None and str(value).lower() in row.values]
    return exact or [row for row in rows if not row.values]


def _ours(row: Row, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings that a row names, with their values as far as these are known."""
    ours = dict[str, Any](row.ours)
    (first, value), *_ = ours.items()
    if row.formula:
        ours[first] = _result(row.formula, _numbers(name, options))
    elif value is None and not row.remark:
        ours[first] = options.get(name)
    return ours


def translated(
    names: Iterable[str], settings: Iterable[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return our settings that names of other toolkits stand for together, with the values that are known.

    Where they say nothing else, the estimator is the default of their toolkit.

    Args:
        names: the names, with underscores.
        settings: the settings that the command has, from `settings_of`.
        options: what the same call gives, its values by name.
    """
    names, settings, ours = list(names), set(settings), dict[str, Any]()
    for name in [*names, *names]:  # twice, as arithmetic may need what a later name stands for
        rows = [row for row in table() if name in row.names and row.needs <= settings]
        for row in _holding(rows, options.get(name))[:1]:
            if row.ours:
                ours |= _ours(row, name, {**ours, **options})
        if f"estimator.{name}" in settings:
            ours[f"estimator.{name}"] = options[name]
    ours = {name: value for name, value in ours.items() if value is not None}
    presets = [
        preset for preset, needed, *of in starts() if needed in settings and {*of} & {*names}
    ]
    if presets and ours and not {"estimator", "arms"} & {*options, *ours}:
        return {"estimator": presets[0]} | ours
    return ours


def _result(formula: str, numbers: Mapping[str, float]) -> int | None:
    """Do arithmetic such as `a x b / c`, and round up; None if not all its numbers are known."""
    if not {*NAME.findall(formula)} <= numbers.keys():
        return None
    above, _, below = formula.partition(" / ")
    result = prod(numbers[name] for name in above.split(" x "))
    result /= prod(numbers[name] for name in NAME.findall(below))
    return ceil(round(result, 9))


def _numbers(name: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that arithmetic about a setting may use, as far as they are known."""
    data = next(
        (options[key] for key in ("task", "train_dataset") if options.get(key) is not None), ""
    )
    data = data.get("train", "") if isinstance(data, Mapping) else data
    rows = {"rows": len(data)} if hasattr(data, "__len__") and not isinstance(data, str) else {}
    if isinstance(data, str) and data.endswith(".jsonl") and os.path.isfile(data):
        rows = {"rows": sum(1 for line in Path(data).read_bytes().splitlines() if line.strip())}
    theirs = {**TRL, "processes": os.environ.get("WORLD_SIZE", 1), **options, **rows}
    theirs |= dict.fromkeys(("epochs", "ratio", "size"), options.get(name))
    plain = {key: str(value) for key, value in theirs.items() if isinstance(value, PLAIN)}
    numbers = {key: float(value) for key, value in plain.items() if POSITIVE.fullmatch(value)}
    sizes: dict[str, Any] = OF_AGENTS | (OF_DATA if rows else {})
    if options.keys() & TRL.keys() - {"num_generations"}:
        batches = [row for row in table() if "gradient_accumulation_steps" in row.names]
        sizes |= {setting: _result(row.formula, numbers) for row in batches for setting in row.ours}
    return {name: size for name, size in sizes.items() if size is not None} | numbers


def _written(ours: Mapping[str, Any], opening: str) -> str:
    """Write settings with their values where these are numbers or text.

    Args:
        ours: the settings with their values.
        opening: what opens an estimator as a keyword, such as `Estimator(`; empty to write flags.
    """
    plain = {name: value for name, value in ours.items() if isinstance(value, PLAIN)}
    if not opening:
        return " ".join(_flag(name, plain.get(name)) for name in ours)
    plain = {name: repr(int(v) if str(v).isdigit() else v) for name, v in plain.items()}
    axes = [
        f"{axis}={plain.get(name, '...')}"
        for name in ours
        if (axis := name.partition("estimator.")[2])
    ]
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
    ours = translated(names, settings, options)
    refused = {
        repr(n): meaning(n, settings, {**options, **ours}) or suggest(n, hints).strip()
        for n in names
    }
    call = {name: value for name, value in options.items() if name in hints} | ours
    opening = _opening(settings, call)
    if any("." in name for name in ours):  # axes of that estimator
        call.pop("estimator", None)
    objects = [f"{name}=..." for name, value in call.items() if not isinstance(value, PLAIN)]
    plain = {name: value for name, value in call.items() if isinstance(value, PLAIN)}
    _refuse("setting", refused, ours, ", ".join([*objects, _written(plain, opening)]))


def check_flags(
    unknown: list[str],
    hints: Mapping[str, Any],
    prog: str,
    options: Mapping[str, Any],
    typed: Iterable[str] = (),
) -> None:
    """Refuse words of a command line that are no flags of the command.

    Args:
        unknown: the words; those that are not flags are values of the flags before them.
        hints: the type of each setting that the command has.
        prog: the command.
        options: the settings that the command line gives, by name.
        typed: all words of the command line.

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
    names = {flag: flag[2:].replace("-", "_") for flag in values}
    options = {**options, **{names[flag]: value or "true" for flag, value in values.items()}}
    ours = translated(names.values(), settings, options)
    flags, refused = [_flag(setting) for setting in settings], {}
    for flag, name in names.items():
        near = f"{nearest(flag, flags)} See {prog} --help.".strip()
        refused[flag] = meaning(name, settings, options | ours, flags=True) or near
    words, left, is_value = [prog], list(unknown), False
    for word in typed:
        is_value = left[:1] == [word] and (is_value or word.startswith("--"))
        if is_value:
            left.pop(0)
        else:
            words.append(shlex.quote(word))
    _refuse("flag", refused, ours, " ".join([*words, _written(ours, "")]))


def _refuse(kind: str, hints: Mapping[str, str], ours: Mapping[str, Any], whole: str) -> None:
    """Refuse names that there are not, one hint a line; those with the same hint share it.

    Args:
        kind: what the names are.
        hints: a hint for each name.
        ours: our settings that the names stand for together.
        whole: the call with these instead. It is shown if it says more than the hints do.
    """
    by_hint: dict[str, list[str]] = {}
    for name, hint in hints.items():
        by_hint.setdefault(hint, []).append(name)
    lines = [f"There is no {kind} {' or '.join(n)}. {hint}" for hint, n in by_hint.items()]
    if ours and (len(hints) > 1 or len(ours) > 1):
        lines.append(f"All together: {whole}")
    if hints:
        raise Refused("\n".join(lines))
