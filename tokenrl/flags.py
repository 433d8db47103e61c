"""Makes the flags of a command from the dataclass of its arguments, and reads them. Imports no torch.

What a command line gives stays text; the settings made of it convert a text, or refuse it as they refuse a value
from Python.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from inspect import cleandoc, get_annotations
from types import NoneType
from typing import Any, Literal, NamedTuple

from docstring_parser import parse_from_object

from tokenrl.configuration import check_code, check_escapes, configured, directory_of, read_config
from tokenrl.control.arguments import ABOUT_AGENT, AGENTS, ControlArguments, agent_settings
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.foreign import check_flags
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs.files import plain
from tokenrl.runs.output import rich_console
from tokenrl.settings import arguments, field_types, mentions, names_in

ABOUT_CONFIG = (
    "Read settings from this file: a run's config.json, or JSON or YAML. Flags override it. Code that a run "
    "names is executed only if you trained the run with it yourself, or with --trust-run."
)
SWITCH_OR_AUTO = bool | Literal["auto"]
"""The type of a switch that also takes the word auto."""
SWITCHES = (bool, bool | None, SWITCH_OR_AUTO)
WORDS = {int: "INT", float: "FLOAT", str: "STR", Estimator: "PRESET"}
"""By the type of a value, the word that stands for it in the help."""


class Command(NamedTuple):
    """A command: its arguments, and the function that runs it.

    The function is given by name, as `module:function`, so that its module is imported only when it runs.
    """

    arguments: Any
    function: str


def parse(name: str, command: Command, argv: list[str]) -> Any:
    """Parse the arguments of a command. --config, --agent and --estimator set defaults; flags change them.

    Args:
        name: Name of the command.
        command: The command.
        argv: The words after the name.

    Raises:
        Refused: A flag or a value is not allowed.
    """
    kind = command.arguments
    prog = f"tokenrl {name}"
    words = [word for word in argv if word not in ("-h", "--help")]
    options = dict[str, Any]()
    unknown = list[str]()
    if words or not argv:
        options, unknown = _read_options(kind, words)
    start = _starting_settings(name, kind, options)
    if len(words) < len(argv):
        _print_help(kind, prog, start)
        raise SystemExit(0)
    hints = dict(field_types(kind))
    if kind is CompareArguments:
        stored = _stored_comparison(options.pop("config", None))
        runs = ControlArguments if "env" in stored | options else TrainArguments
        shared, unknown = _shared(runs, unknown)
        start = with_shared(stored | shared)
        hints |= field_types(runs)  # type: ignore[arg-type]
    check_flags(unknown, hints, prog)
    return arguments(kind, start | options)


def _about(kind: Any) -> str:
    """Return what the help of a command says first, with the presets if it has an estimator."""
    about = cleandoc(kind.__doc__)
    if "estimator" not in field_types(kind):
        return about
    width = max(map(len, PRESETS)) + 2
    presets = [f"  {name:{width}}{Estimator.preset(name).bias_status}" for name in PRESETS]
    lines = [
        about,
        "--estimator PRESET sets every axis of the estimator; --estimator.AXIS changes one axis.",
        "The presets, and the bias of the expected gradient with each:",
    ]
    return "\n".join([*lines, *presets])


def _stored_comparison(config: str | None) -> dict[str, Any]:
    """Read the settings of a comparison from a file, if one is named."""
    if config is None:
        return {}
    stored = read_config(config)
    if directory_of(config, stored):
        raise Refused(f"{config} is the configuration of a run; compare takes a file of settings.")
    return stored


def _read_options(kind: Any, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a command line gives, by name, and its words that belong to no flag of the command.

    A word that begins with -- is a flag, and the words up to the next one are its values. A list flag that is
    repeated adds to its first values. Words before all flags are the values of the field without a default.

    Raises:
        Refused: A flag has more values than it takes, or none.
    """
    hints = _types_of(kind)
    off = {
        _negated(name).replace("-", "_"): name for name, hint in hints.items() if hint in SWITCHES
    }
    parts = [[f"--{each.name}" for each in fields(kind) if is_required(each)] or [""]]
    for word in argv:
        if word.startswith("--"):
            parts.append([])
        parts[-1].append(word)
    options = dict[str, Any]()
    unknown = list[str]()
    for word, *values in parts:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in hints | off:
            unknown += filter(None, [word, *values])
            continue
        values = [value, *values] if equals else values
        hint = hints.get(name)
        if mentions(hint, ...):
            options[name] = [*options.get(name, ()), *values]
        else:
            options[off.get(name, name)] = _value(flag, hint, values)
    for name, value in options.items():
        if isinstance(value, list):
            options[name] = value[0] if len(value) == 1 else tuple(value)
    check_escapes(options)
    return options, unknown


