"""Collects the rows on which estimators are measured: completions with all inputs that an estimator needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import check_model
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import sample_and_reward
from tokenrl.language.rollout.rollout import Rollout, pad_right
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import USUAL, Regime, score_in_parts


@dataclass(frozen=True)
class Samples:
    """B groups of G rows, prompt-major, on the CPU in float64; T is the most tokens allowed.

    Attributes:
        parts: The rollouts in order, each of some prompts.
        group_size: Completions per prompt, G.
        mask: True where the token is an action [N, T].
        rewards: Reward of each row [N]; 0 where all reward functions abstain.
        valid: False where all reward functions abstain [N].
        truncated: True where a completion was cut off by the maximum length [N].
        greedy_rewards: Reward of the greedy completion of each row's prompt [N].
        logprobs: Log-probabilities under the policy, as the trainer computes them [N, T].
        ref_logprobs: Log-probabilities under the reference, or under the policy if it has none [N, T].
        entropy: Entropy of the policy at each token, in nats [N, T].
        regime: How the policy is scored.
    """

    parts: tuple[Rollout, ...]
    group_size: int
    mask: Tensor  # [N, T]
    rewards: Tensor  # [N]
    valid: Tensor  # [N]
    truncated: Tensor  # [N]
    greedy_rewards: Tensor  # [N]
    logprobs: Tensor  # [N, T]
    ref_logprobs: Tensor  # [N, T]
    entropy: Tensor  # [N, T]
    regime: Regime = USUAL


def collect(
    policy: Policy,
    rewards: Rewards,
    rows: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    *,
    rows_at_once: int = 1024,
) -> Samples:
    """Sample, reward and score G completions of each prompt, and its greedy completion.

    Args:
        policy: The policy to sample from.
        rewards: The reward functions.
        rows: One per prompt, with the columns that the reward functions need.
        sampling: How to sample the G completions of each prompt.
        rows_at_once: Completions per forward pass; changes memory only.

    Raises:
        Refused: When a greedy completion has no reward.
    """
    group_size = sampling.num_generations
    regime = check_model(policy)
    generator = TransformersGenerator(policy, regime=regime)
    sample = partial(sample_and_reward, policy, generator, rows, rewards, stream="measurement")
    sampled = sample(sampling, batch_size=rows_at_once)
    greedily_sampled = sample(
        replace(sampling, num_generations=0), batch_size=max(1, rows_at_once // group_size)
    )
    parts = []
    columns = []
    for rollout, greedy in zip(sampled, greedily_sampled, strict=True):
        if not greedy.valid.all():
            raise Refused(
                "Every reward function abstained on a greedy completion; give other prompts."
            )
        shared = {
            "rewards": rollout.rewards,
            "valid": rollout.valid,
            "truncated": rollout.truncated,
            "greedy_rewards": greedy.rewards.repeat_interleave(group_size),
        }
        parts.append(rollout)
        columns.append(shared | _scores(policy, rollout, sampling, regime))
    whole = {name: torch.cat([part[name].cpu() for part in columns]) for name in columns[0]}
    whole = {name: x.double() if x.is_floating_point() else x for name, x in whole.items()}
    return Samples(parts=tuple(parts), group_size=group_size, regime=regime, **whole)


def _scores(
    policy: Policy, rollout: Rollout, sampling: Sampling, regime: Regime
) -> dict[str, Tensor]:
    """Return mask, log-probabilities and entropies of a rollout, padded to the most tokens allowed [n, T]."""
    score = partial(score_in_parts, rollout=rollout, regime=regime)
    scored: Any = score(policy.model, distribution=sampling, entropy=True)
    reference = scored.logprobs
    if policy.reference is not None or policy.has_adapter:
        with policy.reference_model() as model:
            reference = score(model, distribution=sampling.whole).logprobs
    columns = {"logprobs": scored.logprobs, "ref_logprobs": reference, "entropy": scored.entropy}
    columns["mask"] = rollout.mask
    return {name: pad_right(x, sampling.max_completion_length) for name, x in columns.items()}
