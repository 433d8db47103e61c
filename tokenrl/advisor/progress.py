"""Says whether the reward of a run rises, and how sure that is.

Evaluations are on the same held-out prompts, or from the same starting states, each with the standard error
of its mean. Where there are none, quarters of the training steps are compared, each with the standard error
of its mean over steps. Two numbers differ if they are farther apart than chance would explain in one of 20
runs; the bound grows with the number of comparisons, since the best of many evaluations is also the luckiest.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from tokenrl.advisor.history import History
from tokenrl.advisor.rules import ACT, FINE, WATCH
from tokenrl.advisor.show import Finding
from tokenrl.core.destroyed import Destroyed, Watch

FALSE_ALARMS = 0.05
"""Probability that a run whose reward does not change is said to change."""
LEAST_STEPS = 5
"""Fewest steps whose mean is compared with that of others."""


class Mean(NamedTuple):
    """A mean, its standard error, and the steps that it is from."""

    value: float
    error: float
    steps: tuple[int, int]


class Progress(NamedTuple):
    """How the reward went.

    Attributes:
        start, now, best: means, from evaluations or from quarters of the steps.
        trend: `rising`, `flat` or `falling`, over the second half of the training steps; `not known yet` with
            too few of them.
        gained: whether `now` is higher than `start` by more than chance.
        fell: whether `now` is lower than `best` by more than chance.
        held_out: whether the means are those of evaluations.
        lost: how the policy was destroyed, by the rule of training; None if it was not, or has recovered.
    """

    start: Mean
    now: Mean
    best: Mean
    trend: str
    gained: bool
    fell: bool
    held_out: bool
    lost: Destroyed | None = None


def read_progress(history: History) -> Progress:
    """Compare the rewards of a run at its start, now and at its best."""
    found = evaluations(history)
    held_out = len(found) > 1
    means = found if held_out else quarters(history)
    start, now, best = means[0], means[-1], max(means, key=lambda mean: mean.value)
    *_, before, after = [None, *quarters(history)]
    change = None if before is None else _sign(after, before, 1)
    gained = _sign(now, start, len(means) - 1) > 0
    return Progress(
        start=start,
        now=now,
        best=best,
        trend={1: "rising", 0: "flat", -1: "falling", None: "not known yet"}[change],
        gained=gained,
        fell=_sign(now, best, len(means) - 1) < 0,
        held_out=held_out,
        lost=None if gained else destroyed(history),
    )


def destroyed(history: History) -> Destroyed | None:
    """Return how updates destroyed a language model, by the rule of training; None if they did not."""
    if not history.language:
        return None
    before = {name.removeprefix("eval_"): value for name, value in history.rows[0].items()}
    watch = Watch(before, history.arguments.prompts_per_step, history.threshold)
    return next(filter(None, (watch.see(row["step"], row) for row in history.rows if row["step"])), None)


def evaluations(history: History) -> list[Mean]:
    """Return the evaluations that have a standard error, of sampled rewards or else of greedy ones."""
    for key in ("eval_reward", "eval_reward_greedy"):
        _, values = history.series(key)
        rows = [
            row for row in history.rows if row.get(key) is not None and row.get(f"{key}_stderr") is not None
        ]
        if values and len(rows) == len(values):
            return [Mean(row[key], row[f"{key}_stderr"], (row["step"], row["step"])) for row in rows]
    return []


def quarters(history: History) -> list[Mean]:
    """Return the mean training reward of each quarter of the steps; of fewer parts if there are few steps.

    A part has at least five steps, because the error of the mean of fewer is itself too uncertain.
    """
    steps, values = history.series("reward")
    parts = max(1, min(4, len(values) // LEAST_STEPS))
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    out = []
    for first, last in pairwise(edges):
        part = values[first:last]
        error = stdev(part) / math.sqrt(len(part)) if len(part) > 1 else math.nan
        out.append(Mean(fmean(part), error, (steps[first], steps[last - 1])))
    return out


def _sign(one: Mean, other: Mean, comparisons: int) -> int:
    """Return 1 if `one` is larger than `other` by more than chance, -1 if smaller, else 0."""
    bound = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2 / max(1, comparisons)) * math.hypot(
        one.error, other.error
    )
    difference = one.value - other.value
    return 0 if math.isnan(bound) or abs(difference) <= bound else 1 if difference > 0 else -1


def progress_finding(history: History, progress: Progress, explained: bool) -> Finding:
    """Judge the progress.

    Args:
        history: the run.
        progress: what `read_progress` returned.
        explained: whether another finding already says what to act on, so that a flat reward needs no other.
    """
    rate, steps = history.arguments.learning_rate, (progress.start.steps[0], history.step)
    verdict, changes, what = FINE, {}, "risen"
    if history.solved:
        what = "solved, though no longer at its best" if progress.fell else "solved"
    elif progress.fell:
        changes = {"learning_rate": rate / (4 if progress.lost else 2)}
        verdict, what = ACT, "fallen from its best"
    elif progress.gained and progress.trend == "rising" and not history.running:
        verdict, what = WATCH, "risen, and still rising when the run ended"
        changes = _longer(history)
    elif progress.start is progress.now:
        verdict, what = WATCH, "too few steps to compare"
    elif not progress.gained:
        early = history.running and 2 * history.step < history.arguments.max_steps
        verdict, what = (WATCH if early else ACT), "not changed by more than its noise"
        changes = {} if early or explained else {"learning_rate": 2 * rate}
    source = "held-out reward" if progress.held_out else "training reward, by quarters,"
    text = f"{source} {_written(progress.start)} at first, {_written(progress.now)} now"
    if progress.best.value > progress.now.value:
        text += f", best {_written(progress.best)} at step {progress.best.steps[1]}"
    text += f": {what}; over the last half of the steps the training reward is {progress.trend}"
    return Finding("progress", verdict, text, progress.now.value - progress.start.value, steps, changes)


def _longer(history: History) -> dict[str, int]:
    """Return the settings of a run of twice the length; none if it was stopped, for it needs its own rest."""
    args, used = history.arguments, history.rows[-1].get("num_samples", 0)
    samples = getattr(args, "max_samples", None)
    if samples is not None:
        return {"max_samples": 2 * samples} if used >= samples else {}
    return {"max_steps": 2 * args.max_steps} if history.step >= args.max_steps else {}


def _written(mean: Mean) -> str:
    error = f"{mean.error:.0f}" if mean.error >= 10 else f"{mean.error:.1g}"
    return f"{mean.value:.3g}" + ("" if math.isnan(mean.error) else f" +- {error}")
