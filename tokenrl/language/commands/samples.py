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
from tokenrl.language.rollout.rollout import Rollout, cat
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import USUAL, Regime, score_in_parts
from tokenrl.language.training.experience import Experience


@dataclass(frozen=True, kw_only=True)
class Samples(Experience):
    """B groups of G rows, prompt-major, on the CPU in float64; T is the most tokens allowed.

    The log-probabilities under the reference are those of the policy if it has none.

    Attributes:
        parts: The same rows in order as they were sampled, each part of some prompts.
        group_size: Completions per prompt, G.
        regime: How the policy is scored.
        has_teacher: Whether the reference is a teacher, whose KL is a signal of its own.
    """

    greedy_rewards: Tensor
    ref_logprobs: Tensor
    parts: Sequence[Rollout]
    group_size: int
    regime: Regime = USUAL
    has_teacher: bool = False

    def unrewarded(self) -> Samples:
        """Return the same rows with rewards of 0."""
        nothing = torch.zeros_like(self.rewards)
        return replace(self, rewards=nothing, greedy_rewards=nothing)


def collect_samples(
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
    for rollout, greedy in zip(sampled, greedily_sampled, strict=True):
        if not greedy.valid.all():
            raise Refused(
                "Every reward function abstained on a greedy completion; give other prompts."
            )
        columns: Any = rollout.tensors() | _scores(policy, rollout, sampling, regime)
        of_prompts = greedy.rewards.repeat_interleave(group_size)
        parts.append(Experience(**columns, greedy_rewards=of_prompts))
    joined = cat(parts)
    joined = joined.cut(joined.prompt_ids.shape[1], sampling.max_completion_length).on_host()
    whole: Any = {
        name: x.double() if x.is_floating_point() else x for name, x in joined.tensors().items()
    }
    return Samples(**whole, parts=parts, group_size=group_size, regime=regime)


def _scores(
    policy: Policy, rollout: Rollout, sampling: Sampling, regime: Regime
) -> dict[str, Tensor]:
    """Return log-probabilities under policy and reference, of a rollout [n, T], 0 off the mask."""
    score = partial(score_in_parts, rollout=rollout, regime=regime)
    scored: Any = score(policy.model, distribution=sampling)
    reference = scored.logprobs
    if policy.reference is not None or policy.has_adapter:
        with policy.reference_model() as model:
            reference = score(model, distribution=sampling.whole).logprobs
    return {"logprobs": scored.logprobs, "ref_logprobs": reference}
