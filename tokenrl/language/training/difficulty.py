"""Training prompts of a measured difficulty: what the policy always or never solves teaches it nothing.

Dropping prompts changes the distribution of prompts, and with it the objective: the run ascends the mean
reward over the prompts that are kept. The gradient of each of those is what it was, and so is its bias.
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
from tokenrl.language.rollout.judged import judged
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
    """The task with those training prompts on which the policy's measured mean reward lies in a range.

    Args:
        task: the task; it is not changed, and its held-out prompts stay.
        policy: the policy before training.
        rewards: the reward functions.
        sampling: how to sample the completions by which it is measured.
        within: least and greatest mean reward, both allowed; None keeps all prompts and measures nothing.
        announce: takes a line for people.
        **how: further arguments of `success_rates`.

    Raises:
        Refused: no range, no samples, no prompt left, or a reward function that failed.
    """
    if within is None:
        return task
    low, high = within
    samples = sampling.num_generations
    if not low <= high or samples < 1:
        raise Refused(
            f"filter_difficulty={low:g} {high:g} with filter_samples={samples}: give the least mean reward "
            "to keep and then the greatest, as 0.2 0.8, and one sample or more."
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
    """Mean reward of some completions of each prompt: its success rate where rewards are 0 and 1.

    Completions on which every reward function abstains are left out. For a true rate p the standard error is
    `sqrt(p (1 - p) / G)` with G completions.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        sampling: how to sample, G completions of each prompt.
        accelerator: accelerate's, in a run of several processes, which share the prompts.
        **how: as `judged` takes it: generator, batch_size.

    Returns:
        float64 [B], nan where all completions of a prompt are without a reward; the same on every process.
    """
    measured: list[tuple[int, float]] = []
    how |= {"accelerator": accelerator}
    for places, _, result in judged(policy, prompts, rewards, sampling, stream="difficulty", **how):
        table = np.where(result.valid, result.total, np.nan).reshape(-1, sampling.num_generations)
        for place, row in zip(places, table, strict=True):
            known = row[~np.isnan(row)]
            measured.append((place, float(known.mean()) if len(known) else math.nan))
    everywhere = measured if accelerator is None else gather_object(measured)
    return np.array([rate for _, rate in sorted(everywhere)], dtype=np.float64)


def of_difficulty(task: Task, rates: np.ndarray, low: float, high: float) -> Task:
    """The task with those training prompts whose measured rate lies in [low, high]; never one without a rate.

    Args:
        task: the task; it is not changed.
        rates: `success_rates` of its training prompts, [B].
        low: least mean reward.
        high: greatest mean reward.

    Raises:
        Refused: no prompt is left; says what the rates are.
    """
    kept = [row for row, rate in zip(task.train_prompts, rates, strict=True) if low <= rate <= high]
    if not kept:
        known = rates[~np.isnan(rates)]
        found = "no completion had a reward"
        if len(known):
            quarters = ", ".join(f"{q:.3g}" for q in np.quantile(known, [0, 0.25, 0.5, 0.75, 1]))
            found = f"their least, quartiles and greatest are {quarters}"
        raise Refused(
            f"filter_difficulty={low:g} {high:g} leaves none of the {len(rates)} training prompts of "
            f"{task.name!r}: of the mean rewards measured, {found}. Widen the range, use more "
            "filter_samples, or start from a better policy or an easier task."
        )
    task = copy.copy(task)
    object.__setattr__(task, "train_prompts", kept)  # tasks may be frozen dataclasses
    return task
