"""What the rules about numbers (`runs.rules`) read, `Observed`, with its one reader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any, NamedTuple

from tokenrl.runs.metric_table import Row, Rows, exceeds, finite
from tokenrl.runs.rules import LOST_SHARE, Means

LONGEST_TENTH = 100
"""Most steps of which means are taken, since those of a long run are read again at each step."""
LATEST_STEPS = 3
LATEST_GROUPS = 48
"""Fewest steps, and fewest groups of completions in them, whose mean reward is called the latest."""
IDLE_STEPS = 3
"""Steps in a row without a signal from which on a run says so."""
MAX_ABSTAINED = 0.02
"""Largest share of completions to which a reward function may give no reward."""
ENDLESS = (
    "A model that never ends by itself, as one with random weights, has to learn that first (--warm-start, or "
    "tokenrl sft), or needs strings that end completions (--stop)."
)
"""What helps where the limit cuts most completions, and a higher limit may not."""


class Mean(NamedTuple):
    """A mean reward, its standard error (nan if unknown), and the last of its steps."""

    value: float
    error: float
    step: int

    def exceeds(self, mean: Mean, errors: float) -> bool:
        """Return whether it is above another mean by more than so many standard errors of their difference."""
        return exceeds(self.value, mean.value, errors * math.hypot(self.error, mean.error))


class Latest(NamedTuple):
    """The last few steps of a training, beside its first one.

    Attributes:
        first: the mean reward of the first step.
        reward: their mean reward.
        signs: in words, the signs that the policy can hardly recover; empty without any.
    """

    first: Mean
    reward: Mean
    signs: str


@dataclass(frozen=True)
class Gain:
    """What a training gained on held-out prompts.

    Attributes:
        value, error: the mean of the gains of each prompt, and its standard error.
        before: the mean reward before training, of samples or else of greedy completions.
        equal: the share of training steps in which no rewards differed.
    """

    value: float = math.nan
    error: float = math.nan
    before: float = math.nan
    equal: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What rules read of a training: its settings, its numbers, and what is known of its task and its model.

    A number that is nan, and a sequence that is empty, silence the rules that need them. So whoever fills the
    record decides which rules speak: a step of a training, a check, the end of a run, a diagnosis, an arm of a
    comparison.

    Attributes:
        learning_rate ... on_abstain: settings of the run, and axes of its estimator.

        step: the numbers of the last step.
        recent: means of the last tenth of the steps, of at most 100.
        whole: the same as `recent`, of a run that is judged as a whole.
        latest: the last steps, beside the first one.
        skipped: the share of updates that were skipped because their gradient was not finite.
        sampled, greedy, most: the evaluations so far, the first one before training: of samples, of greedy
            completions, and of the best of several samples.

        gain: how much the reward of held-out prompts gained.
        is_solved: whether the last evaluation reaches the threshold.
        is_unlearnt: whether a run that is diagnosed has ended without a gain.
        constant: the greedy completion of all prompts of the last evaluation; empty if they differ.

        groups: in words, what was compared before training, in the step of a check; else empty.
        others_differ: whether other samples of the same policy have unequal rewards.
        abstention: in words, the reward functions that gave too few rewards, and their first errors; else empty.
        idle_steps: the number of steps in a row, up to now, in which no rewards differed.

        lowest_rate, highest_rate: the bounds of usual learning rates.
        pass_mark: the mean reward from which the task counts as solved, or else the reward of a right completion.
        can_warm_start: whether there are demonstrations that have not been used.
        uncut: advice on how to let completions end before the limit.
        is_misasked: whether it is sure that this helps.
    """

    learning_rate: float = math.nan
    max_completion_length: float = math.nan
    num_envs: int = 0
    eval_generations: float = math.nan
    keep: str = ""
    stop_after_zero_spread: int = 0
    importance_centre: bool = False
    rows: Any = None
    entropy_coef: float = 0.0
    on_abstain: str = ""

    step: Means = field(default_factory=Means)
    recent: Means = field(default_factory=Means)
    whole: Means = field(default_factory=Means)
    latest: Latest | None = None
    skipped: float = math.nan
    sampled: Sequence[Mean] = ()
    greedy: Sequence[Mean] = ()
    most: Sequence[Mean] = ()

    gain: Gain = Gain()
    is_solved: bool = False
    is_unlearnt: bool = False
    constant: str = ""

    groups: str = ""
    others_differ: bool = False
    abstention: str = ""
    idle_steps: int = 0

    lowest_rate: float = math.nan
    highest_rate: float = math.nan
    pass_mark: float = math.inf
    can_warm_start: bool = False
    uncut: str = f"raise --max-completion-length. {ENDLESS}"
    is_misasked: bool = False

    @property
    def best_sampled(self) -> Mean:
        """The evaluation with the highest reward of samples."""
        return max(self.sampled)

    @property
    def best_greedy(self) -> Mean:
        """The evaluation with the highest reward of greedy completions."""
        return max(self.greedy)

    @property
    def last_greedy(self) -> Mean:
        """The latest evaluation of greedy completions."""
        return self.greedy[-1]

    @property
    def last_sampled(self) -> Mean:
        """The latest evaluation of samples."""
        return self.sampled[-1]

    @property
    def is_idle(self) -> bool:
        """Whether there was nothing to learn from in so many steps in a row that the run says so, or ends."""
        return self.idle_steps >= min(IDLE_STEPS, self.stop_after_zero_spread or IDLE_STEPS)

    @property
    def usual_rate(self) -> float:
        """The usual learning rate that is nearest to the run's own."""
        return min(max(self.learning_rate, self.lowest_rate), self.highest_rate)

    @property
    def times_usual(self) -> float:
        """The learning rate in units of the usual one."""
        return self.learning_rate / self.usual_rate

    @property
    def lower_rate(self) -> float:
        """The highest usual learning rate if that is lower than the run's own, or else a quarter of its own."""
        usual = self.highest_rate
        return usual if usual < self.learning_rate else self.learning_rate / 4


