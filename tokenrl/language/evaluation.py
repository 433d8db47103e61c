"""Reward of a policy on held-out prompts: of the greedy completion, and of sampled ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tokenrl.core.rules import Refused
from tokenrl.language.policy import Policy
from tokenrl.language.rewards import Rewards
from tokenrl.language.sampling import sample, uniforms
from tokenrl.language.step import reward_rows

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
    encoded = policy.encode_all(
        [row["prompt"] for row in prompts],
        max_completion_length=max_completion_length,
        truncate=truncate_prompts,
    )
    table: list[tuple[int, float, float, float, float]] = []  # place, greedy, sampled, length, truncated
    greedy_rows: list[dict[str, Any]] = []
    places = list(range(rank, len(prompts), world))
    size = max(1, batch_size // max(1, num_generations))
    for start in range(0, len(places), size):
        part = places[start : start + size]
        rows, ids = [prompts[i] for i in part], [encoded[i] for i in part]
        columns: list[torch.Tensor] = []
        for generations in (1, num_generations) if num_generations else (1,):
            greedy = not columns
            draws = (
                None
                if greedy
                else uniforms(
                    EVALUATION + seed,
                    0,
                    part,
                    num_generations=generations,
                    max_completion_length=max_completion_length,
                )
            )
            rollout = sample(
                policy,
                ids,
                num_generations=generations,
                max_completion_length=max_completion_length,
                temperature=temperature,
                draws=draws,
            )
            result = reward_rows(policy, rewards, rows, rollout, step=step)
            total = torch.as_tensor(result.total).masked_fill(~torch.as_tensor(result.valid), torch.nan)
            columns.append(total.view(-1, generations).double().nanmean(dim=1))
            if greedy:
                texts = policy.decode(rollout.completion_ids, rollout.mask)
                greedy_rows += [
                    {"prompt": row["prompt"], "completion": text, "reward": float(value)}
                    for row, text, value in zip(rows, texts, total, strict=True)
                ]
        lengths = rollout.mask.sum(dim=1).double().view(len(part), -1).mean(dim=1)
        cut = rollout.truncated.double().view(len(part), -1).mean(dim=1)
        table += zip(part, *(c.tolist() for c in (columns[0], columns[-1], lengths, cut)), strict=True)
    if world > 1:
        from accelerate.utils import gather_object

        table = sorted(gather_object(table))
    return Evaluation(_summary(table, sampled=num_generations > 0), greedy_rows)


def _summary(table: list[tuple[int, float, float, float, float]], *, sampled: bool) -> dict[str, float]:
    _, greedy, reward, length, cut = torch.tensor(table, dtype=torch.float64).unbind(dim=1)
    metrics = {"reward_greedy": greedy.nanmean()}
    if sampled:
        kept = reward[~reward.isnan()]
        metrics["reward"] = kept.mean()
        if len(kept) > 1:
            metrics["reward_stderr"] = kept.std() / len(kept) ** 0.5
    metrics |= {"completions/mean_length": length.mean(), "completions/clipped_ratio": cut.mean()}
    return {name: float(value) for name, value in metrics.items()}
