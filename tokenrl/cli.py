"""The command line. Parsing arguments and printing help import nothing heavy, such as torch.

Exit codes: 0 for success; 2 if the command was refused before the first step; 1 if it failed during the run;
130 or 143 if a signal stopped it after saving. A user's mistake prints one paragraph and no traceback.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from inspect import get_annotations, getsource
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import tyro

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.control.agents import ABOUT_AGENT, agent_settings
from tokenrl.control.arguments import ControlArguments
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused, TokenrlError, suggest
from tokenrl.foreign import check_flags
from tokenrl.lab.exact.arguments import LabArguments
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.language.inspect.arguments import EvaluateArguments, SampleArguments
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.training.arguments import SftArguments, TrainArguments
from tokenrl.runs.quiet import hush_libraries, without_warnings
from tokenrl.settings import Settings, arguments, configured, field_types, read_config

ABOUT_CONFIG = "Read settings from this file: a run's config.json, or JSON or YAML. Flags override it."


@dataclass(frozen=True)
class ReportArguments(Settings):
    """Draw the learning curve of a run and write its report again."""

    run_dir: tyro.conf.Positional[str]
    """Output directory of the run."""


def _train(args: TrainArguments) -> int:
    from tokenrl.language.training.loop import train

    return train(args).exit_code


def _sft(args: SftArguments) -> int:
    from tokenrl.language.training.sft import sft

    return sft(args).exit_code


def _reward_model(args: RewardModelArguments) -> int:
    from tokenrl.language.preferences.fit import train_reward_model

    return train_reward_model(args).exit_code


def _evaluate(args: EvaluateArguments) -> int:
    from tokenrl.language.inspect.evaluate import evaluate
    from tokenrl.language.training.evaluation_metrics import evaluation_table
    from tokenrl.runs.console import rich_console

    title = f"{args.model} on the held-out prompts of {args.task}"
    rich_console().print(evaluation_table(evaluate(args).metrics, title=title))
    return 0


def _sample(args: SampleArguments) -> int:
    from tokenrl.language.inspect.chat import Sampler, converse, show

    if not args.prompt:
        converse(args)
        return 0
    for prompt, completions in zip(args.prompt, Sampler.load(args)(args.prompt, args), strict=True):
        show(prompt, completions, chat=args.chat)
    return 0


def _control(args: ControlArguments) -> int:
    from tokenrl.control.training import train_agent

    return train_agent(args).exit_code


def _advise(args: AdviseArguments) -> int:
    from tokenrl.advisor import run

    return run(args)


def _report(args: ReportArguments) -> int:
    config = read_config(args.run_dir) if os.path.exists(os.path.join(args.run_dir, "config.json")) else {}
    # Older runs have no "kind" in config.json; among them only reward models have "pairs".
    if config.get("kind", "reward-model" if "pairs" in config else "") == "reward-model":
        from tokenrl.language.preferences.report import report_reward_model as report
    else:
        from tokenrl.runs.report import report_from_directory as report

    print(report(args.run_dir))
    return 0


def _lab(args: LabArguments) -> int:
    from tokenrl.lab.exact.report import exact

    return exact(args)


def _lab_measure(args: MeasureArguments) -> int:
    from tokenrl.lab.measure.reading import run

    return run(args)


class Command(NamedTuple):
    """A command: its arguments, the function that runs it, and whether it trains (then it takes --config)."""

    arguments: Any
    run: Callable[[Any], int]
    trains: bool = False


COMMANDS = {
    "train": Command(TrainArguments, _train, trains=True),
    "sft": Command(SftArguments, _sft, trains=True),
    "reward-model": Command(RewardModelArguments, _reward_model, trains=True),
    "evaluate": Command(EvaluateArguments, _evaluate),
    "sample": Command(SampleArguments, _sample),
    "control": Command(ControlArguments, _control, trains=True),
    "advise": Command(AdviseArguments, _advise),
    "report": Command(ReportArguments, _report),
    "lab": Command(LabArguments, _lab),
    "lab measure": Command(MeasureArguments, _lab_measure),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    hush_libraries()
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(_help())
            return 0 if argv else 2
        if argv[0] == "--version":
            from tokenrl import __version__

            print(__version__)
            return 0
        name = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else argv[0]
        command = COMMANDS.get(name)
        if command is None:
            raise Refused(f"There is no command {argv[0]!r}.{suggest(argv[0], COMMANDS)}")
        args = _parse(name, command, argv[len(name.split()) :])
        with without_warnings(getattr(args, "quiet", False)):
            return command.run(args)
    except TokenrlError as error:
        print(f"tokenrl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the program that read our output has ended, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _help() -> str:
    about = "Policy gradients on language models and gymnasium environments."
    lines = ["usage: tokenrl COMMAND [--help] ...", "", about, ""]
    lines += [f"  {name:13}{command.arguments.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _parse(name: str, command: Command, argv: list[str]) -> Any:
    """Parse a command's arguments. --config, --agent and --estimator set defaults; flags change them."""
    kind, about = command.arguments, command.arguments.__doc__
    default: Any = None
    if command.trains:
        argv, config = _take(argv, "--config")
        default = kind() if config is None else configured(kind, config, name)
    if kind is ControlArguments:
        argv, agent = _take(argv, "--agent")
        if agent is not None and config is not None:
            raise Refused("--agent and --config both say where the settings start; give one of them.")
        env = _take(argv, "--env")[1] or default.env
        default = default if agent is None else arguments(kind, agent_settings(agent, env))
    if hasattr(default, "estimator"):
        argv, preset = _take(argv, "--estimator")
        default = default if preset is None else replace(default, estimator=Estimator.preset(preset))
        about += _about_presets()
    argv = check_flags(argv, field_types(kind))
    groups = vars(tyro.cli(_flags(kind, default), args=argv, prog=f"tokenrl {name}", description=about))
    values = {flag: value for group in groups.values() for flag, value in vars(group).items()}
    values |= {"estimator": vars(groups["estimator"])} if "estimator" in groups else {}
    return arguments(kind, {one.name: values[one.name] for one in fields(kind)})


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
        groups[""].append(_flag("agent", str | None, None, ABOUT_AGENT, metavar="AGENT"))
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
        owner = next(owner for owner in _owners(kind) if one.name in get_annotations(owner))
        if one.name == "estimator":
            yield owner, _flag(one.name, str | None, None, texts[one.name], metavar="PRESET")
        else:
            value = one.default if default is None else getattr(default, one.name)
            yield owner, _flag(one.name, field_types(kind)[one.name], value, texts[one.name])


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


if __name__ == "__main__":  # `python -m tokenrl` is shorter, but older scripts name the module
    sys.exit(main())
