"""Recommends settings for an environment or a language task, and diagnoses runs, each with its reasons.

Advice before a run rests on a short measurement: random episodes of an environment, or samples of the model
on training prompts. A diagnosis rests on the metrics that the run has recorded, judged by the rules that
training applies too (`runs.rules`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.errors import Refused
from tokenrl.runs.files import check_place

if TYPE_CHECKING:
    from tokenrl.advisor.advice import Advice


def run(args: AdviseArguments) -> int:
    """Print the advice, write the files that `args` asks for, and return the exit code.

    Raises:
        Refused: not exactly one of env, task and run was given, a rule forbids a choice, the run cannot be
            diagnosed, or a file cannot be written.
    """
    if sum(map(bool, (args.env, args.task, args.run))) != 1:
        raise Refused(
            "Say what the advice is for, one of three: --env ID for control, --task NAME for a language "
            "model, or --run DIR for a run of either that has been started."
        )
    files = [Path(path).absolute() for path in (args.config, args.json) if path is not None]
    for path in files:
        check_place(path)
        if files.count(path) > 1:
            raise Refused(f"{path} was given twice, and one file would replace the other. Give two names.")
    advice = _advice(args)
    advice.show(args.config)
    advice.write(args.config, args.json)
    return 0


def _advice(args: AdviseArguments) -> Advice:
    if args.env:
        from tokenrl.advisor.environment import advise_environment

        return advise_environment(args)
    if args.task:
        from tokenrl.advisor.language import advise_language

        return advise_language(args)
    from tokenrl.advisor.diagnosis import advise_run

    return advise_run(args.run)
