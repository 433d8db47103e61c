"""Measures how well rewards agree with preferences: accuracy, and the limit of noisy labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from tokenrl.errors import Refused, Stopped
from tokenrl.language.preferences.pairs import Pair
from tokenrl.language.rewards.model import RewardModel

Encoded = tuple[list[int], list[int]]  # token ids of prompt + chosen, and of prompt + rejected


def encode_pairs(reward_model: RewardModel, pairs: Sequence[Pair]) -> list[Encoded]:
    """Tokenise the two texts of each pair.

    Args:
        reward_model: gives the tokenizer and the context.
        pairs: the N pairs.

    Returns:
        For each pair, the token ids of prompt + chosen and of prompt + rejected.

    Raises:
        Refused: a text is longer than the model's context, or messages have no chat template.
    """
    encoded = []
    for pair in pairs:
        encode = partial(reward_model.encode, pair.prompt, tools=pair.tools, truncate=False)
        try:
            encoded.append((encode(pair.chosen), encode(pair.rejected)))
        except Refused as error:
            raise Refused(f"The pair of the prompt {pair.prompt!r:.60}: {error}") from error
    limit = reward_model.max_length
    lengths = [max(map(len, texts)) for texts in encoded]
    if limit is not None and max(lengths) > limit:
        count = sum(length > limit for length in lengths)
        raise Refused(
            f"{count} of {len(pairs)} pairs hold a text longer than the model's {limit} tokens (up to "
            f"{max(lengths)}): leave them out, or take a model of longer context."
        )
    return encoded


def score_pairs(reward_model: RewardModel, encoded: Sequence[Encoded]) -> np.ndarray:
    """Score the two texts of each pair.

    Returns:
        Rewards of the chosen and the rejected text, float64 [N, 2].

    Raises:
        Stopped: a reward is not finite.
    """
    texts = [ids for pair in encoded for ids in pair]
    rewards = np.asarray(reward_model.score(texts), dtype=np.float64)
    count = np.count_nonzero(~np.isfinite(rewards))
    if count:
        raise Stopped(
            f"{count} of {rewards.size} rewards are not finite: the weights have diverged."
        )
    return rewards.reshape(-1, 2)


def preference_metrics(rewards: np.ndarray, pairs: Sequence[Pair]) -> dict[str, float]:
    """Compute the metrics of a reward model on held-out pairs; a tie counts as half right.

    Args:
        rewards: rewards of the chosen and the rejected completions [N, 2].
        pairs: the N pairs.

    Returns:
        `accuracy`: share of pairs in which the chosen completion has the higher reward. `accuracy_stderr`:
        its standard error, clustered by prompt (absent with a single prompt).
        `loss`: mean of -log sigmoid(r_chosen - r_rejected), without margin or centring; it is log 2 for
        a model that knows nothing. `margin`: mean difference of the rewards.
        If all pairs have gold rewards: `gold_agreement`, the accuracy against the order of the gold rewards,
        where they differ. `noise_ceiling`, the accuracy of the gold rewards on these labels, which a reward
        model exceeds only by chance.
    """
    difference = rewards[:, 0] - rewards[:, 1]  # [N]
    right = np.heaviside(difference, 0.5)
    metrics = {"accuracy": float(right.mean())}
    error = clustered_stderr(right, [pair.key for pair in pairs])
    if error is not None:
        metrics["accuracy_stderr"] = error
    metrics["loss"] = float(np.logaddexp(0, -difference).mean())
    metrics["margin"] = float(difference.mean())
    golds = [pair.gold for pair in pairs if pair.gold is not None]
    if len(golds) == len(pairs):
        chosen_gold, rejected_gold = np.transpose(golds)  # [N]
        gold = chosen_gold - rejected_gold
        metrics["noise_ceiling"] = float(np.heaviside(gold, 0.5).mean())
        if gold.any():
            agreement = difference * np.sign(gold)
            metrics["gold_agreement"] = float(np.heaviside(agreement[gold != 0], 0.5).mean())
    return metrics


def clustered_stderr(values: np.ndarray, groups: Sequence[Any]) -> float | None:
    """Standard error of a mean whose values are independent only between groups; None for a single group.

    It is `sqrt(K / (K - 1) sum_k (sum_{i in k} (x_i - mean))^2) / N` for K groups and N values (Liang & Zeger
    1986); with one value per group it is the usual standard error.
    """
    _, cluster = np.unique(groups, return_inverse=True)  # [N]
    sums = np.bincount(cluster, weights=values - values.mean())  # [K]
    count = len(sums)
    if count < 2:
        return None
    variance = count / (count - 1) * (sums**2).sum()
    return math.sqrt(variance) / len(values)
