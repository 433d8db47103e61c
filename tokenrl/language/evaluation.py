"""Reward of a policy on held-out prompts: of the greedy completion, and of sampled ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from tokenrl.core.rules import Refused
from tokenrl.language.experience import reward_rows
from tokenrl.language.policy import Policy
from tokenrl.language.rewards import RewardResult, Rewards
from tokenrl.language.sampling import Rollout, sample, uniforms

EVALUATION = (
    2**63
)  # added to the seed: evaluation draws from a stream of its own, the same at every evaluation


class Evaluation(NamedTuple):
    """Numbers of one evaluation, and the greedy completions (of this process) for people to read."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate_policy(
    policy: Policy,
    prompts: Sequence[Mapping[str, Any]],
    rewards: Rewards,
    *,
    max_completion_length: int,
    num_generations: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    truncate_prompts: bool = False,
    batch_size: int = 256,
    accelerator: Any = None,
) -> Evaluation:
    """Evaluate on held-out prompts; several processes share them.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        max_completion_length: most tokens a completion may have.
        num_generations: sampled completions a prompt; 0 evaluates the greedy completion only.
        temperature: of the sampled completions.
        seed: of sampling; evaluations with the same seed share their random numbers.
        step: passed to the rewards, for those that ask.
        truncate_prompts: drop tokens from the left of prompts too long.
        batch_size: completions in one batch; changes memory only.
        accelerator: accelerate's, in a run of several processes.

    Returns:
        `reward_greedy`, `reward` (sampled mean) with its standard error over prompts `reward_stderr`,
        `completions/mean_length` and `completions/clipped_ratio` of the sampled completions.
    """
    if not prompts:
        raise Refused(
            "There are no prompts to evaluate on. Give an eval_split, or hold rows out with eval_size."
        )
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    ids = policy.encode_all(
        [row["prompt"] for row in prompts],
        max_completion_length=max_completion_length,
        truncate=truncate_prompts,
    )
    passes: list[list[dict[str, Any]]] = []
    for generations in (0, num_generations) if num_generations else (0,):
        rows: list[dict[str, Any]] = []
        size = max(1, batch_size // max(1, generations))
        for start in range(rank, len(prompts), world * size):
            places = range(start, min(start + world * size, len(prompts)), world)
            draws = None
            if generations:
                shape = {"num_generations": generations, "max_completion_length": max_completion_length}
                draws = uniforms(EVALUATION + seed, 0, places, **shape)
            rollout = sample(
                policy,
                [ids[place] for place in places],
                num_generations=max(1, generations),
                max_completion_length=max_completion_length,
                temperature=temperature,
                draws=draws,
            )
            result = reward_rows(policy, rewards, [prompts[place] for place in places], rollout, step=step)
            rows += _completions(policy, prompts, places, rollout, result)
        passes.append(rows if world == 1 else sorted(gather_object(rows), key=lambda row: row["place"]))
    return Evaluation(_summary(passes), passes[0])


def _completions(
    policy: Policy,
    prompts: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    rollout: Rollout,
    result: RewardResult,
) -> list[dict[str, Any]]:
    """One row a completion; its reward is NaN where every reward function abstained."""
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    lengths, truncated = rollout.mask.sum(dim=1).tolist(), rollout.truncated.tolist()
    return [
        {
            "place": places[prompt],
            "prompt": prompts[places[prompt]]["prompt"],
            "completion": texts[i],
            "reward": float(result.total[i]) if result.valid[i] else math.nan,
            "length": lengths[i],
            "truncated": truncated[i],
        }
        for i, prompt in enumerate(rollout.prompt_index.tolist())
    ]


def _summary(passes: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Means over completions; the standard error is that of the means of prompts."""
    table = [
        torch.tensor([[row[k] for k in ("reward", "length", "truncated", "place")] for row in rows]).double()
        for rows in passes
    ]
    metrics = {"reward_greedy": table[0][:, 0].nanmean()}
    reward, length, truncated, _ = table[-1].unbind(dim=1)
    if len(passes) > 1:
        metrics["reward"] = reward.nanmean()
        generations = len(passes[1]) // len(passes[0])
        means = reward.view(-1, generations).nanmean(dim=1)
        means = means[~means.isnan()]
        if len(means) > 1:
            metrics["reward_stderr"] = means.std() / len(means) ** 0.5
    metrics |= {"completions/mean_length": length.mean(), "completions/clipped_ratio": truncated.mean()}
    return {name: float(value) for name, value in metrics.items()}
