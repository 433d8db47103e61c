"""Reads facts from the metrics of a training: what the rules about numbers (`runs.rules`) judge by.

Facts are one flat mapping, such as `{"recent_entropy": 0.05, "has_entropy_bonus": False}`. A name without a
prefix is a setting (see `settings_facts`) or a number of the whole run. A prefix says which steps or which
evaluation it is from:

    step_     the step just made, or the trial steps of a check
    latest_   the last few steps, with enough groups of completions for a sure mean (see `latest_facts`)
    first_    the first step
    early_    the first tenth of the steps
    recent_   the last tenth of the steps
    before_   the evaluation before training; best_ the highest so far; after_ the last one

Names after a prefix (see `means`): `reward`, `stderr` (its standard error), `equal` (share of groups with
equal rewards; where no groups are compared, of steps), `entropy` (nats per action), `cut` (share of
completions cut at the limit), `clip_ratio`, `kl`, `explained_variance`, `grad_norm`, `length` (of episodes).

Facts that are true or false count as false if they are missing: `is_solved` (the last evaluation reaches the
threshold), `is_easy` (the training reward does, or is a success rate near 1), `gained` and `fell` (the reward
is higher than at the start, lower than at its best, by more than chance), `has_entropy_bonus`,
`needs_groups` (the estimator compares completions of the same prompt). Every other fact is explained at the
rule that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

from tokenrl.runs.reader import finite

T = TypeVar("T")
Facts = Mapping[str, Any]

MOST = 0.5
"""Above this share of groups with equal rewards, or of completions that are cut, most work is lost."""
FEW_STEPS, FEW_GROUPS = 3, 48
"""Fewest steps, and fewest groups of completions in them, whose mean reward is called the latest."""
METRICS = {
    **{name: name for name in ("reward", "entropy", "clip_ratio", "kl", "explained_variance", "grad_norm")},
    "cut": "completions/clipped_ratio",
    "length": "episode_length",
}
"""The metric behind each name after a prefix."""


def last_tenth(rows: Sequence[T]) -> Sequence[T]:
    """Return the last tenth of the steps, at least one; none of none."""
    return rows[-max(1, len(rows) // 10) :]


def means(prefix: str, rows: Sequence[Mapping[str, Any]], needs_groups: bool) -> dict[str, Any]:
    """Return the mean of each metric over some rows of metrics.jsonl, as facts with a prefix.

    Numbers that are missing or not finite are left out, and a metric without any number gives no fact.
    """
    facts = {}
    for name, key in (METRICS | {"equal": "frac_reward_zero_std" if needs_groups else "reward_std"}).items():
        known = [row for row in rows if finite(row.get(key)) is not None]
        values = [share_equal(row, needs_groups) if name == "equal" else row[key] for row in known]
        facts[f"{prefix}_{name}"] = fmean(values) if values else None
    return facts


def settings_facts(args: Any) -> dict[str, Any]:
    """Return the settings of a run and the axes of its estimator as facts, and what follows from them."""
    estimator: Any = args.estimator
    facts = {**vars(estimator), **vars(args), "has_baseline": estimator.subtracts_baseline}
    return facts | {"has_entropy_bonus": estimator.entropy_coef > 0, "needs_groups": estimator.needs_groups}


def share_equal(row: Mapping[str, Any], needs_groups: bool) -> float:
    """Return the share of groups of a step with equal rewards; without groups 1 if all rewards are equal."""
    return float(row["frac_reward_zero_std"] if needs_groups else row["reward_std"] == 0)


def latest_facts(rows: Sequence[Mapping[str, Any]], groups: int, needs_groups: bool) -> dict[str, Any]:
    """Return the facts of the latest steps (`steps` says which), of the first and of the evaluations so far.

    Args:
        rows: the rows of metrics.jsonl until now, that of the evaluation before training first.
        groups: groups of completions in a step, which are independent.
        needs_groups: whether the estimator compares the completions of a group.
    """
    count = max(FEW_STEPS, math.ceil(FEW_GROUPS / groups))
    if len(rows) <= count:
        return {}
    latest, first = rows[-count:], rows[1]
    facts = means("latest", latest, needs_groups) | means("first", [first], needs_groups)
    errors = [row["reward_stderr"] for row in latest if finite(row.get("reward_stderr")) is not None]
    if len(errors) == count:  # equal rewards show no noise, so that of the first step counts too
        spread = math.hypot(*errors) / count, (first.get("reward_stderr") or 0.0) / math.sqrt(count)
        facts["latest_stderr"] = max(spread)
    evaluations = [row for row in rows if finite(row.get("eval_reward")) is not None]
    if evaluations:
        best = max(evaluations, key=lambda row: float(row["eval_reward"]))
        facts |= {"best_reward": best["eval_reward"], "best_stderr": best.get("eval_reward_stderr")}
    since, step = latest[0]["step"], latest[-1]["step"]
    return facts | {"before_reward": rows[0].get("eval_reward"), "steps": f"steps {since} to {step}"}


def signs(facts: Facts) -> str:
    """Return what shows that the policy of the latest steps can hardly recover; empty for none."""
    found, first_cut = [], facts["first_cut"]
    if facts["latest_equal"] >= 0.75:
        found.append("{latest_equal:.0%} of the groups had equal rewards")
    if facts["latest_entropy"] < facts["first_entropy"] / 4:
        found.append("the entropy was {latest_entropy:.2g} nats, down from {first_entropy:.2g}")
    if facts["latest_cut"] >= max(MOST, first_cut + (1 - first_cut) / 4):
        found.append("{latest_cut:.0%} of the completions were cut")
    return " and ".join(found)
