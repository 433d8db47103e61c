"""Samples several completions of some training prompts, to see what a policy can do before it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from tokenrl.language.rollout.sampling import Sampling

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Probe:
    """Summary of what a policy achieved on some training prompts.

    Attributes:
        prompts: number of prompts.
        samples: number of completions of each prompt.
        binary: whether the reward is declared to be 0 or 1, so that `best_of` is pass@k.
        reward: mean reward; pass@1 if binary.
        best_of: for each k, the expected best reward of k completions; pass@k if binary.
        dead_groups: for each G, the probability that G completions of a prompt have equal rewards.
        truncated: share of completions cut at the maximum length before an EOS.
        length: mean number of tokens per completion.
        longest: number of tokens of the longest completion.
        entropy: mean entropy of the policy, in nats per token.
        passed: for each k, the probability that one or more of k completions have the `pass_threshold` of the
            rewards; empty if they have none.
    """

    prompts: int
    samples: int
    binary: bool
    reward: Estimate
    best_of: dict[int, Estimate]
    dead_groups: dict[int, Estimate]
    truncated: Estimate
    length: float
    longest: int
    entropy: float
    passed: dict[int, Estimate] = field(default_factory=dict)

    @property
    def unequal(self) -> float:
        """Share of groups with unequal rewards, for the largest group size that was measured."""
        return 1 - self.dead_groups[max(self.dead_groups)].value


def probe_policy(
    policy: Policy, prompts: Sequence[Row], rewards: Rewards, sampling: Sampling
) -> Probe:
    """Sample several completions of each prompt and summarise their rewards, lengths and entropy.

    Completions for which every reward function abstains are left out; a prompt with fewer than k remaining
    completions is left out of the estimates for k.

    Raises:
        Refused: there are no prompts or fewer than two samples, or a prompt does not fit into the context.
        Stopped: a reward function failed.
    """
    samples = sampling.num_generations
    if not prompts or samples < 2:
        raise Refused(
            f"A probe of {len(prompts)} prompts, {samples} samples of each: give two or more."
        )
    rows = Evaluator(policy).rows(prompts, rewards, sampling, "probe")
    totals = known_rewards(rows, samples)
    lengths = [row["length"] for row in rows]
    sizes = [2**power for power in range(samples.bit_length())]
    mark = rewards.pass_threshold
    best = {k: over_prompts([best_of(row, k) for row in totals]) for k in sizes}
    right = (
        {}
        if mark is None
        else {k: over_prompts([best_of(r >= mark, k) for r in totals]) for k in sizes}
    )
    cut = np.array([row["truncated"] for row in rows]).reshape(-1, samples).mean(axis=1)
    return Probe(
        prompts=len(totals),
        samples=samples,
        binary=rewards.binary,
        reward=best[1],
        best_of=best,
        dead_groups={k: over_prompts([all_equal(row, k) for row in totals]) for k in sizes[1:]},
        truncated=over_prompts(cut.tolist()),
        length=float(np.mean(lengths)),
        longest=max(lengths),
        entropy=sum(row["entropy"] for row in rows) / max(1, sum(lengths)),
        passed=right,
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
