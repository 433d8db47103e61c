"""Best-of-n: what a proxy reward's choice among n samples is worth, and how far it is from the base policy.

The baseline of every policy trained against a reward model: no training, only selection (Stiennon et al.
2020; Gao, Schulman & Hilton 2022, arXiv 2210.10760). All estimates are of one prompt and take one pool of
N >= n samples of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrl.core.rules import Refused
from tokenrl.language.policy import Policy
from tokenrl.language.sampling import sample, uniforms

POOL = 2**61  # added to the seed: these completions are none that training or evaluation samples


def sample_pool(
    policy: Policy,
    prompts: Sequence[Any],
    *,
    samples: int,
    max_completion_length: int,
    seed: int = 0,
    batch_size: int = 512,
) -> list[list[str]]:
    """Texts of `samples` completions of each prompt at temperature 1, to choose from.

    Args:
        policy: the base policy.
        prompts: B prompts, text or chat messages.
        samples: completions a prompt, N.
        max_completion_length: most tokens a completion may have.
        seed: of sampling.
        batch_size: completions sampled at a time; changes memory only.

    Returns:
        B lists of N texts.
    """
    shape: dict[str, Any] = {"num_generations": samples, "max_completion_length": max_completion_length}
    texts: list[list[str]] = []
    for place, ids in enumerate(policy.encode_all(prompts, max_completion_length=max_completion_length)):
        draws, found = uniforms(POOL + seed, 0, [place], **shape), []
        for rows in draws.split(batch_size):
            part = shape | {"num_generations": len(rows)}
            rollout = sample(policy, [ids], draws=rows, **part)
            found += policy.decode(rollout.completion_ids, rollout.mask)
        texts.append(found)
    return texts


def choice_weights(proxy: np.ndarray, n: int) -> np.ndarray:
    """Probability [N] with which each sample is the choice among n drawn from the N without replacement.

    The i-th smallest (from 1) is the highest of n in `C(i-1, n-1)` of the `C(N, n)` subsets; samples of equal
    proxy reward, as copies of one text have, are chosen among with equal chance. So `weights @ gold` is an
    unbiased estimate of the expected gold reward of best-of-n, and for n = 1 the mean.

    Args:
        proxy: the rewards that choose [N].
        n: how many are chosen from, 1 to N.

    Raises:
        Refused: n out of range.
    """
    size = len(proxy)
    if not 1 <= n <= size:
        raise Refused(f"n={n}: the best of n is estimated from n samples or more; there are {size}.")
    _, level, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    below = np.cumsum(counts)  # samples at each level or under it
    all_below = np.array([_subsets(int(m), n) - _subsets(size, n) for m in below])
    chance = np.diff(np.exp(all_below), prepend=0.0)  # that the highest of n is of this level
    weights: np.ndarray = (chance / counts)[level.reshape(-1)]
    return weights


def _subsets(size: int, n: int) -> float:
    """log C(size, n), -inf where there is no such subset; factorials of thousands overflow, logs do not."""
    if size < n:
        return -math.inf
    return math.lgamma(size + 1) - math.lgamma(n + 1) - math.lgamma(size - n + 1)


def best_of_n_kl(proxy: np.ndarray, n: int) -> float:
    """KL(best-of-n || base) in nats, the pool standing for the base: `sum_k m_k log(m_k / q_k)`.

    `q_k` is the share of samples with the k-th proxy reward and `m_k = F_k^n - F_(k-1)^n` the chance that it
    is the highest of n (F the cumulated share). Within a level best-of-n is the base, so the levels tell the
    whole KL. It is below `kl_bound` wherever texts repeat, as they do in toys (Beirami et al. 2024,
    arXiv 2401.01879). A pool not far larger than n hides what is rarer than 1/N, and the estimate is then low.

    Args:
        proxy: the rewards that choose [N].
        n: how many are chosen from.
    """
    _, counts = np.unique(proxy, return_counts=True)
    share = counts / counts.sum()
    below = np.minimum(np.cumsum(share), 1.0)
    chosen = np.diff(below**n, prepend=0.0)
    some = chosen > 0
    return float((chosen[some] * np.log(chosen[some] / share[some])).sum())


def kl_bound(n: int) -> float:
    """The KL of best-of-n if no two samples tied, `log n - (n - 1) / n`; otherwise an upper bound."""
    return math.log(n) - (n - 1) / n
