"""Reads the facts by which the rules about numbers (`runs.rules`) judge a training, and holds what they find.

Facts are one flat mapping, such as `{"recent_entropy": 0.05, "has_entropy_bonus": False}`. A name without a
prefix is a setting, or a number of the whole run. A prefix says which steps or which evaluation it is from:

    step_     the step just made, or the trial steps of a check
    first_    the first step
    latest_   the last few steps, with enough groups of completions for a sure mean
    recent_   the last tenth of the steps
    early_    the first tenth of the steps, which a comparison reads
    before_   the evaluation before training; best_ the highest so far; after_ the last one

Names after a prefix are those in the column "fact" of the table of metrics, `stderr` (the standard error of
the reward) and `equal` (the share of groups with equal rewards; where no groups are compared, of steps). Of
evaluations there are also `step`, and the same three with `greedy_` (of greedy completions or episodes) and
`most_` (of the best of several samples of each prompt).

Facts that are true or false count as false if they are missing: `is_solved` (the last evaluation reaches the
threshold), `is_easy` (the training reward does, or is a success rate near 1), `gained` and `fell` (the reward
is higher than at the start, lower than at its best, by more than chance), `has_entropy_bonus`,
`needs_groups` (the estimator compares completions of the same prompt). Every other fact is explained at the
rule that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, NamedTuple

from tokenrl.runs.metric_table import all_metrics
from tokenrl.runs.reader import finite

Rows = Sequence[Mapping[str, Any]]
Weight = Literal["watch", "act", "void"]
Part = Literal["step", "first", "latest", "recent"]

LOST_SHARE = 0.5
"""Above this share of groups with equal rewards, or of completions that are cut, most work is lost; and below
it, as a share of effective samples: importance weights then about double the variance of the gradient."""
LATEST_STEPS = 3
LATEST_GROUPS = 48
"""Fewest steps, and fewest groups of completions in them, whose mean reward is called the latest."""
METRICS = {metric.fact: metric.name for metric in all_metrics() if metric.fact}
"""The metric behind each name after a prefix."""
SOLVED_ADVICE = (
    "The policy already solves these prompts: take harder ones, or evaluate it (tokenrl evaluate)."
)


class Missing(float):
    """A number that is not there: it is false, and no comparison with it holds."""

    def __bool__(self) -> bool:
        return False


class Facts(dict[str, Any]):
    """Facts by name, also as attributes; an attribute that is not there is `Missing`."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name, Missing("nan"))


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        flag: a short name for programs, such as `policy-destroyed`.
        weight: `watch` is a remark; `act` says that a setting should change; `void` says that the numbers
            mean nothing as they are: a check is then not passed. An arm of a comparison has its verdict all
            the same, with the finding beside it.
        text: one or more whole sentences, with the numbers.
        changes: the settings to change, by name, such as `{"estimator.entropy_coef": 0.01}`.
        precedence: a finding of weight `act` or `void` may explain all findings of lower precedence, so that
            their changes are not advised beside its own.
    """

    flag: str
    weight: Weight
    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    precedence: int = 1

    def __str__(self) -> str:
        """Return the finding as one line, its flag first."""
        return f"{self.flag}: {self.text}"


Judgement = tuple[Any, ...] | None
"""What a rule returns: the weight (None for nothing), the sentence with facts in braces, and the changes."""
Judge = Callable[[Facts], Judgement]


class Rule(NamedTuple):
    """A subject with the function that judges it, and the precedence of its findings (see `Finding`)."""

    flag: str
    judge: Judge
    precedence: int


RULES: list[Rule] = []  # in the order of the findings


def rule(flag: str, precedence: int = 1) -> Callable[[Judge], None]:
    """Enter a function into the table as the rule about a subject."""

    def enter(function: Judge) -> None:
        RULES.append(Rule(flag, function, precedence))

    return enter


def above(
    number: float, watch: float = math.inf, act: float = math.inf, void: float = math.inf
) -> Weight | None:
    """Return the gravest weight whose limit a number exceeds; None if it exceeds none."""
    if number > void:
        return "void"
    if number > act:
        return "act"
    return "watch" if number > watch else None


def facts(rows: Rows, settings: Any, *parts: Part, **numbers: Any) -> dict[str, Any]:
    """Return the settings of a run, the means of some parts of its steps, and its evaluations as facts.

    A mean leaves out numbers that are missing or not finite; of none it is nan, which rules take as missing.

    Args:
        rows: rows of metrics.jsonl in order. The trial steps of a check all have the same number.
        settings: the settings of the run, a dataclass, whose estimator's axes are facts too.
        parts: the prefixes of the means. The rules about the latest steps compare them with the first step.
        **numbers: facts that only the caller knows, or knows better; None for what is unknown.
    """
    estimator: Any = settings.estimator
    metrics = dict(METRICS)
    if getattr(settings, "head", "softmax") != "softmax":
        del metrics["entropy"]  # the entropy of a density may well be negative
    steps = [row for row in rows if row["step"] > 0]
    groups_per_step = getattr(settings, "prompts_per_step", LATEST_GROUPS)
    count = max(LATEST_STEPS, math.ceil(LATEST_GROUPS / groups_per_step))
    rows_of: dict[Part, Rows] = {
        "step": [row for row in steps if row["step"] == steps[-1]["step"]],
        "first": steps[:1],
        "latest": steps[-count:] if len(steps) >= count else [],
        "recent": steps[-max(1, len(steps) // 10) :],
    }
    observed = {**vars(estimator), **vars(settings), "has_baseline": estimator.subtracts_baseline}
    observed["has_entropy_bonus"] = estimator.entropy_coef > 0
    observed["needs_groups"] = estimator.needs_groups
    for part in parts:
        for name, metric in metrics.items():
            observed[f"{part}_{name}"] = _mean(row.get(metric) for row in rows_of[part])
        shares = [share_equal(row, estimator.needs_groups) for row in rows_of[part]]
        observed[f"{part}_equal"] = _mean(shares)
    if "latest" in parts and rows_of["latest"]:
        observed |= _latest_facts(rows_of["latest"], steps[0], observed)
    return observed | evaluation_facts(rows) | numbers


def evaluation_facts(rows: Rows) -> dict[str, Any]:
    """Return the first, the best and the last evaluation of what is sampled, greedy, and the best of k samples."""
    best_of = [n for row in rows[:1] for n in row if n.startswith(("eval_best@", "eval_pass@"))]
    metrics = {"eval_reward": "", "eval_reward_greedy": "greedy_"}
    metrics |= dict.fromkeys(sorted(best_of)[:1], "most_")
    observed = dict[str, Any]()
    evaluated = [
        row for row in rows if "eval_reward" in row or "eval_reward_greedy" in row
    ]  # few, of many steps
    for metric, fact in metrics.items():
        evaluations = [row for row in evaluated if finite(row.get(metric)) is not None]
        if not evaluations:
            continue
        best = max(evaluations, key=lambda row: float(row[metric]))
        for prefix, row in (("before", rows[0]), ("best", best), ("after", evaluations[-1])):
            observed[f"{prefix}_{fact}reward"] = row.get(metric)
            observed[f"{prefix}_{fact}stderr"] = row.get(f"{metric}_stderr")
            observed[f"{prefix}_{fact}step"] = row["step"]
    return observed


def _mean(values: Iterable[Any]) -> float:
    """Return the mean of the values that are finite numbers; nan if none is."""
    numbers = []
    for value in values:
        number = finite(value)
        if number is not None:
            numbers.append(number)
    return fmean(numbers) if numbers else math.nan


def share_equal(row: Mapping[str, Any], needs_groups: bool) -> float:
    """Return the share of groups of a step with equal rewards; without groups 1 if all rewards are equal.

    It is nan if the step has no such number.
    """
    number = finite(row.get("frac_reward_zero_std" if needs_groups else "reward_std"))
    if number is None:
        return math.nan
    return number if needs_groups else float(number == 0)


def _latest_facts(
    latest: Rows, first: Mapping[str, Any], means: Mapping[str, Any]
) -> dict[str, Any]:
    """Return which steps are the latest, the noise of their reward, and signs of a policy that is lost.

    Equal rewards show no noise, so the noise of the first step counts too. Without signs the policy may
    recover.
    """
    equal = means["latest_equal"]
    entropy = means["latest_entropy"]
    cut = means["latest_cut"]
    signs = []
    if equal >= 0.75:
        signs.append(f"{equal:.0%} of the groups had equal rewards")
    if entropy < means["first_entropy"] / 4:
        signs.append(f"the entropy was {entropy:.2g} nats, down from {means['first_entropy']:.2g}")
    if cut >= max(LOST_SHARE, means["first_cut"] + (1 - means["first_cut"]) / 4):
        signs.append(f"{cut:.0%} of the completions were cut")
    errors = [
        math.nan if row.get("reward_stderr") is None else row["reward_stderr"] for row in latest
    ]
    noise_at_first = (first.get("reward_stderr") or 0.0) / math.sqrt(len(latest))
    return {
        "steps": f"steps {latest[0]['step']} to {latest[-1]['step']}",
        "latest_stderr": max(math.hypot(*errors) / len(latest), noise_at_first),
        "signs": " and ".join(signs),
    }


def lower_rate(facts: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """Say that the learning rate is the likely cause of a loss; return this with the rate to take instead."""
    rate = facts["learning_rate"]
    usual = facts.get("usual_rate") or 0.0
    advised = rate / 4
    comparison = f", although {usual:g} is usual here" if usual else ""
    if 0 < usual < rate:
        advised = usual
        comparison = ", which is usual here"
    text = f"The learning rate, {rate:g}, is the likely cause: try --learning-rate {advised:g}{comparison}."
    return text, {"learning_rate": advised}


def remedy(facts: Facts) -> str:
    """Say what helps most where rewards do not differ.

    `pass_mark` is the reward that counts as solved; `can_warm_start` says that there are demonstrations that
    have not been used; `uncut` is advice on how to let completions end before the limit.
    """
    if "num_envs" in facts:
        return "Reward steps towards the goal, or try more or longer episodes (--num-envs, --num-steps)."
    if facts.step_reward >= facts.pass_mark:
        return SOLVED_ADVICE
    if facts.can_warm_start:
        return "This model cannot do the task yet: add --warm-start, to begin with the task's demonstrations."
    if facts.step_cut >= LOST_SHARE:
        return "{step_cut:.0%} of completions are cut at {max_completion_length} tokens, before an end: {uncut}"
    return (
        "Use prompts that the policy sometimes solves, a graded reward, demonstrations (tokenrl sft), "
        "or more generations per prompt."
    )


def rounded(number: float, figures: int = 1) -> float:
    """Round to a few significant figures, where only the order of magnitude matters."""
    return float(f"{number:.{figures}g}")
