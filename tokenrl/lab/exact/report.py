"""Runs `tokenrl lab exact`: prints its progress and a table, and writes records."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, nearest
from tokenrl.files import write_json
from tokenrl.foreign import meaning
from tokenrl.lab.exact.catalogue import LabArguments, named_estimators
from tokenrl.lab.exact.explanation import explain
from tokenrl.lab.exact.samplers import measure_off_policy
from tokenrl.lab.exact.verdict import Verdict, measure_bias
from tokenrl.runs.output import rich_console, rich_table
from tokenrl.runs.threads import using_threads

OF_ALL = ("declared", "found", "cosine", "relative_bias", "variance", "noise", "ok")
"""What a record says of an estimator; `Verdict` explains it."""
CLAIMS = ("on_binary", "of_reward", "off_policy")
"""Special cases of a verdict, of which a record has the status found."""
OFF_POLICY = {
    "exact_for_policy": "policy",
    "exact_for_sampler": "sampler",
    "biased": "",
    "unknown": "?",
}
"""Whose gradient it is where the sampler differs from the policy, as the table writes it."""
NUMBERS = ("problem", "status", "cosine", "relative_bias", "scale", "variance", "mse", "noise")
"""What a record says of each problem; `Moments` explains the numbers."""

FEW = 4
"""Estimators with the same problems that are named; of more the number is said."""


def exact(args: LabArguments) -> int:
    """Measure the estimators, print the tables and write the file.

    Returns:
        The exit code: 1 if any declaration is wrong, else 0.

    Raises:
        Refused: For an unknown estimator, options that exclude each other, or a file that cannot be written.
    """
    from rich.progress import track

    if sum(map(bool, (args.preset, args.trl_config, args.estimators))) > 1:
        raise Refused("--preset, --trl-config, --estimators exclude each other; give one.")
    explanation = explain(args)
    estimators = explanation or named_estimators()
    estimators |= {name: Estimator.preset(name) for name in args.estimators if ":" in name}
    for name in args.estimators:
        if name not in estimators:
            hint = f" {meaning('preset', (), name)}".rstrip() or nearest(name, estimators)
            raise Refused(
                f"The lab knows no estimator {name!r}.{hint} It knows: {'; '.join(estimators)}."
            )
    if args.estimators:
        estimators = {name: e for name, e in estimators.items() if name in args.estimators}
    progress = track(estimators, "enumerating", console=rich_console(file=sys.stderr))
    with using_threads(1):  # many small sums, which a second thread only slows down
        verdicts = {name: both_verdicts(estimators[name]) for name in progress}
    print_table(verdicts)
    if args.json is not None:
        write_json(Path(args.json), records(verdicts))
    return 0 if all(verdict.ok for verdict in verdicts.values()) else 1


def both_verdicts(estimator: Estimator) -> Verdict:
    """Return the verdict of `measure_bias`, with that on a sampler that differs."""
    return replace(measure_bias(estimator), off_policy=measure_off_policy(estimator))


def records(verdicts: Mapping[str, Verdict]) -> list[dict[str, Any]]:
    """Return one record per estimator, for JSON.

    `on_binary` is the status found on rewards of 0 and 1, None unless a better one is declared for them;
    `of_reward` that for the gradient of E[R], None if that is the objective. `cosine` is the lowest and
    `relative_bias` the largest over the problems. `variance` and `noise` are those of the first problem;
    `noise` is infinite if the expected gradient is 0. `problems` has the numbers of each.
    """
    records = []
    for name, verdict in verdicts.items():
        record = {"estimator": name} | _attributes(verdict, OF_ALL)
        claims = _attributes(verdict, CLAIMS).items()
        record |= {special: claim and claim.found for special, claim in claims}
        record["problems"] = [_attributes(moments, NUMBERS) for moments in verdict.measurements]
        records.append(record)
    return records


def _attributes(numbers: object, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(numbers, name) for name in names}


def print_table(verdicts: Mapping[str, Verdict]) -> None:
    """Print one line per estimator, and below it what the columns mean."""
    console = rich_console(width=120)
    heads = ("estimator", "declared", "found", "sampler"), ("cosine", "bias", "noise", "ok")
    table = rich_table("", *heads, no_wrap=True)
    for name, verdict in verdicts.items():
        bias = verdict.relative_bias
        off_policy = verdict.off_policy.declared if verdict.off_policy else "unknown"
        table.add_row(
            name,
            verdict.declared,
            verdict.found,
            OFF_POLICY[off_policy],
            f"{verdict.cosine:.6f}",
            f"{bias:.1e}" if bias < 1e-3 else f"{bias:.3f}",
            f"{verdict.noise:.2f}",
            "yes" if verdict.ok else "NO",
            style=None if verdict.ok else "bold red",
        )
    console.print(table)
    of_reward = [f"{name}: {v.of_reward.found}" for name, v in verdicts.items() if v.of_reward]
    if of_reward:
        statuses = "; ".join(of_reward)
        console.print(f"What the gradient of another objective is for the mean reward: {statuses}.")
    wrong = [name for name, verdict in verdicts.items() if not verdict.ok]
    summary = f"declared wrongly: {'; '.join(wrong)}" if wrong else "every declaration holds"
    console.print(
        "cosine: between the expected gradient and that of J, the lowest over the problems; bias: "
        "|E g - grad J| / |grad J|, the largest, a wrong scale included; noise: tr Var g / |E g|^2 on the "
        "first problem, which is another one for other objectives; sampler: whose gradient it is where the "
        "sampler differs from the policy, empty if biased. "
        f"{tried_in_words(verdicts)}\n{len(verdicts)} estimators; {summary}."
    )


def tried_in_words(verdicts: Mapping[str, Verdict]) -> str:
    """Say on what each estimator was tried; of many with the same problems the number stands for the names."""
    names = defaultdict(list)
    for name, verdict in verdicts.items():
        names[verdict.tried].append(name)
    sentences = []
    for tried, same in names.items():
        whom = "; ".join(same) if len(same) <= FEW else f"{len(same)} estimators"
        sentences.append(f"Tried for {whom}: {tried}.")
    return "\n".join(sentences)
