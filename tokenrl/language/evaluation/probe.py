"""Samples several completions of some training prompts, to see what a policy can do before it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.evaluation.evaluation import (
    Estimate,
    Evaluator,
    best_of,
    known_rewards,
    over_prompts,
)
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import checked_generator
from tokenrl.language.rollout.sampling import Sampling

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Probe:
    """Summary of what a policy achieved on some training prompts.

    Attributes:
        reward: mean reward.
        unequal: share of groups with unequal rewards, of the largest power of two of completions that there are.
        truncated: share of completions cut at the maximum length before an EOS.
    """

    reward: Estimate
    unequal: float
    truncated: Estimate


def probe_policy(
    policy: Policy, prompts: Sequence[Row], rewards: Rewards, sampling: Sampling
) -> Probe:
    """Sample several completions of each prompt and summarise their rewards and lengths.

    Completions for which every reward function abstains are left out; a prompt of which fewer than all remain
    is left out of `unequal`.

    Raises:
        Refused: there are no prompts or fewer than two samples, or a prompt does not fit into the context.
        Stopped: a reward function failed.
    """
    samples = sampling.num_generations
    if not prompts or samples < 2:
        raise Refused(
            f"A probe of {len(prompts)} prompts, {samples} samples of each: give two or more."
        )
    evaluator = Evaluator(policy, checked_generator(policy, rewards.environments))
    rows = evaluator.rows(prompts, rewards, sampling, "probe")
    totals = known_rewards(rows, samples)
    size = 2 ** (samples.bit_length() - 1)
    cut = np.array([row["truncated"] for row in rows]).reshape(-1, samples).mean(axis=1)
    return Probe(
        reward=over_prompts([best_of(row, 1) for row in totals]),
        unequal=1 - over_prompts([all_equal(row, size) for row in totals]).value,
        truncated=over_prompts(cut.tolist()),
    )


def all_equal(rewards: np.ndarray, k: int) -> float:
    """Unbiased estimate of the probability that k samples have equal rewards, from n >= k of one prompt.

    It is the share of the subsets of size k whose rewards are all equal: `sum_v C(n_v, k) / C(n, k)`, where
    n_v samples have the reward v. It is nan for n < k.

    Args:
        rewards: rewards of the samples [n].
        k: size of the subsets.
    """
    n = len(rewards)
    if n < k:
        return math.nan
    _, counts = np.unique(rewards, return_counts=True)
    equal = sum(math.comb(count, k) for count in counts.tolist())
    return equal / math.comb(n, k)
