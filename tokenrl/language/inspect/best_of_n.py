"""Best-of-n: what a proxy reward's choice among n samples is worth, and how far it is from the base policy.

The baseline of every policy trained against a reward model: no training, only selection (Stiennon et al.
2020). All estimates are of one prompt and take one pool of N >= n samples of it. Below them the forms of
over-optimisation (Gao, Schulman & Hilton 2022, arXiv 2210.10760): the gain in gold reward over the base
against d = sqrt(KL), `d (alpha - beta d)` for best-of-n and `d (alpha - beta log d)` for RL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.judged import judged, reward_rows
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.streams import uniforms
from tokenrl.language.training.probe import over_prompts
from tokenrl.settings import check_number

Form = Literal["d squared", "d log d"]  # of best-of-n, of RL


def sample_pool(
    policy: Policy,
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    batch_size: int = 512,
) -> list[list[str]]:
    """Texts of N completions of each prompt, to choose from.

    Args:
        policy: the base policy.
        prompts: B prompts, text or chat messages.
        sampling: how to sample, N completions of each prompt. The base that best-of-n is compared with is
            the policy at this temperature.
        batch_size: completions sampled at a time; changes memory only.

    Returns:
        B lists of N texts.

    Raises:
        Refused: no completions, or a prompt that cannot be completed.
    """
    check_number("num_generations", sampling.num_generations, at_least=1)
    generator = TransformersGenerator(policy)
    texts: list[list[str]] = []
    for place, ids in enumerate(encode(policy, prompts, sampling)):
        draws = uniforms("best_of_n", sampling, [place])
        assert draws is not None
        found: list[str] = []
        for rows in draws.split(batch_size):
            rollout = generator.generate([ids], replace(sampling, num_generations=len(rows)), rows)
            found += policy.decode(rollout.completion_ids, rollout.mask)
        texts.append(found)
    return texts


def pool_rewards(
    reward: Callable[..., Any], rows: Sequence[Mapping[str, Any]], pool: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    """Rewards [N] of each prompt's pool; a text that was sampled often is scored once.

    Args:
        reward: a function of prompts, completions and the rows' other columns, as in training, that does not
            abstain.
        rows: B rows with a text `prompt`.
        pool: B lists of texts.
    """
    rewards = []
    for row, texts in zip(rows, pool, strict=True):
        distinct = list(dict.fromkeys(texts))
        columns = {name: [value] * len(distinct) for name, value in row.items() if name != "prompt"}
        values = reward(prompts=[row["prompt"]] * len(distinct), completions=distinct, **columns)
        known = dict(zip(distinct, values, strict=True))
        rewards.append(np.array([known[text] for text in texts], dtype=np.float64))
    return rewards


def best_of_n_metrics(
    policy: Policy, prompts: Sequence[Mapping[str, Any]], choosing: Rewards, gold: Rewards, sampling: Sampling
) -> dict[str, float]:
    """Measure what the best of n completions is worth, for n = 1, 2, 4 ... up to N.

    N completions of each prompt are sampled. One reward chooses among n of them, another says what the choice
    is worth; the expectation over all subsets of size n is estimated without bias (see `choice_weights`).

    Args:
        policy: the policy that is sampled.
        prompts: rows with a `prompt`; other columns reach the rewards.
        choosing: the reward that chooses, such as a reward model.
        gold: the reward that the choice is measured by; it may be the same.
        sampling: how to sample, N completions per prompt.

    Returns:
        For each n, means over prompts with their standard errors under the same name and `_stderr`:
        `best_of_n@n` (gold reward of the choice), `best_of_n_proxy@n` (its reward by `choosing`) and
        `best_of_n_kl@n` (KL to the policy in nats, see `best_of_n_kl`). A prompt is left out where fewer than
        n completions have both rewards.

    Raises:
        Refused: no completions per prompt, or a prompt that cannot be completed.
        Stopped: a reward failed.
    """
    check_number("num_generations", sampling.num_generations, at_least=1)
    pools: list[tuple[np.ndarray, np.ndarray]] = []  # per prompt, both rewards of each completion
    for places, rollout, result in judged(policy, prompts, choosing, sampling, stream="best_of_n"):
        worth = reward_rows(policy, gold, [prompts[i] for i in places], rollout, step=sampling.step)
        known = (result.valid & worth.valid).reshape(len(places), -1)
        proxies, golds = (found.total.reshape(len(places), -1) for found in (result, worth))
        pools += [(p[k], g[k]) for p, g, k in zip(proxies, golds, known, strict=True)]
    metrics: dict[str, float] = {}
    for n in _doubling(sampling.num_generations):
        chosen = [(choice_weights(p, n), p, g) for p, g in pools if len(p) >= n]
        for name, values in (
            ("best_of_n", [float(w @ g) for w, _, g in chosen]),
            ("best_of_n_proxy", [float(w @ p) for w, p, _ in chosen]),
            ("best_of_n_kl", [best_of_n_kl(p, n) for _, p, _ in chosen]),
        ):
            found = over_prompts(values)
            metrics |= {f"{name}@{n}": found.value, f"{name}@{n}_stderr": found.stderr}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _doubling(most: int) -> list[int]:
    """1, 2, 4 ... and `most` itself."""
    return sorted({*(2**k for k in range(most.bit_length())), most})


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
    """Log of C(size, n), -inf where there is no such subset; factorials overflow, logs do not."""
    if size < n:
        return -math.inf
    return math.lgamma(size + 1) - math.lgamma(n + 1) - math.lgamma(size - n + 1)


def best_of_n_kl(proxy: np.ndarray, n: int) -> float:
    """KL(best-of-n || base) in nats, the pool standing for the base: `sum_k m_k log(m_k / q_k)`.

    `q_k` is the share of samples with the k-th proxy reward and `m_k = F_k^n - F_(k-1)^n` the chance that it
    is the highest of n (F the cumulated share). Within a level best-of-n is the base, so the levels tell the
    whole KL. It is below `kl_bound` wherever texts repeat, as they do in toys (Beirami et al. 2024, arXiv
    2401.01879). A pool knows little of what is rarer than 1/N, so where n is near N the estimate is low.

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


def gain_form(d: np.ndarray, alpha: float, beta: float, form: Form) -> np.ndarray:
    """The gain at the distances d > 0: `d (alpha - beta d)` or `d (alpha - beta log d)`."""
    return d * (alpha - beta * (d if form == "d squared" else np.log(d)))


def fit_gain(d: np.ndarray, gain: np.ndarray, form: Form) -> tuple[float, float]:
    """Least-squares alpha and beta.

    Args:
        d: square roots of the KL to the base, above 0; any shape.
        gain: gold reward less that of the base, of the same shape.
        form: the form to fit.
    """
    d = np.asarray(d, dtype=np.float64).ravel()
    columns = np.stack([gain_form(d, 1.0, 0.0, form), gain_form(d, 0.0, 1.0, form)], axis=1)
    alpha, beta = np.linalg.lstsq(columns, np.ravel(gain), rcond=None)[0]
    return float(alpha), float(beta)


def gain_peak(alpha: float, beta: float, form: Form) -> float:
    """The d where the form is highest, `alpha / (2 beta)` or `exp(alpha / beta - 1)`; inf if it only rises.

    For a best-of-n that never gains (alpha <= 0) it is 0.
    """
    if beta <= 0:
        return math.inf
    if form == "d squared":
        return max(0.0, alpha / (2 * beta))
    exponent = alpha / beta - 1
    return math.exp(exponent) if exponent < 700 else math.inf  # exp overflows beyond
