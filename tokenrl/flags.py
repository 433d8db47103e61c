"""Makes the flags of a command from the dataclass of its arguments, and parses them. Imports no torch.

tyro parses the flags and prints the help. What it refuses, and what the settings refuse afterwards, is said
in the same one paragraph, so that a value from the command line gets the message that Python gives.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from inspect import cleandoc, get_annotations, getsource
from itertools import pairwise, takewhile
from typing import Annotated, Any, Literal, NamedTuple, Union

import tyro

from tokenrl.configuration import configured
from tokenrl.control.agents import ABOUT_AGENT, AGENTS, agent_settings
from tokenrl.control.arguments import ControlArguments
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.foreign import check_flags
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs.files import plain
from tokenrl.settings import OR_FUNCTION, arguments, check_choice, field_types, rules_of

ABOUT_CONFIG = "Read settings from this file: a run's config.json, or JSON or YAML. Flags override it."

FRAME = re.compile(r"^.*[─-]{8,}.*$", re.MULTILINE)
"""A line of the frame around tyro's errors."""


class Command(NamedTuple):
    """A command: its arguments, the function that runs it, and whether it trains (then it takes --config).

    The function is given by name, as `module:function`, so that its module is imported only when it runs.
    """

    arguments: Any
    function: str
    trains: bool = False


def parse(name: str, command: Command, argv: list[str]) -> Any:
    """Parse the arguments of a command. --config, --agent and --estimator set defaults; flags change them.

    Args:
        name: Name of the command.
        command: The command.
        argv: The words after the name.

    Raises:
        Refused: A flag or a value is not allowed.
    """
    kind, about = command.arguments, cleandoc(command.arguments.__doc__)
    default: Any = None
    config = shared = None
    if kind is CompareArguments:
        argv, shared = _take_shared(argv)
    elif command.trains:
        argv, config = _take(argv, "--config")
        default = kind() if config is None else configured(kind, config, name)
    if kind is ControlArguments:
        argv, agent = _take(argv, "--agent")
        if agent is not None and config is not None:
            raise Refused("--agent and --config both say where the settings start; give one of them.")
        if agent is not None:
            default = arguments(kind, agent_settings(agent, _take(argv, "--env")[1] or default.env))
    if hasattr(default, "estimator"):
        argv, preset = _take(argv, "--estimator")
        default = default if preset is None else replace(default, estimator=Estimator.preset(preset))
        about += _about_presets()
    check_flags(argv, field_types(kind))
    values = _parsed(kind, default, argv, f"tokenrl {name}", about)
    for switch in _open_switches(kind):
        flags = {f"--{switch}", f"--no_{switch}"}
        if not flags & {"--" + word[2:].replace("-", "_") for word in argv if word.startswith("--")}:
            values[switch] = getattr(default, switch, None)
    if shared is not None:
        values["shared"] = shared
    return arguments(kind, {one.name: values[one.name] for one in fields(kind)})


