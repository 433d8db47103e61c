"""The advisor: from an environment or a language task to settings, each with its reason.

It measures before it speaks: random episodes of an environment, or samples of the model on training prompts.
It refuses and warns by the guards of `core.guards`, which training applies by itself.
"""

from __future__ import annotations

from pathlib import Path

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.errors import Refused


def run(args: AdviseArguments) -> int:
    """Print the advice and write the files asked for; returns the exit code.

    Raises:
        Refused: neither or both of env and task, a choice that a rule forbids, or a file that cannot be
            written there.
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