def observe(rows: Rows, settings: Any) -> Observed:
    """Return the settings of a run, its evaluations, and the numbers of its steps.

    What else is known is filled in with `dataclasses.replace`.

    Args:
        rows: rows of metrics.jsonl in order.
        settings: the settings of the run, a dataclass. A field of `Observed` with the name of a setting, or
            of an axis of the estimator, holds it.
    """
    named = vars(settings.estimator) | vars(settings)
    names = [part.name for part in fields(Observed)]
    steps = [row for row in rows if row["step"] > 0]
    tenth = min(max(1, len(steps) // 10), LONGEST_TENTH)
    recent = steps[-tenth:]
    start = rows[:1]
    count = named.get("eval_generations")
    return Observed(
        **{name: named[name] for name in names if named.get(name) is not None},
        step=_means(steps[-1:], settings),
        recent=_means(recent, settings),
        latest=_latest(steps, settings),
        abstention=" ".join(
            f"The reward function {name.split('/')[1]} gave no reward to {value:.0%} of the completions."
            for name, value in (rows[-1] if rows else {}).items()
            if name.endswith("/abstained") and finite(value) > MAX_ABSTAINED
        ),
        sampled=evaluations(rows, "eval_reward"),
        greedy=evaluations(rows, "eval_reward_greedy"),
        most=evaluations(start, f"eval_best@{count}") or evaluations(start, f"eval_pass@{count}"),
    )


def _means(rows: Rows, settings: Any) -> Means:
    """Return the means of metrics over some rows."""
    estimator = settings.estimator
    metrics = {part.name: part.metadata["metric"] for part in fields(Means) if part.metadata}
    means = {name: _mean(_number(row, metric) for row in rows) for name, metric in metrics.items()}
    if getattr(settings, "head", "softmax") != "softmax":
        means["entropy"] = math.nan
    num_envs = getattr(settings, "num_envs", 0)
    if not num_envs or (num_envs > 1 and not estimator.within_rows):  # else none are compared
        means["equal"] = _mean(share_equal(row, estimator.needs_groups) for row in rows)
    return Means(**means)


def _mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not nan; nan if none is left."""
    numbers = [value for value in values if not math.isnan(value)]
    return fmean(numbers) if numbers else math.nan


def _number(row: Row, metric: str) -> float:
    """Return a metric of a row; nan if it is missing or not finite."""
    return finite(row.get(metric))


def share_equal(row: Row, needs_groups: bool) -> float:
    """Return the share of groups of a step with equal rewards; without groups 1 if all rewards are equal.

    Replayed completions are compared too, if there are any. It is nan if the step has no such number.
    """
    of_groups = _number(row, "frac_reward_zero_std")
    if needs_groups:
        return of_groups
    spread = _number(row, "reward_std")
    is_equal = spread == 0 and not of_groups < 1
    return spread if math.isnan(spread) else float(is_equal)


def evaluations(rows: Rows, metric: str) -> list[Mean]:
    """Return a metric and its standard error in the rows in which it is a finite number, in order."""
    return [
        Mean(value, _number(row, f"{metric}_stderr"), row["step"])
        for row in rows
        if not math.isnan(value := _number(row, metric))
    ]


def _latest(steps: Rows, settings: Any) -> Latest | None:
    """Return the last steps that have enough groups of completions for a sure mean; None if there are too few.

    Equal rewards show no noise, so the noise of the first step counts too. Without signs the policy may
    recover.
    """
    groups = getattr(settings, "prompts_per_step", LATEST_GROUPS)
    count = max(LATEST_STEPS, math.ceil(LATEST_GROUPS / groups))
    rows = steps[-count:]
    if len(rows) < count:
        return None
    first = _means(steps[:1], settings)
    now = _means(rows, settings)
    fallen = f"the entropy was {now.entropy:.2g} nats, down from {first.entropy:.2g}"
    signs = {
        f"{now.equal:.0%} of the groups had equal rewards": now.equal >= 0.75,
        fallen: now.entropy < first.entropy / 4,
        f"{now.cut:.0%} of the completions were cut": now.cut
        >= max(LOST_SHARE, (1 + 3 * first.cut) / 4),
    }
    first_error = _number(steps[0], "reward_stderr")
    error = math.hypot(*(_number(row, "reward_stderr") for row in rows)) / count
    reward = Mean(now.reward, max(error, first_error / math.sqrt(count)), steps[-1]["step"])
    return Latest(
        first=Mean(first.reward, first_error, steps[0]["step"]),
        reward=reward,
        signs=" and ".join(sign for sign, is_seen in signs.items() if is_seen),
    )
