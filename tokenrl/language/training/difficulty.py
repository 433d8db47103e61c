"""Filters training prompts by difficulty, because prompts that are always or never solved teach nothing.

Dropping prompts changes the distribution of prompts, and with it the objective: training then maximises
the mean reward over the prompts that are kept. The gradient for each of these stays the same, and so does
its bias.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from tokenrl.errors import Refused, Stopped
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.rewarded import sample_and_reward
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.tasks.task import Task


def filter_task(
    task: Task,
    policy: Policy,
    rewards: Rewards,
    sampling: Sampling,
    *,
    within: Sequence[float] | None,
    announce: Callable[[str], None],
    **how: Any,
) -> Task:
    """Keep the training prompts on which the policy's measured mean reward lies in a range.

    Args:
        task: the task; it is not changed.
        policy: the policy before training.
        rewards: the reward functions.
        sampling: how the completions are sampled whose mean reward is measured.
        within: least and greatest mean reward, both inclusive; None keeps all prompts and measures nothing.
        announce: prints a line for people.
        **how: further arguments of `success_rates`.

    Returns:
        A copy of the task with fewer training prompts and the same held-out prompts.

    Raises:
        Refused: the range is empty, there are no samples, no prompt is left, or a reward function failed.
    """
    if within is None:
        return task
    low, high = within
    samples = sampling.num_generations
    if not low <= high or samples < 1:
        raise Refused(
            f"filter_difficulty={low:g} {high:g} with filter_samples={samples}: give the least mean reward "
            "to keep and then the greatest, such as 0.2 0.8, and at least one sample."
        )
    try:
        rates = success_rates(policy, task.train_prompts, rewards, sampling, **how)
    except Stopped as error:
        raise Refused(f"Before the first step: {error}") from error
    kept = of_difficulty(task, rates, low, high)
    announce(
        f"Kept {len(kept.train_prompts):,} of {len(rates):,} training prompts: those with a mean reward from "
        f"{low:g} to {high:g} over {samples} completions."
    )
    return kept


def success_rates(
    policy: Policy,
    prompts: Sequence[Mapping[str, Any]],
    rewards: Rewards,
    sampling: Sampling,
    *,
    accelerator: Any = None,
    **how: Any,
) -> np.ndarray:
    """Measure the mean reward of each prompt from some completions; for rewards of 0 and 1, its success rate.

    Completions for which every reward function abstains are left out. If the true success rate is p, the
    standard error of a measured rate is `sqrt(p (1 - p) / G)` with G completions.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        sampling: how completions are sampled, G for each prompt.
        accelerator: accelerate's handle, in a run of several processes, which share the prompts.
        **how: further arguments of `sample_and_reward`: `generator`, `batch_size`.

    Returns:
        Mean rewards, float64 [B], the same on every process; nan for a prompt whose completions all lack a
        reward.
    """
    measured: list[tuple[int, float]] = []
    how |= {"accelerator": accelerator}
    for places, _, result in sample_and_reward(
        policy, prompts, rewards, sampling, stream="difficulty", **how
    ):
        table = np.where(result.valid, result.total, np.nan).reshape(-1, sampling.num_generations)
        for place, row in zip(places, table, strict=True):
            known = row[~np.isnan(row)]
            measured.append((place, float(known.mean()) if len(known) else math.nan))
    everywhere = measured if accelerator is None else gather_object(measured)
    return np.array([rate for _, rate in sorted(everywhere)], dtype=np.float64)


def of_difficulty(task: Task, rates: np.ndarray, low: float, high: float) -> Task:
    """Return a copy of the task with only the training prompts whose measured rate lies in [low, high].

    Args:
        task: the task; it is not changed.
        rates: `success_rates` of its training prompts [B]; a prompt whose rate is nan is dropped.
        low: least mean reward.
        high: greatest mean reward.

    Raises:
        Refused: no prompt is left; the message lists quantiles of the rates.
    """
    kept = [row for row, rate in zip(task.train_prompts, rates, strict=True) if low <= rate <= high]
    if not kept:
        known = rates[~np.isnan(rates)]
        found = "none is known, because no completion had a reward"
        if len(known):
            quarters = ", ".join(f"{q:.3g}" for q in np.quantile(known, [0, 0.25, 0.5, 0.75, 1]))
            found = f"minimum, quartiles and maximum are {quarters}"
        raise Refused(
            f"filter_difficulty={low:g} {high:g} leaves none of the {len(rates)} training prompts of "
            f"{task.name!r}. Of the measured mean rewards, {found}. Widen the range, raise "
            "filter_samples, or start from a better policy or an easier task."
        )
    task = copy.copy(task)
    object.__setattr__(task, "train_prompts", kept)  # tasks may be frozen dataclasses
    return task