def _parsed(kind: Any, default: Any, argv: list[str], prog: str, about: str) -> dict[str, Any]:
    """Parse flags with tyro, and return the values by name; what it refuses becomes one paragraph."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            groups = vars(tyro.cli(_flags(kind, default), args=argv, prog=prog, description=about))
    except SystemExit as exit:
        if not exit.code:
            raise  # --help
        raise _refusal(kind, argv, prog, said.getvalue()) from None
    values = {flag: value for group in groups.values() for flag, value in vars(group).items()}
    return values | ({"estimator": vars(groups["estimator"])} if "estimator" in groups else {})


def _refusal(kind: Any, argv: list[str], prog: str, said: str) -> Refused:
    """Turn the box in which tyro writes an error into the paragraph that the settings themselves would write.

    Args:
        kind: the dataclass of the arguments.
        argv: the words that were parsed.
        prog: the command.
        said: the box.
    """
    # Lines of the frame divide it into a title, what is wrong, and advice; without colours it has no sides.
    _, text, *advice = [" ".join(re.sub("[│|]", " ", part).split()) for part in FRAME.split(said)]
    flag = re.search(r"--[\w.-]+", text)
    if flag and not text.startswith("Unrecognized"):
        words = list(argv)
        given = words[words.index(flag[0]) + 1 :] if flag[0] in words else []
        values = list(takewhile(lambda word: not word.startswith("--"), given))
        owner, name = (Estimator, flag[0][12:]) if flag[0].startswith("--estimator.") else (kind, flag[0][2:])
        rule = rules_of(owner).get(name.replace("-", "_"))
        if rule is not None and values:
            return rule.refusal(flag[0], values[0] if len(values) == 1 else values)
    meant = re.search(r"Perhaps you meant:\s*(--[\w.-]+)", " ".join(advice))
    hint = f" Did you mean {meant[1]}?" if meant else ""
    return Refused(f"{text.split(' Got errors:')[0].rstrip('. ')}.{hint} See {prog} --help.")


def _take_shared(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Split the command line of a comparison into its own flags and the settings that its runs share.

    Raises:
        Refused: a setting of the runs is not allowed.
    """
    own = field_types(CompareArguments)
    rest: list[str] = []
    shared: list[str] = []
    typed: set[str] = set()
    control = any(word.partition("=")[0] == "--env" for word in argv)
    name, kind = ("control", ControlArguments) if control else ("train", TrainArguments)
    known, target = {"config", "agent", *field_types(kind)}.difference(own), rest
    for word in argv:
        if word.startswith("--"):
            flag = word[2:].partition("=")[0].partition(".")[0].replace("-", "_")
            names = {flag, flag.removeprefix("no_")} & known
            typed |= names
            target = shared if names else rest
        target.append(word)
    given = plain(parse(name, Command(kind, "", trains=True), shared))
    default = plain(kind())
    chosen = {key for key, value in given.items() if key in typed or value != default[key]}
    found = {key: given[key] for key in given if key in chosen - own.keys()}
    if "estimator" in found:
        axes, usual = found["estimator"], default["estimator"]
        if any(word.partition("=")[0] in ("--estimator", "--agent") for word in shared):
            raise Refused(
                "A comparison names estimators as --arms; what all arms share are single axes, such as "
                "--estimator.aggregation sequence_mean."
            )
        found["estimator"] = {axis: value for axis, value in axes.items() if value != usual[axis]}
    return rest, found


def print_completion(shell: str, commands: Mapping[str, Command]) -> None:
    """Print tyro's script with which a shell completes commands, flags and values, and exit.

    Args:
        shell: bash, zsh or fish.
        commands: The commands by name. Two of them may share their first word.

    Raises:
        Refused: There is no script for this shell.
        SystemExit: Always, after printing, with code 0.
    """
    check_choice("--print-completion", shell, ("bash", "zsh", "fish"))
    tree: dict[str, dict[str, Any]] = {}
    for name, (kind, _, trains) in commands.items():
        word, _, second = name.partition(" ")
        tree.setdefault(word, {})[second] = _flags(kind, kind() if trains else None)
    for below in tree.values():
        below.setdefault("", make_dataclass("Second", [("word", _one_of(below))]))
    kinds = _one_of({word: below[""] for word, below in tree.items()})
    asked = ["--tyro-print-completion", shell]
    tyro.cli(kinds, args=asked, prog="tokenrl", config=(tyro.conf.OmitSubcommandPrefixes,))


def _one_of(kinds: Mapping[str, Any]) -> Any:
    """Return the type that is a choice between commands."""
    named = tuple(Annotated[kind, tyro.conf.subcommand(word)] for word, kind in kinds.items())
    return Union[named]  # noqa: UP007


