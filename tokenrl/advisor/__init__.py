"""Recommends settings for an environment or a language task, and diagnoses runs, each with its reasons.

Advice before a run rests on a short measurement: random episodes of an environment, or samples of the model
on training prompts. A diagnosis rests on the metrics that the run has recorded, judged by the rules that
training applies too (`runs.rules`).
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.errors import Refused
from tokenrl.runs.files import check_place, plain, write_json


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
    for path in (args.config, args.json):
        if path is not None:
            check_place(path)
    if args.env:
        from tokenrl.advisor.environment import advise_environment

        advice = advise_environment(args)
    elif args.task:
        from tokenrl.advisor.language import advise_language

        advice = advise_language(args)
    else:
        from tokenrl.advisor.diagnosis import advise_run

        advice = advise_run(args.run)
    if args.config is not None:
        write_json(Path(args.config), {"kind": advice.command, **asdict(advice.arguments)})
        line = shlex.join(["tokenrl", advice.command, "--config", args.config])
        advice = replace(advice, line=line if advice.line else "")
    if args.json is not None:
        write_json(Path(args.json), plain(advice))
    advice.show()
    return 0
