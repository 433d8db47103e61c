"""The commands of the command line. Parsing arguments and printing help import nothing heavy, such as torch.

Exit codes: 0 for success; 2 if the command was refused before the first step, or a check found a problem; 1
if it failed during the run; 3 if a comparison has another verdict than --require asks for; 129, 130 or 143 if a signal
stopped it after saving; 141 if the program that read its output ended first, as with `| head`. A user's mistake prints
one paragraph and no traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from tokenrl.advisor.advice import AdviseArguments
from tokenrl.control.arguments import ControlArguments
from tokenrl.errors import Refused, Silent, TokenrlError, explain, suggest
from tokenrl.files import OutputFile
from tokenrl.flags import Command, options_of
from tokenrl.lab.compare.arguments import CompareArguments, JudgeArguments
from tokenrl.lab.exact.catalogue import LabArguments
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.language.commands.arguments import EvaluateArguments, SampleArguments
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs.output import (
    UNREAD,
    checked_output,
    harmless,
    hush_libraries,
    prepare_streams,
    visible,
    without_warnings,
)
from tokenrl.settings import Settings, arguments


@dataclass(frozen=True)
class ReportArguments(Settings):
    """Write the report of a run again, with its learning curve; or compare several runs on one page."""

    run_dir: tyro.conf.Positional[tuple[str, ...]]
    """Output directory of the run; of several runs to compare them."""
    output: OutputFile | None = None
    """File to write for several runs (default: comparison.html). The report of one run is report.html in its
    directory."""


def write_report(args: ReportArguments) -> int:
    """Write the page of one run, or of several, and print where it lies."""
    if not args.run_dir:
        raise Refused("Name the output directory of a run, or of several runs to compare them.")
    run = args.run_dir[0]
    several = len(args.run_dir) > 1
    if args.output is not None and not several:
        raise Refused(
            "--output is for several runs: name them, or leave it out; one has its report.html."
        )
    if several:
        from tokenrl.lab import compare_runs

        page = compare_runs(args.run_dir, args.output or "comparison.html")
    elif os.path.isfile(os.path.join(run, "plan.json")):
        from tokenrl.lab.compare.loop import judge_directory
        from tokenrl.lab.compare.page import write_comparison

        page = write_comparison(judge_directory(run))
    else:
        from tokenrl.runs import report_from_directory

        page = report_from_directory(run)
    print(visible(str(page)))
    return 0


COMMANDS = {
    "train": Command(TrainArguments, "tokenrl.language.training.loop:train", trains=True),
    "sft": Command(SftArguments, "tokenrl.language.supervised.sft:sft", trains=True),
    "reward-model": Command(
        RewardModelArguments, "tokenrl.language:train_reward_model", trains=True
    ),
    "evaluate": Command(EvaluateArguments, "tokenrl.language.commands.evaluate:print_evaluation"),
    "sample": Command(SampleArguments, "tokenrl.language.commands.sample:print_samples"),
    "control": Command(ControlArguments, "tokenrl.control.training:train_agent", trains=True),
    "compare": Command(CompareArguments, "tokenrl.lab.compare.loop:compare_each"),
    "judge": Command(JudgeArguments, "tokenrl.lab.compare.recorded:judge"),
    "advise": Command(AdviseArguments, "tokenrl.advisor:run"),
    "report": Command(ReportArguments, "tokenrl.cli:write_report"),
    "lab exact": Command(LabArguments, "tokenrl.lab.exact.report:exact"),
    "lab measure": Command(MeasureArguments, "tokenrl.lab.measure.measurement:run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    hush_libraries()
    prepare_streams()
    try:
        with checked_output():
            return _run(argv)
    except TokenrlError as error:
        if not isinstance(error, Silent):
            print(f"tokenrl: {harmless(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return UNREAD


def _run(argv: list[str]) -> int:
    """Print the help or the version, or run the command that the words name."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        about = "Policy gradients on language models and gymnasium environments."
        lines = ["usage: tokenrl COMMAND [--help] ...", "", about, ""]
        lines += [
            f"  {name:13}{command.arguments.__doc__.splitlines()[0]}"
            for name, command in COMMANDS.items()
        ]
        print("\n".join(lines))
        return 0 if argv else 2
    if argv[0] == "--version":
        from tokenrl import __version__

        print(__version__)
        return 0
    both = " ".join(argv[:2])
    name = both if both in COMMANDS else argv[0]
    if name not in COMMANDS:
        raise Refused(f"There is no command {name!r}.{suggest(name, COMMANDS)}")
    try:
        os.getcwd()
    except OSError as error:  # PyTorch would end the process with a message about something else
        raise Refused(
            f"The current working directory cannot be used ({error}): change it."
        ) from error
    command = COMMANDS[name]
    options = options_of(name, command, argv[len(name.split()) :])
    args = arguments(command.arguments, options)
    module, _, function = command.function.partition(":")
    with without_warnings(getattr(args, "quiet", False)):
        try:
            run = getattr(importlib.import_module(module), function)
            # A training has what was given as keywords, so that it knows that it was given.
            result = run(**options) if command.trains else run(args)
        except (SystemExit, RuntimeError, OSError) as error:
            raise explain(error) or error from error
    return result if isinstance(result, int) else getattr(result, "exit_code", 0)
