"""Makes the flags of a command from the dataclass of its arguments, and reads them. Imports no torch.

tyro reads the words and prints the help. It returns only what was given, numbers and names as text; the
settings made of them convert it, or refuse it as they refuse a value from Python.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import cleandoc, get_annotations
from itertools import chain, pairwise
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from docstring_parser import parse_from_object
from typing_extensions import Required, TypedDict
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from tokenrl.configuration import check_code, check_escapes, configured, directory_of, read_config
from tokenrl.control.arguments import ABOUT_AGENT, AGENTS, ControlArguments, agent_settings
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.files import plain
from tokenrl.foreign import check_flags
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import OR_FUNCTION, arguments, field_types, mentions

ABOUT_CONFIG = (
    "Read settings from this file: a run's config.json, or JSON or YAML. Flags override it. Code that a run "
    "names is executed only if you have trained with it yourself, or with --trust-run."
)
FRAME = re.compile("^.*[─-]{8}.*$|[│|]", re.MULTILINE)
"""The frame around tyro's errors, with its title: they are shown as plain text."""
ALONE = {"--warm-start": "--warm-start=True", "--no-warm-start": "--warm-start=False"}
"""By flag that may stand without a value, the flag with the value that it then has."""
FIRST = {"evaluate": "--model", "sample": "--model", "advise": "--run", "lab measure": "--model"}
"""By command the flag that may be left out where its values are the first words, as in `evaluate runs/a`."""
READING = ConstructorRegistry()
"""How tyro reads the values of flags."""


class Command(NamedTuple):
    """A command: its arguments, the function that runs it, and whether it trains (then it takes --config).

    The function is given by name, as `module:function`, so that its module is imported only when it runs.
    """

    arguments: Any
    function: str
    trains: bool = False


def parse(name: str, command: Command, argv: list[str]) -> Any:
    """Return the arguments of a command as an object; see `options_of`."""
    return arguments(command.arguments, options_of(name, command, argv))


def options_of(name: str, command: Command, argv: list[str]) -> dict[str, Any]:
    """Parse the arguments of a command. --config, --agent and --estimator set defaults; flags change them.

    Args:
        name: Name of the command.
        command: The command.
        argv: The words after the name.

    Returns:
        The settings that are given, by name.

    Raises:
        Refused: A flag or a value is not allowed.
    """
    kind = command.arguments
    prog = f"tokenrl {name}"
    hints = dict(field_types(kind))
    words = [word for word in argv if word not in ("-h", "--help")]
    is_help = len(words) < len(argv)
    if name in FIRST and words and not words[0].startswith("-"):
        words.insert(0, FIRST[name])
    options = dict[str, Any]()
    unknown = list[str]()
    if words or not is_help:
        alone = [
            ALONE.get(word.replace("_", "-"), word) if following.startswith("--") else word
            for word, following in pairwise([*words, "--"])
        ]
        options, unknown = _read_options(command, alone, prog)
    start = _starting_settings(name, command, options)
    if is_help:
        about = cleandoc(kind.__doc__)
        if "estimator" in hints:
            width = max(map(len, PRESETS)) + 2
            lines = [
                about,
                "--estimator PRESET sets every axis of the estimator; --estimator.AXIS changes one axis.",
                "The presets, and the bias of the expected gradient with each:",
            ]
            lines += [f"  {word:{width}}{Estimator.preset(word).bias_status}" for word in PRESETS]
            about = "\n".join(lines)
        tyro.cli(_flags(command, start), args=["--help"], prog=prog, description=about)
    if kind is CompareArguments:
        config = options.pop("config", None)
        stored = {}
        if config is not None:
            stored = read_config(config)
            if directory_of(config, stored):
                raise Refused(
                    f"{config} is the configuration of a run; compare takes a file of settings."
                )
        runs = ControlArguments if "env" in stored | options else TrainArguments
        shared, unknown = _shared(runs, unknown, prog)
        start = with_shared(stored | shared)
        hints |= field_types(runs)  # type: ignore[arg-type]
    check_flags(unknown, hints, prog)
    return start | options


