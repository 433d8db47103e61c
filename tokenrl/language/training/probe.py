"""What a policy can do before training: sample each prompt several times, and read off what to expect.

Rewards and groups are estimated without bias for each prompt, with a standard error over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.judged import judged
from tokenrl.language.rollout.sampling import Sampling


class Estimate(NamedTuple):
    """A mean over prompts and its standard error; nan for the error of a single prompt."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Probe:
    """What a policy did with some training prompts.

    Attributes:
        prompts: prompts sampled from.
        samples: completions of each.
        binary: whether every reward was 0 or 1, so that `best_of` is pass@k.
        reward: mean reward; pass@1 if binary.
        best_of: by k, the expected best reward of k completions; pass@k if binary.
        dead_groups: by G, the share of groups of G completions whose rewards are all equal.
        truncated: share of completions cut at the longest length before an EOS.
        length: mean tokens a completion.
        longest: most tokens of any.
        entropy: mean entropy of the policy, in nats a token.
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


def best_of(rewards: np.ndarray, k: int) -> float:
    """Unbiased estimate of the expected best of k draws, from n >= k draws of one prompt.

    The i-th smallest (from 1) is the best in `C(i-1, k-1)` of the `C(n, k)` subsets of size k. For rewards of
    0 and 1 this is pass@k, `1 - C(n-c, k)/C(n, k)` with c ones (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Args:
        rewards: of the draws, [n].
        k: size of the subsets.
    """
    n = len(rewards)
    ways = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return float(np.sort(rewards) @ np.array(ways))


def all_equal(rewards: np.ndarray, k: int) -> float:
    """Unbiased estimate of the probability that k draws have equal rewards, from n >= k draws of one prompt.

    The share of the subsets of size k within one value: `sum_v C(n_v, k) / C(n, k)`, n_v draws of value v.

    Args:
        rewards: of the draws, [n].
        k: size of the subsets.
    """
    _, counts = np.unique(rewards, return_counts=True)
    return sum(math.comb(int(count), k) for count in counts) / math.comb(len(rewards), k)


def over_prompts(values: Sequence[float]) -> Estimate:
    """Mean of one value a prompt, and its standard error `sd / sqrt(B)`; values that are nan are left out."""
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return Estimate(math.nan, math.nan)
    error = known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(float(known.mean()), float(error))


def probe_policy(
    policy: Policy,
    prompts: Sequence[Mapping[str, Any]],
    rewards: Rewards,
    sampling: Sampling,
    *,
    batch_size: int = 256,
) -> Probe:
    """Sample completions of each prompt and say what training would find.

    Completions on which every reward function abstains are left out; a prompt with fewer than k others does
    not count in what is said of k.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        sampling: how to sample; two completions of each prompt or more.
        batch_size: completions in one batch; changes memory only.

    Raises:
        Refused: no prompts, fewer than two samples, or prompts that do not fit into the context.
    """
    samples = sampling.num_generations
    if not prompts or samples < 2:
        raise Refused(
            f"The probe was given {len(prompts)} prompts and {samples} samples of each; it needs one prompt "
            "or more, and two samples or more, to see whether rewards differ."
        )
    table, lengths, cut, entropy = [], [], [], 0.0
    for _, rollout, result in judged(
        policy, prompts, rewards, sampling, stream="probe", batch_size=batch_size
    ):
        table.append(np.where(result.valid, result.total, np.nan).reshape(-1, samples))
        lengths.append(rollout.mask.sum(dim=1).cpu().numpy())
        cut.append(rollout.truncated.double().cpu().numpy().reshape(-1, samples))
        assert rollout.entropy is not None
        entropy += float(rollout.entropy.double().sum())
    every, length = np.concatenate(table), np.concatenate(lengths)
    return _read(every, length, np.concatenate(cut), entropy / max(1, int(length.sum())))


def _read(table: np.ndarray, lengths: np.ndarray, cut: np.ndarray, entropy: float) -> Probe:
    """Summary of rewards and truncations [B, n], lengths [B * n] and the mean entropy."""
    prompts, samples = table.shape
    rows = [row[~np.isnan(row)] for row in table]
    sizes = [2**power for power in range(1, samples.bit_length()) if 2**power <= samples]

    def each(statistic: Any, k: int) -> Estimate:
        return over_prompts([statistic(row, k) if len(row) >= k else math.nan for row in rows])

    return Probe(
        prompts=prompts,
        samples=samples,
        binary=all(np.isin(row, (0.0, 1.0)).all() for row in rows),
        reward=each(best_of, 1),
        best_of={k: each(best_of, k) for k in (1, *sizes)},
        dead_groups={size: each(all_equal, size) for size in sizes},
        truncated=over_prompts(cut.mean(axis=1).tolist()),
        length=float(lengths.mean()),
        longest=int(lengths.max()),
        entropy=entropy,
    )
