"""Reads the facts by which the rules about numbers (`runs.rules`) judge a training, and holds what they find.

Facts are one flat mapping, such as `{"recent_entropy": 0.05, "has_entropy_bonus": False}`. A name without a
prefix is a setting, or a number of the whole run. A prefix says which steps or which evaluation it is from:

    step_     the step just made, or the trial steps of a check
    first_    the first step
    latest_   the last few steps, with enough groups of completions for a sure mean
    recent_   the last tenth of the steps
    early_    the first tenth of the steps, which a comparison reads
    before_   the evaluation before training; best_ the highest so far; after_ the last one

Names after a prefix: `reward`, `stderr` (its standard error), `equal` (share of groups with
equal rewards; where no groups are compared, of steps), `entropy` (nats per action), `cut` (share of
completions cut at the limit), `clip_ratio`, `kl`, `explained_variance`, `grad_norm`, `length` (of episodes),
`logp_difference` (of sampler and trainer, nats per token), `effective_samples` (a share of the completions).

Facts that are true or false count as false if they are missing: `is_solved` (the last evaluation reaches the
threshold), `is_easy` (the training reward does, or is a success rate near 1), `gained` and `fell` (the reward
is higher than at the start, lower than at its best, by more than chance), `has_entropy_bonus`,
`needs_groups` (the estimator compares completions of the same prompt). Every other fact is explained at the
rule that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

from tokenrl.errors import Refused
from tokenrl.runs.reader import finite

if TYPE_CHECKING:
    from tokenrl.runs.session import Session

Facts = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
Weight = Literal["watch", "act", "void"]
Part = Literal["step", "first", "latest", "recent"]

MOST = 0.5
"""Above this share of groups with equal rewards, or of completions that are cut, most work is lost; and below
it, as a share of effective samples: importance weights then about double the variance of the gradient."""
APART = 0.05
"""Most nats per token between sampler and trainer. If chance decides their signs, the importance weights of
completions of 100 tokens spread by a factor of 1.9 around 1."""
FEW_STEPS, FEW_GROUPS = 3, 48
"""Fewest steps, and fewest groups of completions in them, whose mean reward is called the latest."""
SEVERAL = 9
"""The steps by which the speed at the start, and now, is measured: half of them do not yet count."""
METRICS = {
    **{
        name: name
        for name in ("reward", "entropy", "clip_ratio", "kl", "explained_variance", "grad_norm")
    },
    "cut": "completions/clipped_ratio",
    "length": "episode_length",
    "logp_difference": "sampling/logp_difference/mean",
    "effective_samples": "sampling/effective_sample_size",
}
"""The metric behind each name after a prefix."""
SOLVED = (
    "The policy already solves these prompts: take harder ones, or evaluate it (tokenrl evaluate)."
)


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        flag: a short name for programs, such as `policy-destroyed`.
        weight: `watch` is a remark; `act` says that a setting should change; `void` says that the numbers
            mean nothing as they are: a check is then not passed, and an arm gets no verdict.
        text: one or more whole sentences, with the numbers.
        changes: the settings to change, by name, such as `{"estimator.entropy_coef": 0.01}`.
    """

    flag: str
    weight: Weight
    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the finding as one line, its flag first."""
        return f"{self.flag}: {self.text}"


def facts(rows: Rows, settings: Any, *parts: Part, **numbers: Any) -> dict[str, Any]:
    """Return the settings of a run, the means of some parts of its steps, and its evaluations as facts.

    A mean leaves out numbers that are missing or not finite; of none it is nan, which rules take as missing.

    Args:
        rows: rows of metrics.jsonl in order. Those of the trial steps of a check all have the same step.
        settings: the settings of the run, a dataclass, whose estimator's axes are facts too.
        parts: the prefixes of the means. The rules about the latest steps compare them with the first step.
        **numbers: facts that only the caller knows, or knows better; None for what is unknown.
    """
    estimator: Any = settings.estimator
    groups, metrics = estimator.needs_groups, dict(METRICS)
    equal = "frac_reward_zero_std" if groups else "reward_std"
    if (
        getattr(settings, "head", "softmax") != "softmax"
    ):  # the entropy of a density may well be negative
        del metrics["entropy"]
    steps = [row for row in rows if row["step"] > 0]
    few = max(FEW_STEPS, math.ceil(FEW_GROUPS / getattr(settings, "prompts_per_step", FEW_GROUPS)))
    rows_of: dict[Part, Rows] = {
        "step": [row for row in steps if row["step"] == steps[-1]["step"]],
        "first": steps[:1],
        "latest": steps[-few:] if len(steps) >= few else [],
        "recent": steps[-max(1, len(steps) // 10) :],
    }
    observed = {**vars(estimator), **vars(settings), "has_baseline": estimator.subtracts_baseline}
    observed |= {"has_entropy_bonus": estimator.entropy_coef > 0, "needs_groups": groups}
    for part in parts:
        observed |= {f"{part}_{name}": _mean(rows_of[part], key) for name, key in metrics.items()}
        shares = [
            share_equal(row, groups) for row in rows_of[part] if finite(row.get(equal)) is not None
        ]
        observed[f"{part}_equal"] = fmean(shares) if shares else math.nan
    if "latest" in parts and rows_of["latest"]:
        observed |= _of_latest(rows_of["latest"], steps[0], observed)
    if evaluations := [row for row in rows if finite(row.get("eval_reward")) is not None]:
        best = max(evaluations, key=lambda row: float(row["eval_reward"]))
        for prefix, row in (("best", best), ("before", rows[0])):
            observed[f"{prefix}_reward"] = row.get("eval_reward")
            observed[f"{prefix}_stderr"] = row.get("eval_reward_stderr")
    return observed | numbers


def _mean(rows: Rows, key: str) -> float:
    values = [value for row in rows if (value := finite(row.get(key))) is not None]
    return fmean(values) if values else math.nan


def share_equal(row: Mapping[str, Any], needs_groups: bool) -> float:
    """Return the share of groups of a step with equal rewards; without groups 1 if all rewards are equal."""
    return float(row["frac_reward_zero_std"] if needs_groups else row["reward_std"] == 0)


def slowing(steps: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return how fast the first and the latest steps of a process sampled, as facts; none of a few steps.

    They are medians, so that one step that was held up does not count; the very first step is left out.

    Args:
        steps: tokens sampled per second, and the mean length of the completions, of each step in order.

    Returns:
        `rate_at_start` and `rate_now` in tokens per second, and `length_ratio`, of the latest to the first.
    """
    if len(steps) <= 2 * SEVERAL:
        return {}
    parts = steps[1 : SEVERAL + 1], steps[-SEVERAL:]
    (rate, length), (recent_rate, recent) = (map(median, zip(*part, strict=True)) for part in parts)
    return {
        "rate_at_start": rate,
        "rate_now": recent_rate,
        "length_ratio": recent / max(length, 1e-9),
    }


