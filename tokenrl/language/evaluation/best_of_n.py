"""Best-of-n: estimates the gold reward of the sample that a proxy reward prefers, and its KL to the base.

Best-of-n is the baseline for every policy trained against a reward model, because it only selects and does
not train (Stiennon et al. 2020, arXiv 2009.01325). Each estimate is for one prompt and uses a pool of N >= n
samples of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import rel_entr

from tokenrl.errors import Refused
from tokenrl.language.evaluation.estimates import estimates, known_rewards
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import checked_generator
from tokenrl.language.rollout.allowed import with_allowed
from tokenrl.language.rollout.rewarded import reward_rows, sample_and_reward
from tokenrl.language.rollout.sampling import Sampling, encode, uniforms
from tokenrl.language.tasks.rows import Row
from tokenrl.settings import check_number


def sample_pool(
    policy: Policy, prompts: Sequence[Any], sampling: Sampling, *, batch_size: int = 512
) -> list[list[str]]:
    """Sample a pool of N completions for each prompt, from which best-of-n chooses.

    Args:
        policy: the base policy.
        prompts: B prompts, text or chat messages.
        sampling: how completions are sampled, N for each prompt. The base that best-of-n is compared with
            is the policy at this temperature.
        batch_size: completions sampled at a time; changes memory only.

    Returns:
        For each of B prompts, the list of N texts.

    Raises:
        Refused: `num_generations` is 0, or a prompt cannot be completed.
    """
    check_number("num_generations", sampling.num_generations, at_least=1)
    generator = checked_generator(policy)
    texts = []
    rows = [{"prompt": prompt} for prompt in prompts]
    sampling = with_allowed(policy, rows, sampling)
    for index, ids in enumerate(encode(policy, rows, sampling)):
        draws = uniforms("best_of_n", sampling, [index])
        assert draws is not None
        completions = []
        of_prompt = sampling.beginning(rows[index : index + 1])
        for part in draws.split(batch_size):
            rollout = generator.generate([ids], replace(of_prompt, num_generations=len(part)), part)
            completions += policy.decode(rollout.completion_ids, rollout.mask)
        texts.append(completions)
    return texts


def best_of_n_metrics(
    policy: Policy,
    prompts: Sequence[Row],
    choosing: Rewards,
    gold: Rewards,
    sampling: Sampling,
) -> dict[str, float]:
    """Measure the reward and the KL of best-of-n, for n = 1, 2, 4 ... up to N.

    N completions of each prompt are sampled. One reward chooses among n of them, and another measures the
    choice; the expectation over all subsets of size n is estimated without bias (see `choice_weights`).

    Args:
        policy: the policy that is sampled.
        prompts: rows with a `prompt`; other columns reach the rewards.
        choosing: the reward that chooses, such as a reward model.
        gold: the reward that the choice is measured by; it may be the same.
        sampling: how completions are sampled, N per prompt.

    Returns:
        For each n, means over prompts with their standard errors under the same name and `_stderr`:
        `best_of_n@n` (gold reward of the choice), `best_of_n_proxy@n` (its reward by `choosing`) and
        `best_of_n_kl@n` (KL to the policy in nats, see `best_of_n_kl`). A prompt is left out if fewer than n
        of its completions have both rewards.

    Raises:
        Refused: `num_generations` is 0, or a prompt cannot be completed.
        Stopped: a reward function failed.
    """
    size = sampling.num_generations
    check_number("num_generations", size, at_least=1)
    chosen_by = []  # for each prompt the rewards that decide the choice
    measured_by = []
    generator = checked_generator(policy, choosing.environments)
    for batch in sample_and_reward(
        policy, generator, prompts, choosing, sampling, stream="best_of_n"
    ):
        gold_batch = reward_rows(policy, gold, batch, batch.data)
        valid = batch.valid & gold_batch.valid
        chosen_by += known_rewards(batch.rewards, valid, size)
        measured_by += known_rewards(gold_batch.rewards, valid, size)
    by_prompt = {}
    powers = [2**k for k in range(size.bit_length())]
    for n in sorted({*powers, size}):
        pools = [pool for pool in zip(chosen_by, measured_by, strict=True) if len(pool[0]) >= n]
        weighted = [(choice_weights(proxy, n), proxy, gold) for proxy, gold in pools]
        by_prompt[f"best_of_n@{n}"] = [float(w @ gold) for w, _, gold in weighted]
        by_prompt[f"best_of_n_proxy@{n}"] = [float(w @ proxy) for w, proxy, _ in weighted]
        by_prompt[f"best_of_n_kl@{n}"] = [best_of_n_kl(proxy, n) for proxy, _ in pools]
    return estimates(by_prompt)


def choice_weights(proxy: np.ndarray, n: int) -> np.ndarray:
    """Probability that best-of-n chooses each sample, if its n samples are drawn from the pool.

    They are drawn without replacement. The i-th smallest reward (counted from 1) is the highest of n in
    `C(i-1, n-1)` of the `C(N, n)` subsets. Samples with equal proxy rewards, such as copies of one text, are
    chosen with equal probability. Therefore `weights @ gold` is an unbiased estimate of the expected gold
    reward of best-of-n; for n = 1 it is the mean.

    Args:
        proxy: the rewards of the pool that decide the choice [N].
        n: number of samples to choose from, 1 to N.

    Returns:
        The probabilities [N]; they sum to 1.

    Raises:
        Refused: n is out of range.
    """
    size = len(proxy)
    if not 1 <= n <= size:
        raise Refused(
            f"n={n}: the best of n is estimated from at least n samples; there are {size}."
        )
    _, level, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    below = np.cumsum(counts)  # number of samples with this reward or a lower one
    subsets = math.comb(size, n)
    all_below = [math.comb(m, n) / subsets for m in below.tolist()]
    chance = np.diff(all_below, prepend=0.0)  # probability that this reward is the highest of n
    return np.asarray((chance / counts)[level.reshape(-1)])


def best_of_n_kl(proxy: np.ndarray, n: int) -> float:
    """Estimate KL(best-of-n || base) in nats from a pool of samples: `sum_k m_k log(m_k / q_k)`.

    The k-th distinct proxy reward has the share `q_k` of the samples, and with probability
    `m_k = F_k^n - F_(k-1)^n` it is the highest of n, where F is the cumulative share. Among samples with
    equal rewards best-of-n chooses as the base does, so these shares give the whole KL. It is below
    `log n - (n - 1) / n` wherever texts repeat, as they do in toy tasks (Beirami et al. 2024, arXiv 2401.01879). The
    pool hardly contains texts rarer than 1/N, so the estimate is too low when n is near N.

    Args:
        proxy: the rewards of the pool that decide the choice [N].
        n: number of samples to choose from.
    """
    _, counts = np.unique(proxy, return_counts=True)
    share = counts / counts.sum()
    below = np.minimum(np.cumsum(share), 1.0)
    chosen = np.diff(below**n, prepend=0.0)
    return float(rel_entr(chosen, share).sum())
