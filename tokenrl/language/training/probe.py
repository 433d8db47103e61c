"""Measures what a policy can do, from several rewarded samples of each prompt.

The expected reward, the best of k rewards and the share of groups with equal rewards are estimated without
bias for each prompt, and averaged over prompts with a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.rewarded import RewardedBatch, sample_and_reward
from tokenrl.language.rollout.sampling import Sampling

Row = Mapping[str, Any]


class Estimate(NamedTuple):
    """A mean over prompts and its standard error, which is nan for a single prompt."""

    value: float
    stderr: float


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


def best_of(rewards: np.ndarray, k: int) -> float:
    """Unbiased estimate of the expected best reward of k samples, from n >= k samples of one prompt.

    It is the mean, over all `C(n, k)` subsets of size k, of the largest reward in the subset: the i-th
    smallest reward (counted from 1) is the largest in `C(i-1, k-1)` of them. For rewards of 0 and 1 this is
    pass@k, `1 - C(n-c, k)/C(n, k)` with c ones (Chen et al. 2021, arXiv 2107.03374, eq. 1). It is nan for
    n < k.

    Args:
        rewards: rewards of the samples [n].
        k: size of the subsets.
    """
    n = len(rewards)
    if n < k:
        return math.nan
    shares = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return float(np.sort(rewards) @ np.array(shares))


def all_equal(rewards: np.ndarray, k: int) -> float:
    """Unbiased estimate of the probability that k samples have equal rewards, from n >= k of one prompt.

    It is the share of the subsets of size k whose rewards are all equal: `sum_v C(n_v, k) / C(n, k)`, where
    n_v samples have the reward v. It is nan for n < k.

    Args:
        rewards: rewards of the samples [n].
        k: size of the subsets.
    """
    if len(rewards) < k:
        return math.nan
    _, counts = np.unique(rewards, return_counts=True)
    return sum(math.comb(int(count), k) for count in counts) / math.comb(len(rewards), k)


def over_prompts(values: Sequence[float]) -> Estimate:
    """Mean over prompts of one value per prompt, and its standard error `sd / sqrt(B)`.

    Args:
        values: one number for each of B prompts; nan values are left out.

    Returns:
        The mean and its standard error; nan for both without a value, for the error with a single one.
    """
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return Estimate(math.nan, math.nan)
    error = known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(float(known.mean()), float(error))


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among those of a prompt's completions (Li et al. 2016, arXiv 1510.03055).

    It is 1 if no n-gram occurs twice, and about 1/G if G completions are the same. It falls with the number
    and length of the completions, so compare it only between equal evaluations. It is nan if no completion
    has n tokens.

    Args:
        completions: token ids of each completion, EOS included.
        n: length of the n-grams in tokens.
    """
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def completion_rows(policy: Policy, prompts: Sequence[Row], batch: RewardedBatch) -> Iterator[dict[str, Any]]:
    """Yield a row for each completion; its reward is NaN if every reward function abstained."""
    rollout, result = batch.rollout, batch.result
    assert rollout.entropy is not None
    texts, lengths = policy.decode(rollout.completion_ids, rollout.mask), rollout.mask.sum(dim=1).tolist()
    ids, truncated = rollout.completion_ids.tolist(), rollout.truncated.tolist()
    entropy = rollout.entropy.double().sum(dim=1).tolist()
    for i, prompt in enumerate(rollout.prompt_index.tolist()):
        yield {
            "place": batch.places[prompt],
            "prompt": prompts[batch.places[prompt]]["prompt"],
            "completion": texts[i],
            "reward": float(result.total[i]) if result.valid[i] else math.nan,
            "rewards": result.values[i].tolist(),
            "ids": ids[i][: lengths[i]],
            "entropy": entropy[i],
            "length": lengths[i],
            "truncated": truncated[i],
        }


def by_group(rows: Sequence[Row], size: int) -> tuple[list[Sequence[Row]], list[np.ndarray]]:
    """Return the rows of each prompt's `size` completions, and their rewards without abstentions."""
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    rewards = [np.array([row["reward"] for row in group], dtype=np.float64) for group in groups]
    return groups, [row[~np.isnan(row)] for row in rewards]


def probe_policy(
    policy: Policy,
    prompts: Sequence[Row],
    rewards: Rewards,
    sampling: Sampling,
    *,
    batch_size: int = 256,
) -> Probe:
    """Sample several completions of each prompt and summarise their rewards, lengths and entropy.

    Completions for which every reward function abstains are left out; a prompt with fewer than k remaining
    completions is left out of the estimates for k.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        sampling: how completions are sampled; at least two for each prompt.
        batch_size: completions in one batch; changes memory only.

    Raises:
        Refused: there are no prompts or fewer than two samples, or a prompt does not fit into the context.
        Stopped: a reward function failed.
    """
    samples = sampling.num_generations
    if not prompts or samples < 2:
        raise Refused(
            f"The probe was given {len(prompts)} prompts and {samples} samples of each. It needs one prompt "
            "or more, and two samples or more, to see whether rewards differ."
        )
    batches = sample_and_reward(policy, prompts, rewards, sampling, stream="probe", batch_size=batch_size)
    rows = [row for batch in batches for row in completion_rows(policy, prompts, batch)]
    groups, known = by_group(rows, samples)
    lengths = [row["length"] for row in rows]
    sizes = [2**power for power in range(samples.bit_length()) if 2**power <= samples]
    mark = rewards.pass_threshold
    best = {k: over_prompts([best_of(row, k) for row in known]) for k in sizes}
    right = {} if mark is None else {k: over_prompts([best_of(r >= mark, k) for r in known]) for k in sizes}
    return Probe(
        prompts=len(groups),
        samples=samples,
        binary=rewards.binary,
        reward=best[1],
        best_of=best,
        dead_groups={k: over_prompts([all_equal(row, k) for row in known]) for k in sizes[1:]},
        truncated=over_prompts([float(np.mean([row["truncated"] for row in group])) for group in groups]),
        length=float(np.mean(lengths)),
        longest=max(lengths),
        entropy=sum(row["entropy"] for row in rows) / max(1, sum(lengths)),
        passed=right,
    )
