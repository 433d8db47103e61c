"""Recommends settings for an environment or a language task, each with its reason.

The advice rests on a short measurement: random episodes of an environment, or samples of the model on
training prompts. It refuses and warns by the rules of `core.guards`, which training applies too.
"""

from __future__ import annotations

from pathlib import Path

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.errors import Refused


def run(args: AdviseArguments) -> int:
    """Print the advice, write the files that `args` asks for, and return the exit code.

    Raises:
        Refused: not exactly one of env and task was given, a rule forbids a choice, or a file cannot be
            written.
    """
    if bool(args.env) == bool(args.task):
        raise Refused(
            "Say what the advice is for: --env ID for control, or --task NAME for a language model."
        )
    for path in (args.config, args.json):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise Refused(f"{path} cannot be written: its directory does not exist. Make it first.")
    from tokenrl.advisor.show import print_advice, write_advice

    if args.env:
        from tokenrl.advisor.environment import advise_environment

        advice = advise_environment(args)
    else:
        from tokenrl.advisor.language import advise_language

        advice = advise_language(args)
    print_advice(advice, args.config)
    write_advice(advice, config=args.config, json=args.json)
    return 0