def _of_latest(latest: Rows, first: Mapping[str, Any], means: Facts) -> dict[str, Any]:
    """Return which steps are the latest, the noise of their reward, and signs of a policy that is lost.

    Equal rewards show no noise, so that of the first step counts too. Where the signs are empty, the policy
    may recover.
    """
    names = ("latest_equal", "latest_entropy", "first_entropy", "latest_cut", "first_cut")
    equal, entropy, entropy_before, cut, cut_before = (means[name] for name in names)
    signs = {
        f"{equal:.0%} of the groups had equal rewards": equal >= 0.75,
        f"the entropy was {entropy:.2g} nats, down from {entropy_before:.2g}": entropy
        < entropy_before / 4,
        f"{cut:.0%} of the completions were cut": cut
        >= max(MOST, cut_before + (1 - cut_before) / 4),
    }
    errors = [
        math.nan if row.get("reward_stderr") is None else row["reward_stderr"] for row in latest
    ]
    noise_at_first = (first.get("reward_stderr") or 0.0) / math.sqrt(len(latest))
    return {
        "steps": f"steps {latest[0]['step']} to {latest[-1]['step']}",
        "latest_stderr": max(math.hypot(*errors) / len(latest), noise_at_first),
        "signs": " and ".join(sign for sign, is_seen in signs.items() if is_seen),
    }


def lower_rate(facts: Facts) -> tuple[str, dict[str, float]]:
    """Say that the learning rate is the likely cause of a loss; return that with the rate to take instead."""
    rate, usual = facts["learning_rate"], facts.get("usual_rate", 0.0)  # 0: nobody knows
    mend = usual if 0 < usual < rate else rate / 4
    comparison = (
        f", {'which' if mend == usual else f'although {usual:g}'} is usual here" if usual else ""
    )
    text = f"The learning rate, {rate:g}, is the likely cause: try --learning-rate {mend:g}{comparison}."
    return text, {"learning_rate": mend}


def remedy(facts: Facts) -> str:
    """Say what helps most where rewards do not differ.

    `pass_mark` is the reward that counts as solved; `can_warm_start` says that there are demonstrations that
    have not been used; `uncut` says what lets completions end that are cut. Where completions were
    compared in groups and none differed, it is also said what that means for groups of other sizes.
    """
    if "num_envs" in facts:
        return "Reward steps towards the goal, or try more or longer episodes (--num-envs, --num-steps)."
    if facts.get("step_reward", -math.inf) >= facts.get("pass_mark", math.inf):
        return SOLVED
    text = "Use prompts that the policy sometimes solves, a graded reward, demonstrations (tokenrl sft), "
    text += "or more generations per prompt."
    if facts.get("can_warm_start"):
        text = "This model cannot do the task yet: add --warm-start, to begin with the task's demonstrations."
    elif facts.get("step_cut", 0) >= MOST:
        text = "{step_cut:.0%} of completions are cut at {max_completion_length} tokens, before an end: {uncut}"
    if not (facts.get("steps_without_signal") and facts.get("needs_groups")):
        return text
    samples = facts["steps_without_signal"] * facts["prompts_per_step"] * facts["num_generations"]
    most = min(0.5, 1 - 0.05 ** (1 / samples))  # if more differed, 95 % of samples would show one
    shares = ", ".join(f"{share:.0%}" for share in groups_without_signal(most).values())
    text += f" None of {samples:,} completions differed, so at most {most:.2g} of all do (95 % confidence), "
    return text + f"and at least {shares} of groups of 2, 4, 8, 16 have equal rewards."


def groups_without_signal(rate: float) -> dict[int, float]:
    """Return the chance that all of 2, 4, 8 and 16 completions succeed or all fail, at this rate each."""
    return {size: rate**size + (1 - rate) ** size for size in (2, 4, 8, 16)}


def doubled(facts: Facts, *names: str) -> dict[str, Any]:
    """Return twice the value of the first of some settings that the command has."""
    return next(({name: 2 * facts[name]} for name in names if name in facts), {})


def conclude(
    session: Session, parts: str, measurements: Mapping[str, str], findings: Sequence[Finding]
) -> int:
    """Print what a check of `parts` measured and found, and add the names of all findings to the flags.

    Returns:
        The exit code: 2 if a finding is `void`, else 0.
    """
    problems = [finding for finding in findings if finding.weight == "void"]
    remarks = [finding for finding in findings if finding.weight != "void"]
    session.flags += [finding.flag for finding in (*problems, *remarks)]
    if session.main:
        session.console.check(parts, measurements, map(str, problems), map(str, remarks))
    return Refused.exit_code if problems else 0