def _read_options(command: Command, argv: list[str], prog: str) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that flags give, by name, and the words that are not flags of the command."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            groups, rest = tyro.cli(
                _flags(command),
                args=_collected(command.arguments, argv),
                prog=prog,
                registry=READING,
                return_unknown_args=True,
            )
    except SystemExit:  # tyro has printed what is wrong and where the help is
        words = FRAME.sub(" ", errors.getvalue()).split()
        raise Refused(f"{' '.join(words)}.") from None
    options = {}
    if axes := groups.pop("estimator", {}):
        options["axes"] = axes
    for group in groups.values():
        options |= group
    check_escapes(options)
    return options, rest


def _collected(kind: Any, argv: list[str]) -> list[str]:
    """Return the words of a command line, where a list flag that is repeated adds to its first values."""
    types = field_types(kind).items()
    lists = {f"--{name}".replace("_", "-") for name, hint in types if mentions(hint, ...)}
    parts = defaultdict[Any, list[str]](list)
    owner: Any = ""
    for number, word in enumerate(argv):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag.replace("_", "-")
            owner = name if name in lists else number
            if owner in parts:  # a list flag that is repeated
                parts[owner] += [value] if equals else []
                continue
        parts[owner].append(word)
    return [*chain.from_iterable(parts.values())]


