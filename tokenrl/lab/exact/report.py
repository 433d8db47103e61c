"""Runs `tokenrl lab exact`: prints its progress and a table, and writes records."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenrl.core.choices import EXACT, UP_TO_SCALE
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, nearest
from tokenrl.lab.exact.catalogue import LabArguments, named_estimators
from tokenrl.lab.exact.discounting import objectives_on_control
from tokenrl.lab.exact.enumeration import Moments
from tokenrl.lab.exact.explanation import explain
from tokenrl.lab.exact.mismatch import compare_corrections
from tokenrl.lab.exact.samplers import measure_off_policy
from tokenrl.lab.exact.verdict import Verdict, measure_bias
from tokenrl.runs.console import rich_console, rich_table
from tokenrl.runs.files import check_place, write_text
from tokenrl.runs.threads import using_threads

OF_ALL = ("declared", "found", "cosine", "relative_bias", "variance", "noise", "ok")
"""What a record says of an estimator; `Verdict` explains it."""
OFF_POLICY = {"exact_for_policy": "policy", "exact_for_sampler": "sampler", "biased": "", "unknown": "?"}
"""Whose gradient it is where the sampler differs from the policy, as the table writes it."""
NUMBERS = ("problem", "status", "cosine", "relative_bias", "scale", "variance", "mse", "noise")
"""What a record says of each problem; `Moments` explains the numbers."""


def exact(args: LabArguments) -> int:
    """Measure the estimators, print the tables and write the file.

    Returns:
        The exit code: 1 if any declaration is wrong, else 0.

    Raises:
        Refused: For an unknown estimator, or a file that cannot be written.
    """
    from rich.progress import track

    if args.json is not None:
        check_place(args.json)
    if args.sampler is not None:
        write_records(args, compare_corrections(args))
        return 0
    explanation = explain(args)
    estimators = explanation or named_estimators()
    for name in args.estimators:
        if name not in estimators:
            hint = nearest(name, estimators)
            raise Refused(f"The lab knows no estimator {name!r}.{hint} It knows: {'; '.join(estimators)}.")
    chosen = [name for name in estimators if not args.estimators or name in args.estimators]
    progress = track(chosen, "enumerating", console=rich_console(file=sys.stderr))
    with using_threads(1):  # many small sums, which a second thread only slows down
        verdicts = {name: both_verdicts(estimators[name]) for name in progress}
    print_table(verdicts)
    if not args.estimators and not explanation:
        print_objectives()
    write_records(args, records(verdicts))
    return 0 if all(v.ok for v in verdicts.values()) else 1


def both_verdicts(estimator: Estimator) -> Verdict:
    """Return the verdict of `measure_bias`, with that on a sampler that differs."""
    return replace(measure_bias(estimator), off_policy=measure_off_policy(estimator))


def write_records(args: LabArguments, written: list[dict[str, Any]]) -> None:
    """Write records to the file of `--json`, if there is one."""
    if args.json is not None:
        write_text(Path(args.json), json.dumps(written, indent=1, allow_nan=False) + "\n")


def records(verdicts: Mapping[str, Verdict]) -> list[dict[str, Any]]:
    """Return one record per estimator, for JSON.

    `on_binary` is the status found on rewards of 0 and 1, None unless a better one is declared for them;
    `of_reward` that for the gradient of E[R], None if that is the objective. `cosine` is the lowest and
    `relative_bias` the largest over the problems. `variance` and `noise` are those of the first problem;
    `noise` is None if the expected gradient is 0. `problems` has the numbers of each.
    """
    return [
        {
            "estimator": name,
            **{name: _finite(getattr(v, name)) for name in OF_ALL},
            "on_binary": v.on_binary and v.on_binary.found,
            "of_reward": v.of_reward and v.of_reward.found,
            **({} if v.off_policy is None else {"off_policy": v.off_policy.found}),
            "problems": [{name: _finite(getattr(m, name)) for name in NUMBERS} for m in v.measurements],
        }
        for name, v in verdicts.items()
    ]


def _finite(value: Any) -> Any:
    return None if value == math.inf else value


def print_table(verdicts: Mapping[str, Verdict]) -> None:
    """Print one line per estimator, and below it what the columns mean."""
    console = rich_console(width=120)
    heads = ("estimator", "declared", "found", "sampler"), ("cosine", "bias", "noise", "ok")
    table = rich_table("", *heads, no_wrap=True)
    for name, v in verdicts.items():
        bias = f"{v.relative_bias:.1e}" if v.relative_bias < 1e-3 else f"{v.relative_bias:.3f}"
        row = (name, v.declared, v.found, OFF_POLICY[v.off_policy.declared if v.off_policy else "unknown"])
        numbers = (f"{v.cosine:.6f}", bias, f"{v.noise:.2f}", "yes" if v.ok else "NO")
        table.add_row(*row, *numbers, style=None if v.ok else "bold red")
    console.print(table)
    of_reward = [f"{name}: {v.of_reward.found}" for name, v in verdicts.items() if v.of_reward]
    if of_reward:
        console.print(
            f"What the gradient of another objective is for the mean reward: {'; '.join(of_reward)}."
        )
    wrong = [name for name, v in verdicts.items() if not v.ok]
    console.print(
        "cosine: between the expected gradient and that of J, the lowest over the problems; bias: "
        "|E g - grad J| / |grad J|, the largest, a wrong scale included; noise: tr Var g / |E g|^2 on the "
        "first problem; sampler: whose gradient it is where the sampler differs from the policy, empty if "
        "biased (--sampler noise=0.3 compares corrections). "
        f"Tried: up to {max(v.tried for v in verdicts.values())}.\n"
        f"{len(verdicts)} estimators; "
        + (f"declared wrongly: {'; '.join(wrong)}." if wrong else "every declaration holds.")
    )


def print_objectives() -> None:
    """Print which objective each choice of returns and baseline ascends on a small control problem."""
    heads = ("on a control problem of 3 steps", "gamma", "of J_1", "of J_gamma", "ascends")
    table = rich_table("", heads, no_wrap=True)
    for name, gamma, comparison in objectives_on_control():
        discounted = _against(comparison.discounted) if gamma < 1 else "the same"
        table.add_row(name, f"{gamma:g}", _against(comparison.undiscounted), discounted, comparison.ascends)
    console = rich_console(width=120)
    console.print(table)
    console.print(
        "The expected gradient compared with those of J_1 = E[sum r_t] and J_gamma = E[sum gamma^t r_t]; off "
        "by: |E g - grad J| / |grad J|, and the cosine. There are two episodes per step. V^pi is the value "
        "of the state and the steps left; any V is a random number per state. Cut: 2 of 4 steps are seen, "
        "and J is that of all 4, through the actions before the cut. 'Timestep mean of all' tends to J_1 "
        "with more episodes."
    )


def _against(match: Moments) -> str:
    if match.status == EXACT:
        return "the gradient"
    if match.status == UP_TO_SCALE:
        return f"{match.scale:.3f} of it"
    return f"off by {match.relative_bias:.3f}, cos {match.cosine:.4f}"
