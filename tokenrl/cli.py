"""The command line, thin: nothing heavy is imported to parse or to explain.

Exit codes: 0 done; 2 refused before the first step; 1 failed during the run; 130 or 143 stopped by a signal
after saving. A user's mistake prints one paragraph and no traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import tyro

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.control.arguments import ControlArguments
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused, TokenrlError
from tokenrl.lab.exact.arguments import LabArguments
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.language.inspect.arguments import EvaluateArguments, SampleArguments
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.training.arguments import SftArguments, TrainArguments


@dataclass(frozen=True)
class ReportArguments:
    """Draw the curve of a run and write its report again."""

    run_dir: tyro.conf.Positional[str]
    """Directory of the run."""


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

    title = f"{args.model} on the held-out prompts of {args.task}"
    print(evaluation_table(evaluate(args).metrics, title=title))
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
    from tokenrl.control.training import train

    return train(args).exit_code


def _advise(args: AdviseArguments) -> int:
    from tokenrl.advisor import run

    return run(args)


def _report(args: ReportArguments) -> int:
    if os.path.exists(os.path.join(args.run_dir, "calibration.png")):
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
    """A command: its arguments and what it calls."""

    arguments: Any
    run: Callable[[Any], int]


COMMANDS = {
    "train": Command(TrainArguments, _train),
    "sft": Command(SftArguments, _sft),
    "reward-model": Command(RewardModelArguments, _reward_model),
    "evaluate": Command(EvaluateArguments, _evaluate),
    "sample": Command(SampleArguments, _sample),
    "control": Command(ControlArguments, _control),
    "advise": Command(AdviseArguments, _advise),
    "report": Command(ReportArguments, _report),
    "lab": Command(LabArguments, _lab),
    "lab measure": Command(MeasureArguments, _lab_measure),
}


# The progress bars and advice of the libraries below, unless asked for, would bury what a run has to say.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
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
            raise Refused(f"There is no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}.")
        return command.run(_parse(name, command, argv[len(name.split()) :]))
    except TokenrlError as error:
        print(f"tokenrl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _help() -> str:
    lines = [
        "usage: tokenrl COMMAND [--help] ...",
        "",
        "Policy gradients on language models and gymnasium environments.",
        "",
    ]
    lines += [f"  {name:13}{command.arguments.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _parse(name: str, command: Command, argv: list[str]) -> Any:
    """Arguments of a command; --config and --estimator set the defaults that flags then change."""
    default: Any = None
    estimates = any(f.name == "estimator" for f in fields(command.arguments))
    if estimates:
        argv, config = _take(argv, "--config")
        argv, preset = _take(argv, "--estimator")
        default = command.arguments() if config is None else _from_config(config, command.arguments)
        if preset is not None:
            default = replace(default, estimator=Estimator.preset(preset))
    return tyro.cli(
        command.arguments,
        args=argv,
        prog=f"tokenrl {name}",
        description=command.arguments.__doc__ + (_about_presets() if estimates else ""),
        **({} if default is None else {"default": default}),
    )


def _about_presets() -> str:
    statuses = [f"  {name:24}{Estimator.preset(name).bias_status}" for name in PRESETS]
    return "\n".join(
        [
            "",
            "--estimator PRESET sets every axis of the estimator, --estimator.AXIS changes one.",
            "The presets, and what each does to the expected gradient:",
            *statuses,
            "--config FILE takes the settings of an earlier run's config.json. Flags beside them win.",
        ]
    )


def _take(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """The command line without `flag VALUE` or `flag=VALUE`, and the value."""
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


_FOREIGN = {"train": "num_envs", "control": "num_generations"}
"""A setting that only the other command's configurations have."""


def _from_config(path: str, kind: type[Any] = TrainArguments) -> Any:
    """The settings of an earlier run or an advice; what else the file holds is passed over."""
    from tokenrl.runs.directory import read_config

    stored = read_config(path)
    name, other = ("train", "control") if kind is TrainArguments else ("control", "train")
    if _FOREIGN[name] in stored:
        raise Refused(f"The configuration {path} is one of tokenrl {other}; give it to that command.")
    known = {f.name: stored[f.name] for f in fields(kind) if f.name in stored}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in known.items()
    }
    estimator = values.get("estimator")
    try:
        if isinstance(estimator, Mapping):
            values["estimator"] = Estimator(**estimator)
        return kind(**values)
    except TypeError as error:
        raise Refused(f"The configuration {path} is not one of tokenrl {name}: {error}.") from error


if __name__ == "__main__":
    sys.exit(main())
