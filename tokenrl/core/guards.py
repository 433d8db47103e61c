"""Refuses what an estimator cannot work with: too few rows, missing inputs, episodes that are too long.

Each message is one paragraph: what was given, what is allowed, how to mend it. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from tokenrl.core.choices import choice_of
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator

T = TypeVar("T")

LONGEST_WITHOUT_BASELINE = 500
"""Most steps of an episode without a baseline; in longer ones noise hides the effect of one action."""

LARGEST_REWARD = 1e12
"""Largest size of a reward. Advantages are float32 numbers, which end at 3.4e38, and some are divided by a
standard deviation: a return of 10^4 such rewards is 1e16, and the sum of 10^6 squares of it is still 1e38."""


def set_size(estimator: Estimator, axis: str, rows: int, group_size: int | None) -> int | None:
    """Return how many consecutive rows the baseline or the scale compares; None if it compares none.

    Args:
        estimator: The estimator whose baseline or scale is meant.
        axis: `baseline` or `scale`.
        rows: Rows in the step.
        group_size: Consecutive rows per prompt; None if there are no groups.

    Raises:
        Refused: When rows do not fall into such sets.
    """
    name = getattr(estimator, axis)
    compares = choice_of(axis, name).compares
    if compares == "step":
        if rows < 2:
            raise Refused(
                f"{name!r} compares the rows of a step, but the step has {rows}. Collect two or more per "
                "step, or choose the baseline 'running_mean', 'constant' or 'none', with the scale 'none'."
            )
        return rows
    if compares != "group":
        return None
    size = check_groups(name, rows, group_size)
    if name == "loo_std" and size < 3:
        raise Refused(
            "'loo_std' is the spread of the other completions of the prompt, but group_size 2 leaves "
            "only one. Sample three or more per prompt (num_generations), or choose the scale 'none' or "
            "'other_groups_std'."
        )
    if name == "other_groups_std" and rows == size:
        raise Refused(
            "'other_groups_std' is the spread over the other prompts of the step, but the step has "
            "one. Take two or more prompts per step, or choose the scale 'none' or 'loo_std'."
        )
    return size


def check_groups(choice: str, rows: int, group_size: int | None) -> int:
    """Return the group size; refuse rows that do not fall into groups of two or more.

    Args:
        choice: The baseline or scale that compares the rows of a group.
        rows: Rows in the step.
        group_size: Consecutive rows per prompt; None if there are no groups.

    Raises:
        Refused: Without groups, with groups of one, or when `rows` is no multiple of `group_size`.
    """
    if group_size is None or group_size < 2:
        raise Refused(
            f"{choice!r} compares several completions of one prompt, but group_size is {group_size}. Sample "
            "two or more per prompt (num_generations), or choose the baseline 'batch_mean', 'running_mean', "
            "'constant' or 'none', with the scale 'batch_std' or 'none'."
        )
    if rows % group_size:
        raise Refused(
            f"{rows} rows do not fall into groups of {group_size} consecutive rows per prompt. "
            "Give a number of rows that is a multiple of group_size."
        )
    return group_size


def given(name: str, value: T | None, purpose: str) -> T:
    """Return an input that the estimator needs, or refuse if it is missing.

    Raises:
        Refused: When `value` is None.
    """
    if value is None:
        raise Refused(
            f"{name} was not given, and {purpose} needs it. Pass {name}, or choose an estimator that does "
            "not need it."
        )
    return value


def within_rows(estimator: Estimator) -> list[str]:
    """List the axes, of returns, baseline and scale, on which the steps of one row are compared."""
    axes = ("returns", "baseline", "scale")
    return [axis for axis in axes if choice_of(axis, getattr(estimator, axis)).compares == "row"]


def subtracts_something(estimator: Estimator) -> bool:
    """Whether the estimator subtracts a baseline of any kind.

    A constant of 0 is not a baseline. Nor are the returns 'gae' by themselves: they mix values into the
    return and subtract none. The scale 'token_whiten' is one, because it subtracts the mean over the step,
    and so are the returns 'episode_normalized', which subtract the mean over the episode.
    """
    if estimator.scale == "token_whiten" or estimator.returns == "episode_normalized":
        return True
    if estimator.baseline == "constant":
        return estimator.baseline_constant != 0
    return estimator.baseline != "none"


def teaches_nothing(estimator: Estimator, metrics: Mapping[str, float]) -> bool:
    """Whether a step has no signal, because no two rewards differ that the estimator compares.

    Args:
        estimator: The estimator.
        metrics: Metrics of the step: `frac_reward_zero_std`, the share of groups with equal rewards, if the
            estimator compares groups of completions; else `reward_std`, the spread of all rewards.
    """
    return metrics["frac_reward_zero_std"] == 1 if estimator.needs_groups else metrics["reward_std"] == 0


def check_horizon(estimator: Estimator, horizon: int | None, allow_no_baseline: bool = False) -> None:
    """Refuse REINFORCE without a baseline where an episode may last more than 500 steps.

    With rewards of similar size at every step, R grows as the length T and the variance of `sum_t score_t R`
    as T^3. A baseline would remove most of it.

    Args:
        estimator: The estimator.
        horizon: Most steps of an episode (tokens of a completion); None if there is no limit.
        allow_no_baseline: Accept the estimator nevertheless.

    Raises:
        Refused: With the baselines to choose from, and the flag that allows none.
    """
    short = horizon is not None and horizon <= LONGEST_WITHOUT_BASELINE
    if short or allow_no_baseline or subtracts_something(estimator):
        return
    length = "without limit" if horizon is None else f"up to {horizon:,} steps"
    raise Refused(
        f"Episodes last {length}, but the estimator subtracts no baseline (baseline "
        f"{estimator.baseline!r}); beyond {LONGEST_WITHOUT_BASELINE} steps the noise of the whole return "
        "hides the effect of one action. Choose a baseline: 'timestep_mean' with returns 'reward_to_go', "
        "'value' with a critic, 'running_mean', or 'rloo' if there are several completions per prompt. Or "
        "make episodes shorter, or pass --allow-no-baseline to train without one nevertheless."
    )
