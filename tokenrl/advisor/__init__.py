"""Recommends settings for an environment, and diagnoses runs, each with its reasons.

Advice before a run rests on random episodes of the environment. A diagnosis rests on the metrics that the run
has recorded, judged by the rules that training applies too (`runs.rules`).
"""

from __future__ import annotations

from tokenrl.advisor.advice import AdviseArguments
from tokenrl.errors import Refused


def run(args: AdviseArguments) -> int:
    """Print the advice, and return the exit code.

    Raises:
        Refused: not exactly one of env and run was given, a rule forbids a choice, or the run cannot be
            diagnosed.
    """
    if bool(args.env) == bool(args.run):
        raise Refused(
            "Say what the advice is for: --env ID for an agent that is still to be trained, or --run DIR for "
            "a run of `tokenrl train` or `tokenrl control` that has been started."
        )
    if args.env:
        from tokenrl.advisor.environment import advise_environment

        advise_environment(args).show()
    else:
        from tokenrl.advisor.diagnosis import advise_run

        advise_run(args.run).show()
    return 0
