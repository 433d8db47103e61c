"""Runs `tokenrl lab exact`: prints its progress and a table, and writes records."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tokenrl.core.effects import EXACT, UP_TO_SCALE
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, nearest
from tokenrl.foreign import meaning
from tokenrl.lab.exact.catalogue import LabArguments, named_estimators
from tokenrl.lab.exact.discounting import objectives_on_control
from tokenrl.lab.exact.enumeration import TOLERANCE, Moments
from tokenrl.lab.exact.explanation import explain
from tokenrl.lab.exact.problems import Problem
from tokenrl.lab.exact.samplers import (
    Perturbation,
    measure_off_policy,
    off_policy_moments,
    perturbed_problem,
)
from tokenrl.lab.exact.turns import compare_turns
from tokenrl.lab.exact.verdict import Verdict, measure_bias
from tokenrl.runs.files import check_place, write_text
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
PROBLEMS = 20
"""Number of random problems on which corrections are compared."""
CORRECTIONS = {
    "none": "rloo",
    "none, centred": "importance_centre=True",
    "none, centred, top 1": "importance_centre=True,importance_centre_top=1",
    "token": "importance=token",
    "token, truncate 2": "importance=token,importance_cap=2.0",
    "token, mask 2": "importance=token,importance_cap=2.0,importance_bound=mask",
    "prefix": "importance=prefix",
    "prefix, clip 0.2": "importance=prefix,importance_clip=0.2",
    "geometric": "importance=geometric",
    "sequence, truncate 2": "importance=sequence,importance_cap=2.0",
    "sequence, mask 3": "importance=sequence,importance_cap=3.0,importance_bound=mask",
    "sequence": "importance=sequence",
}
"""The corrections of RLOO that are compared: importance, and its bound with the cap."""
EXPLANATION = (
    "RLOO with two completions per prompt, drawn by a sampler with {sampler}, on {problems} random problems "
    "of three tokens and at most three steps. Off: |E g - grad J| / |grad J|, the median and the worst. "
    "J(policy) is the expected reward of the policy that is trained. J(sampler) is that of the sampler; its "
    "gradient is taken in the sampler's own logits a z + d, with z those of the policy, and in z it is a "
    "times as large. Cosine: between E g and grad J(policy), the median; noise: tr Var g / |E g|^2, the "
    "median."
)


def exact(args: LabArguments) -> int:
    """Measure the estimators, print the tables and write the file.

    Returns:
        The exit code: 1 if any declaration is wrong, else 0.

    Raises:
        Refused: For an unknown estimator, options that exclude each other, or a file that cannot be written.
    """
    from rich.progress import track

    if args.json is not None:
        check_place(args.json)
    exclusive = (args.preset, args.trl_config, args.sampler, args.estimators, args.turns)
    if sum(map(bool, exclusive)) > 1:
        raise Refused(
            "--preset, --trl-config, --sampler, --estimators, --turns exclude each other; give one."
        )
    if args.turns:
        write_records(args, compare_turns())
        return 0
    if args.sampler is not None:
        write_records(args, compare_corrections(args.sampler))
        return 0
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
    if not args.estimators and not explanation:
        print_objectives()
    write_records(args, records(verdicts))
    return 0 if all(verdict.ok for verdict in verdicts.values()) else 1


def both_verdicts(estimator: Estimator) -> Verdict:
    """Return the verdict of `measure_bias`, with that on a sampler that differs."""
    return replace(measure_bias(estimator), off_policy=measure_off_policy(estimator))


def write_records(args: LabArguments, written: list[dict[str, Any]]) -> None:
    """Write records to the file of `--json`, if there is one."""
    if args.json is not None:
        text = json.dumps(written, indent=1, allow_nan=False)
        write_text(Path(args.json), text + "\n")


def records(verdicts: Mapping[str, Verdict]) -> list[dict[str, Any]]:
    """Return one record per estimator, for JSON.

    `on_binary` is the status found on rewards of 0 and 1, None unless a better one is declared for them;
    `of_reward` that for the gradient of E[R], None if that is the objective. `cosine` is the lowest and
    `relative_bias` the largest over the problems. `variance` and `noise` are those of the first problem;
    `noise` is None if the expected gradient is 0. `problems` has the numbers of each.
    """
    records = []
    for name, verdict in verdicts.items():
        record = {"estimator": name, **_attributes(verdict, OF_ALL)}
        for special in CLAIMS:
            claim = getattr(verdict, special)
            record[special] = claim and claim.found
        record["problems"] = [_attributes(moments, NUMBERS) for moments in verdict.measurements]
        records.append(record)
    return records


def _attributes(numbers: object, names: Sequence[str]) -> dict[str, Any]:
    """Return attributes by name, with None for an infinite number."""
    values = {}
    for name in names:
        value = getattr(numbers, name)
        values[name] = None if value == math.inf else value
    return values


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
    for name, verdict in verdicts.items():
        if verdict.of_larger_groups:
            console.print(f"{name}: {verdict.of_larger_groups} with groups of 3 or more.")
    wrong = [name for name, verdict in verdicts.items() if not verdict.ok]
    summary = f"declared wrongly: {'; '.join(wrong)}" if wrong else "every declaration holds"
    console.print(
        "cosine: between the expected gradient and that of J, the lowest over the problems; bias: "
        "|E g - grad J| / |grad J|, the largest, a wrong scale included; noise: tr Var g / |E g|^2 on the "
        "first problem, which is another one for other objectives; sampler: whose gradient it is where the "
        "sampler differs from the policy, empty if biased (--sampler noise=0.3 compares corrections). "
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


def print_objectives() -> None:
    """Print which objective each choice of returns and baseline ascends on a small control problem."""
    heads = ("on a control problem of 3 steps", "gamma", "of J_1", "of J_gamma", "ascends")
    table = rich_table("", heads, no_wrap=True)
    for name, gamma, comparison in objectives_on_control():
        discounted = _against(comparison.discounted) if gamma < 1 else "the same"
        table.add_row(
            name, f"{gamma:g}", _against(comparison.undiscounted), discounted, comparison.ascends
        )
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


def compare_corrections(sampler: str) -> list[dict[str, Any]]:
    """Measure all corrections with a sampler such as `noise=0.3`, and print the table.

    Returns:
        One record for each correction.

    Raises:
        Refused: The sampler cannot be read.
    """
    perturbation = Perturbation.read(sampler)
    problems = [perturbed_problem(seed, perturbation) for seed in range(PROBLEMS)]
    records = [
        record(name, Estimator.preset(changes), problems) for name, changes in CORRECTIONS.items()
    ]
    heads = ("off J(policy)", "worst", "cosine", "off J(sampler)", "worst", "noise")
    table = rich_table("", ("correction", "off-policy it is declared"), heads)
    for row in records:
        names = ("policy_bias", "worst_policy_bias", "cosine", "sampler_bias", "worst_sampler_bias")
        numbers = ["0" if row[name] < TOLERANCE else f"{row[name]:.3f}" for name in names]
        table.add_row(row["correction"], row["declared"], *numbers, f"{row['noise']:.1f}")
    console = rich_console(width=120)
    console.print(table)
    console.print(EXPLANATION.format(sampler=sampler, problems=PROBLEMS))
    return records


def record(name: str, estimator: Estimator, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the numbers of one correction over all problems, as `EXPLANATION` explains them."""
    pairs = [off_policy_moments(estimator, problem) for problem in problems]
    policy = [beside_policy.relative_bias for beside_policy, _ in pairs]
    sampler = [beside_sampler.relative_bias for _, beside_sampler in pairs]
    return {
        "correction": name,
        "declared": estimator.off_policy_status,
        "policy_bias": median(policy),
        "worst_policy_bias": max(policy),
        "sampler_bias": median(sampler),
        "worst_sampler_bias": max(sampler),
        "cosine": median(moments.cosine for moments, _ in pairs),
        "noise": median(moments.noise for moments, _ in pairs),
    }