@READING.primitive_rule
def _as_text(read: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Return how tyro reads a number or a name: as the text that it is, which the settings then convert."""
    if read.type_origin is not Literal and read.type not in (int, float):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="VALUE",
        instance_from_str=lambda words: words[0],
        is_instance=lambda _: True,
        str_from_instance=lambda default: [str(default)],
    )


def _starting_settings(name: str, command: Command, options: dict[str, Any]) -> dict[str, Any]:
    """Take --config, --agent and the estimator out of the options; return the settings that these give."""
    kind = command.arguments
    if not command.trains:
        return {}
    typed = options.keys() | {f"estimator.{axis}" for axis in options.get("axes", {})}
    config = options.pop("config", None)
    agent = options.pop("agent", None)
    preset = options.pop("estimator", None)
    axes = options.pop("axes", {})
    start: dict[str, Any] = {}
    if agent is not None and config is not None:
        raise Refused("--agent and --config both say where the settings start; give one of them.")
    if config is not None:
        anew = not (options.get("resume") or options.get("overwrite"))
        stored = read_config(config)
        settings = vars(configured(kind, config, name, anew=anew))
        start |= {name: value for name, value in settings.items() if name in stored}
        trusted = options.get("trust_run", False)
        check_code(kind, start, config, stored, typed, trusted=trusted)
    if agent is not None:
        start |= agent_settings(agent, options.get("env", kind.env))
    if preset is not None or axes:
        estimator = _estimator(kind, start) if preset is None else Estimator.preset(preset)
        start["estimator"] = arguments(Estimator, vars(estimator) | axes)
    return start


def _estimator(kind: Any, start: Mapping[str, Any]) -> Any:
    """Return the estimator of the settings that a command starts from, or else the command's own."""
    return start.get("estimator") or kind.__dataclass_fields__["estimator"].default_factory()


def _shared(kind: Any, argv: list[str], prog: str) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that all runs of a comparison share, and the words that are not flags of a run."""
    options, rest = _read_options(Command(kind, "", trains=True), argv, prog)
    if {"estimator", "agent"} & options.keys():
        raise Refused(
            "A comparison names estimators as --arms; what all arms share are single axes, such as "
            "--estimator.aggregation sequence_mean."
        )
    axes = options.pop("axes", {})
    settings = vars(arguments(kind, options | {"estimator": axes}))
    shared = {name: settings[name] for name in options}
    if axes:
        shared["estimator"] = {axis: getattr(settings["estimator"], axis) for axis in axes}
    return dict(plain(shared)), rest


def _flags(command: Command, start: Mapping[str, Any] | None = None) -> Any:
    """Make the type that tyro reads: a group of flags for each class that declares some, the axes last."""
    kind = command.arguments
    start = start or {}
    about = {owner.group: owner.__doc__ for owner in dataclasses_of(kind)} | {"": ""}
    groups: dict[str, dict[str, Any]] = {title: {} for title in about}
    for owner, name, flag in _each_flag(kind, start):
        groups[owner.group][name] = flag
    if command.trains or kind is CompareArguments:
        groups[""]["config"] = _flag(str | None, None, ABOUT_CONFIG, "FILE")
    if kind is ControlArguments:
        groups[""]["agent"] = _flag(Literal[AGENTS] | None, None, ABOUT_AGENT, "AGENT")
    parts: dict[str, Any] = {}
    for number, (title, flags) in enumerate(groups.items()):
        heading = tyro.conf.arg(name=title, help=about[title])
        parts[f"group_{number}"] = Annotated[_group(flags), tyro.conf.OmitArgPrefixes, heading]
    if "estimator" in groups[""]:
        estimator = vars(_estimator(kind, start))
        axes = {name: flag for _, name, flag in _each_flag(Estimator, estimator)}
        parts["estimator"] = Annotated[_group(axes), tyro.conf.arg(help=Estimator.__doc__)]
    return _group(parts)


def _group(flags: dict[str, Any]) -> Any:
    """Return the type of the dictionary that tyro makes; it holds only the flags that the user wrote."""
    return TypedDict("Flags", flags, total=False)  # type: ignore[misc, operator]


def _each_flag(kind: Any, start: Mapping[str, Any]) -> Iterator[tuple[type[Any], str, Any]]:
    """Yield each field as a flag, with the class that declares it; --estimator takes a preset's name."""
    for owner, field, text in described_fields(kind):
        hint = field_types(kind)[field.name]
        metavar = None
        value = start.get(field.name, field.metadata.get("usual", field.default))
        if field.name == "estimator":
            hint = Literal[tuple(PRESETS)] | None
            value = None
            metavar = "PRESET"
        elif OR_FUNCTION in getattr(hint, "__metadata__", ()):
            hint = hint | str  # the name of a function
        elif mentions(hint, bool) and mentions(hint, NoneType):  # --NAME, --no-NAME, or left open
            hint = bool
        elif hint == bool | Literal["auto"]:  # it stands without a value, or takes the word
            hint = Literal[True, False, "auto"]
            metavar = "[auto]"
        origin = "as in the run, else " if "usual" in field.metadata else ""
        yield owner, field.name, _flag(hint, value, text, metavar, origin)


def described_fields(kind: Any) -> Iterator[tuple[type[Any], Field[Any], str]]:
    """Yield each field of a dataclass of settings that is a flag, with the class that declares it and its meaning."""
    owners = dict[str, Any]()
    texts = dict[str, str]()
    for owner in reversed(dataclasses_of(kind)):
        owners |= dict.fromkeys(get_annotations(owner), owner)
        for entry in parse_from_object(owner).params:
            texts[entry.arg_name] = " ".join(str(entry.description).split())
    for field in fields(kind):
        if field.metadata.get("flag", True):
            yield owners[field.name], field, texts[field.name]


def _flag(hint: Any, default: Any, text: str, metavar: str | None = None, origin: str = "") -> Any:
    """Return the type of one flag, with its help text and where its default comes from."""
    values = default if isinstance(default, tuple) else [default]
    words = " ".join(shlex.quote(str(value)) for value in values)
    if default is MISSING or words in ("''", "None", ""):
        words = ""
        origin = origin.partition(",")[0]
    hint_of_default = f"(default: {origin}{words})" if origin or words else ""
    help = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=hint_of_default)
    flag = Annotated[hint, help]
    return Required[flag] if default is MISSING else flag


def dataclasses_of(kind: type[Any]) -> list[type[Any]]:
    """Return the dataclass and its base dataclasses, which together declare its fields."""
    return [owner for owner in kind.__mro__ if is_dataclass(owner)]