def _types_of(kind: Any) -> dict[str, Any]:
    """Return the type of the value of each flag, by name; an axis of the estimator is estimator.AXIS."""
    hints = dict(field_types(kind))
    if "estimator" in hints:
        hints |= {f"estimator.{axis}": hint for axis, hint in field_types(Estimator).items()}
    if "resume" in hints or kind is CompareArguments:
        hints["config"] = str
    if kind is ControlArguments:
        hints["agent"] = Literal[AGENTS]
    return hints


def _value(flag: str, hint: Any, values: list[str]) -> Any:
    """Return the value of a flag: whether a switch is on, or a text.

    Args:
        flag: the flag as it was written.
        hint: the type of its setting; None for --no-NAME, which turns a switch off.
        values: the words behind it.
    """
    is_switch = hint in (None, bool, bool | None)
    if not values and (is_switch or hint == SWITCH_OR_AUTO):
        return hint is not None
    if is_switch or len(values) != 1:
        count = "no" if is_switch else "one"
        fault = f"not {' '.join(values)}" if values else "and none stands behind it"
        raise Refused(
            f"{flag} takes {count} value, {fault}. A text with spaces stands in quotes, and a switch alone, as "
            "--quiet or --no-quiet."
        )
    return None if values == ["None"] and mentions(hint, NoneType) else values[0]


def _negated(flag: str) -> str:
    """Return the flag that turns a switch off."""
    parent, dot, last = flag.rpartition(".")
    return f"{parent}{dot}no-{last}"


