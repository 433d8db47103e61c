"""Measures what a policy can do, from several rewarded samples of each prompt.

The expected reward, the best of k rewards and the share of groups with equal rewards are estimated without
bias for each prompt, and averaged over prompts with a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import agree
from tokenrl.language.rollout.rewarded import sample_and_reward
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import USUAL, Scoring, score_in_parts, with_missing_fields
from tokenrl.language.training.collect import completion_kl

Row = Mapping[str, Any]
SCORED_AT_ONCE = 32  # completions that a reference scores at once, which bounds its logits


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


def sampled_rows(
    policy: Policy,
    prompts: Sequence[Row],
    rewards: Rewards,
    sampling: Sampling,
    *,
    reference: Policy | None = None,
    scoring: Scoring = USUAL,
    **how: Any,
) -> list[dict[str, Any]]:
    """Sample and reward completions, and return a row for each of this process, in the order of prompts.

    The reward of a row is NaN if every reward function abstained. With a reference, a row has two estimates
    of the KL of its completion to it (see `completion_kl`).

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        sampling: how completions are sampled.
        reference: the policy to which the KL is estimated, at the temperature of sampling.
        scoring: how the policy is scored, for what a generator of another engine does not return.
        **how: further arguments of `sample_and_reward`.
    """
    rows, temperature = list[dict[str, Any]](), sampling.temperature
    way = None if reference is None else agree(reference, gradient=False)
    for places, rollout, result in sample_and_reward(policy, prompts, rewards, sampling, **how):
        rollout = with_missing_fields(policy, rollout, scoring, temperature=temperature, entropy=True)
        assert rollout.entropy is not None
        lengths, where = rollout.mask.sum(dim=1).tolist(), [places[i] for i in rollout.prompt_index.tolist()]
        columns = {
            "place": where,
            "prompt": [prompts[place]["prompt"] for place in where],
            "completion": policy.decode(rollout.completion_ids, rollout.mask),
            "reward": np.where(result.valid, result.total, math.nan).tolist(),
            "rewards": result.values.tolist(),
            "ids": [ids[:n] for ids, n in zip(rollout.completion_ids.tolist(), lengths, strict=True)],
            "entropy": rollout.entropy.double().sum(dim=1).tolist(),
            "length": lengths,
            "truncated": rollout.truncated.tolist(),
        }
        if reference is not None and way is not None:
            size = SCORED_AT_ONCE
            scored = score_in_parts(reference.model, rollout, way, rows_at_once=size, temperature=temperature)
            kl = completion_kl(rollout.logprobs, scored.logprobs, rollout.mask)
            columns |= {name: values.tolist() for name, values in kl.items()}
        rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows


def known_rewards(rows: Sequence[Row], size: int) -> list[np.ndarray]:
    """Return the rewards of each prompt's `size` completions, without those that are NaN."""
    totals = np.array([row["reward"] for row in rows], dtype=np.float64).reshape(-1, size)
    return [row[~np.isnan(row)] for row in totals]


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
        raise Refused(f"A probe of {len(prompts)} prompts, {samples} samples of each: give two or more.")
    rows = sampled_rows(policy, prompts, rewards, sampling, stream="probe", batch_size=batch_size)
    known, lengths = known_rewards(rows, samples), [row["length"] for row in rows]
    sizes = [2**power for power in range(samples.bit_length())]
    mark = rewards.pass_threshold
    best = {k: over_prompts([best_of(row, k) for row in known]) for k in sizes}
    right = {} if mark is None else {k: over_prompts([best_of(r >= mark, k) for r in known]) for k in sizes}
    cut = np.array([row["truncated"] for row in rows]).reshape(-1, samples).mean(axis=1)
    return Probe(
        prompts=len(known),
        samples=samples,
        binary=rewards.binary,
        reward=best[1],
        best_of=best,
        dead_groups={k: over_prompts([all_equal(row, k) for row in known]) for k in sizes[1:]},
        truncated=over_prompts(cut.tolist()),
        length=float(np.mean(lengths)),
        longest=max(lengths),
        entropy=sum(row["entropy"] for row in rows) / max(1, sum(lengths)),
        passed=right,
    )
