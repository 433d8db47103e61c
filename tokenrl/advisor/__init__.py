"""Recommends settings for an environment, and diagnoses runs, each with its reasons.

Advice before a run rests on random episodes of the environment. A diagnosis rests on the metrics that the run
has recorded, judged by the rules that training applies too (`runs.rules`).
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from tokenrl.advisor.advice import AdviseArguments
from tokenrl.errors import Refused
from tokenrl.runs.files import check_place, plain, write_json


def run(args: AdviseArguments) -> int:
    """Print the advice, write the files that `args` asks for, and return the exit code.

    Raises:
        Refused: not exactly one of env and run was given, or config with run; a rule forbids a choice, the run
            cannot be diagnosed, or a file cannot be written.
    """
    if bool(args.env) == bool(args.run) or (args.run and args.config):
        raise Refused(
            "Say what the advice is for: --env ID for an agent that is still to be trained, or --run DIR for "
            "a run of `tokenrl train` or `tokenrl control` that has been started. --config goes with --env."
        )
    for path in (args.config, args.json):
        if path is not None:
            check_place(path)
    if args.env:
        from tokenrl.advisor.environment import advise_environment

        advice = advise_environment(args)
    else:
        from tokenrl.advisor.diagnosis import advise_run

        advice = advise_run(args.run)
    if args.config is not None:
        write_json(Path(args.config), {"kind": advice.command, **vars(advice.arguments)})
        line = shlex.join(["tokenrl", advice.command, "--config", args.config])
        advice = replace(advice, line=f"Run it: {line}")
    if args.json is not None:
        write_json(Path(args.json), plain(advice))
    advice.show()
    return 0