def _starting_settings(name: str, kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Take --config, --agent and the estimator out of the options; return the settings that these give."""
    if "resume" not in field_types(kind):
        return {}
    typed = {*options}
    config = options.pop("config", None)
    agent = options.pop("agent", None)
    preset = options.pop("estimator", None)
    axes = _axes_of(options)
    start: dict[str, Any] = {}
    if agent is not None and config is not None:
        raise Refused("--agent and --config both say where the settings start; give one of them.")
    if config is not None:
        anew = not (options.get("resume") or options.get("overwrite"))
        start |= vars(configured(kind, config, name, anew=anew))
        trusted = options.get("trust_run", False)
        check_code(start, config, read_config(config), typed, trusted=trusted)
    if agent is not None:
        start |= agent_settings(agent, options.get("env", kind.env))
    if preset is not None or axes:
        estimator = _estimator(kind, start) if preset is None else Estimator.preset(preset)
        start["estimator"] = arguments(Estimator, vars(estimator) | axes)
    return start


def _estimator(kind: Any, start: Mapping[str, Any]) -> Any:
    """Return the estimator of the settings that a command starts from, or else the command's own."""
    return start.get("estimator") or kind.__dataclass_fields__["estimator"].default_factory()


def _axes_of(options: dict[str, Any]) -> dict[str, Any]:
    """Take the axes of the estimator out of the options, and return them by their own names."""
    names = [name for name in options if name.startswith("estimator.")]
    return {name.removeprefix("estimator."): options.pop(name) for name in names}


def _shared(kind: Any, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that all runs of a comparison share, and the words that are not flags of a run."""
    options, rest = _read_options(kind, argv)
    if {"estimator", "agent"} & options.keys():
        raise Refused(
            "A comparison names estimators as --arms; what all arms share are single axes, such as "
            "--estimator.aggregation sequence_mean."
        )
    axes = _axes_of(options)
    settings = vars(arguments(kind, options | {"estimator": axes}))
    shared = {name: settings[name] for name in options}
    if axes:
        shared["estimator"] = {axis: getattr(settings["estimator"], axis) for axis in axes}
    return dict(plain(shared)), rest


def _print_help(kind: Any, prog: str, start: Mapping[str, Any]) -> None:
    """Print what a command does, and its flags with their defaults: a panel for each group, the axes last."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.panel import Panel

    hints = _types_of(kind)
    headings: dict[str, Any] = {"": ""}
    for owner in dataclasses_of(kind):
        headings.setdefault(owner.group, owner.__doc__)
    flags = [
        (owner.group, field.name, f"{text}{_default(field, start)}")
        for owner, field, text in described_fields(kind)
        if field.metadata.get("flag", True)
    ]
    others = {"config": ABOUT_CONFIG, "agent": ABOUT_AGENT}
    flags += [("", name, text) for name, text in others.items() if name in hints]
    if "estimator" in hints:
        headings["estimator"] = Estimator.__doc__
        axes = vars(_estimator(kind, start))
        flags += [
            ("estimator", f"estimator.{field.name}", f"{text}{_default(field, axes)}")
            for _, field, text in described_fields(Estimator)
        ]
    console = rich_console()
    console.print(f"usage: {prog} [--help] [OPTIONS]\n\n{_about(kind)}\n")
    for title, heading in headings.items():
        lines: list[Any] = [cleandoc(heading), ""] if title else []
        for group, name, text in flags:
            if group == title:
                lines += [_signature(name, hints[name]), Padding(text, (0, 0, 0, 6))]
        console.print(Panel(Group(*lines), title=f"{title} options".strip(), title_align="left"))


def _signature(name: str, hint: Any) -> str:
    """Return a flag as it is typed, with a word for its value."""
    flag = name.replace("_", "-")
    names = ",".join(names_in(hint))
    if hint in SWITCHES:
        word = f" [{names}]" if names else ""
        return f"--{flag}{word}, --{_negated(flag)}"
    words = [word for kind, word in WORDS.items() if mentions(hint, kind)]
    if names:
        words.insert(0, f"{{{names}}}")
    several = " ..." if mentions(hint, ...) else ""
    return f"--{flag} {'|'.join(words)}{several}"


def _default(field: Field[Any], defaults: Mapping[str, Any]) -> str:
    """Return in words what a setting is if it is left out; empty where it is open or required."""
    value = defaults.get(field.name, field.metadata.get("usual", field.default))
    words = " ".join(map(shlex.quote, map(str, value if isinstance(value, tuple) else [value])))
    is_empty = words in ("''", "None", "") or is_required(field) or field.name == "estimator"
    if "usual" in field.metadata:
        return " (as in the run)" if is_empty else f" (default: as in the run, else {words})"
    return "" if is_empty else f" (default: {words})"


def is_required(field: Field[Any]) -> bool:
    """Return whether a setting has no default; the words before all flags are its values."""
    return field.default is field.default_factory


def described_fields(kind: Any) -> Iterator[tuple[type[Any], Field[Any], str]]:
    """Yield each field of a dataclass of settings, with the class that declares it and what it means."""
    owners = dict[str, Any]()
    texts = {}
    for owner in reversed(dataclasses_of(kind)):
        owners |= dict.fromkeys(get_annotations(owner), owner)
        for entry in parse_from_object(owner).params:
            texts[entry.arg_name] = " ".join(str(entry.description).split())
    for field in fields(kind):
        yield owners[field.name], field, texts[field.name]


def dataclasses_of(kind: type[Any]) -> list[type[Any]]:
    """Return the dataclass and its base dataclasses, which together declare its fields."""
    return [owner for owner in kind.__mro__ if is_dataclass(owner)]