def _flags(kind: type[Any], default: Any) -> type[Any]:
    """Make the dataclass that tyro fills: one field for each group of the help, the estimator's axes last.

    It does not check values. The settings are made from them afterwards, so that a value from the command
    line is refused with the same message as one from Python.
    """
    groups: dict[str, list[Any]] = {owner.group: [] for owner in _owners(kind)}
    for owner, flag in _each_flag(kind, default):
        groups[owner.group].append(flag)
    if default is not None:
        groups[""].append(_flag("config", str | None, None, ABOUT_CONFIG, metavar="FILE"))
    if kind is ControlArguments:
        groups[""].append(_flag("agent", Literal[AGENTS] | None, None, ABOUT_AGENT, metavar="AGENT"))
    about = {owner.group: owner.__doc__ for owner in _owners(kind)} | {"": ""}
    parts: list[Any] = []
    for title, flags in groups.items():
        group = make_dataclass("Group", flags, kw_only=True)
        shown = tyro.conf.arg(name=title, help=about[title])
        parts.append((f"group_{len(parts)}", Annotated[group, tyro.conf.OmitArgPrefixes, shown]))
    if hasattr(default, "estimator"):
        axes = make_dataclass("Axes", [flag for _, flag in _each_flag(Estimator, default.estimator)])
        parts.append(("estimator", Annotated[axes, tyro.conf.arg(help=Estimator.__doc__)]))
    return make_dataclass("Flags", parts)


def _each_flag(kind: Any, default: Any) -> Iterator[tuple[type[Any], Any]]:
    """Yield each field as a flag, with the class that declares it; --estimator takes a preset's name."""
    texts = {name: text for owner in reversed(_owners(kind)) for name, text in _texts(owner)}
    for one in fields(kind):
        if not one.metadata.get("flag", True):
            continue
        owner = next(owner for owner in _owners(kind) if one.name in get_annotations(owner))
        hint, metavar = field_types(kind)[one.name], None
        value = one.default if default is None else getattr(default, one.name)
        if one.name == "estimator":
            hint, value, metavar = Literal[tuple(PRESETS)] | None, None, "PRESET"
        elif OR_FUNCTION in getattr(hint, "__metadata__", ()):
            hint = hint | str  # the name of a function
        elif hint == bool | None:
            hint, value = bool, bool(value)
        yield owner, _flag(one.name, hint, value, texts[one.name], metavar)


def _open_switches(kind: Any) -> list[str]:
    """Return the fields that are true, false or left open (None), whose flags are --NAME and --no-NAME."""
    return [name for name, hint in field_types(kind).items() if hint == bool | None]


def _flag(name: str, hint: Any, default: Any, text: str, metavar: str | None = None) -> Any:
    def hinted(shown: str) -> str:  # the text of the flag says what happens without it
        return "" if shown in ("", "''", "None") else f"(default: {shown})"

    shown = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=hinted)
    return name, Annotated[hint, shown], field(default=default)


def _owners(kind: type[Any]) -> list[type[Any]]:
    """Return the dataclass and its base dataclasses, which together declare its fields."""
    return [owner for owner in kind.__mro__ if is_dataclass(owner)]


def _texts(owner: type[Any]) -> Iterator[tuple[str, str]]:
    """Yield each field that a class itself declares, with the docstring below it in the source."""
    module = ast.parse(getsource(sys.modules[owner.__module__])).body
    (declared,) = (node for node in module if isinstance(node, ast.ClassDef) and node.name == owner.__name__)
    for line, below in pairwise(declared.body):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
            yield ast.unparse(line.target), " ".join(ast.literal_eval(below.value).split())


def _about_presets() -> str:
    statuses = [f"  {name:24}{Estimator.preset(name).bias_status}" for name in PRESETS]
    return "\n".join(
        [
            "",
            "--estimator PRESET sets every axis of the estimator; --estimator.AXIS changes one axis.",
            "The presets, and the bias of the expected gradient with each:",
            *statuses,
        ]
    )


def _take(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """Return the command line without `flag VALUE` or `flag=VALUE`, and the value (None if it is absent)."""
    rest, value, words = [], None, iter(argv)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise Refused(f"{flag} needs a value.")
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
        else:
            rest.append(word)
    return rest, value
