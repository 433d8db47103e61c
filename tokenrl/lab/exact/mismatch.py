"""Runs `tokenrl lab exact --sampler`: what each correction leaves of the gradient, over random problems."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.lab.exact.catalogue import LabArguments
from tokenrl.lab.exact.problems import Problem
from tokenrl.lab.exact.samplers import Perturbation, off_policy_moments, perturbed_problem
from tokenrl.runs.console import rich_console, rich_table

PROBLEMS = 20
"""Number of random problems on which corrections are compared."""
ROUNDING = 1e-9
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "none, centred": {"importance_centre": True},
    "token": {"importance": "token"},
    "token, truncate 2": {"importance": "token", "importance_cap": 2.0},
    "token, mask 2": {"importance": "token", "importance_cap": 2.0, "importance_bound": "mask"},
    "geometric": {"importance": "geometric"},
    "sequence, truncate 2": {"importance": "sequence", "importance_cap": 2.0},
    "sequence, mask 3": {"importance": "sequence", "importance_cap": 3.0, "importance_bound": "mask"},
    "sequence": {"importance": "sequence"},
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
MISSING = (
    "The sampler can produce completions that have a probability of {kept:.3f} under the policy in the "
    "median, and of {least:.3f} at least. No weight brings back the rest: weights of sequences give the "
    "gradient of E[(R - b) 1(kept)] under the policy, with the baseline b and what is kept held fixed."
)


def compare_corrections(args: LabArguments) -> list[dict[str, Any]]:
    """Measure all corrections with the sampler of `--sampler`, and print the table.

    Returns:
        One record for each correction.

    Raises:
        Refused: The sampler cannot be read, or another option chooses estimators.
    """
    if args.estimators or args.preset or args.trl_config:
        raise Refused(
            "--sampler compares the corrections of RLOO, so it excludes --estimators, --preset and "
            "--trl-config. Leave these out."
        )
    perturbation = Perturbation.read(str(args.sampler))
    problems = [perturbed_problem(seed, perturbation) for seed in range(PROBLEMS)]
    records = [record(name, Estimator(**fields), problems) for name, fields in CORRECTIONS.items()]
    table = rich_table(
        "",
        ("correction", "off-policy it is declared"),
        ("off J(policy)", "worst", "cosine", "off J(sampler)", "worst", "noise"),
    )
    for row in records:
        names = ("policy_bias", "worst_policy_bias", "cosine", "sampler_bias", "worst_sampler_bias")
        numbers = ["0" if row[name] < ROUNDING else f"{row[name]:.3f}" for name in names]
        table.add_row(row["correction"], row["declared"], *numbers, f"{row['noise']:.1f}")
    console = rich_console(width=120)
    console.print(table)
    console.print(EXPLANATION.format(sampler=args.sampler, problems=PROBLEMS))
    kept = [kept_mass(problem) for problem in problems]
    if min(kept) < 1 - ROUNDING:
        console.print(MISSING.format(kept=median(kept), least=min(kept)))
    return records


def record(name: str, estimator: Estimator, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the numbers of one correction over all problems, as `EXPLANATION` explains them."""
    pairs = [off_policy_moments(estimator, problem) for problem in problems]
    policy, sampler = ([pair[side].relative_bias for pair in pairs] for side in (0, 1))
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


def kept_mass(problem: Problem) -> float:
    """Return the policy's probability of what the sampler can produce: the mean weight of a completion."""
    drawn = problem.of_sampler.chances > 0
    return float((problem.chances * drawn).sum(-1).mean())
