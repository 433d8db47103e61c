"""What a step records of its rows: metrics for the log, and completions for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import RewardResult
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.training.kl_control import kl_metrics
from tokenrl.language.training.processes import StepRows


def step_metrics(rows: StepRows, names: Sequence[str], group_size: int) -> dict[str, float]:
    """Metrics of the step's rows under TRL's names.

    `frac_reward_zero_std` is the share of groups in which no two rewards differ: they teach a group baseline
    nothing. `entropy` is the mean over sampled tokens, in nats; `kl` the mean over completions of the
    log-ratio to the reference summed over tokens (k1, unbiased, in nats; `kl_metrics` has the others).
    """
    rewards, valid, mask = rows.rewards, rows.valid, rows.mask
    lengths, tokens = mask.sum(dim=1).double(), mask.sum().clamp(min=1)
    # A prompt's only completion has none to differ from: then the whole step is the group.
    groups = torch.where(valid, rewards, torch.nan).view(-1, group_size if group_size > 1 else len(rewards))
    low = groups.nan_to_num(nan=torch.inf).min(dim=1).values
    high = groups.nan_to_num(nan=-torch.inf).max(dim=1).values
    kept = rewards[valid].double()
    metrics = {
        "reward": kept.mean(),
        "reward_std": kept.std(correction=min(1, len(kept) - 1)),
        "frac_reward_zero_std": (high <= low).double().mean(),
        "entropy": (rows.entropy * mask).double().sum() / tokens,
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": rows.truncated.double().mean(),
        "num_tokens": lengths.sum() + rows.prompt_length.sum(),
    }
    if rows.ref_logprobs is not None:
        metrics |= kl_metrics(rows.logprobs, rows.ref_logprobs, mask, group_size)
    if len(kept) < len(rewards):
        metrics["frac_rows_abstained"] = 1 - valid.double().mean()
    for column, name in enumerate(names):
        values = rows.by_function[:, column].double()
        values = values[~values.isnan()]
        if len(values):
            metrics[f"rewards/{name}/mean"] = values.mean()
            metrics[f"rewards/{name}/std"] = values.std(correction=min(1, len(values) - 1))
    return {name: float(value) for name, value in metrics.items()}


def completion_rows(
    policy: Policy,
    prompts: Sequence[tuple[int, Mapping[str, Any]]],
    rollout: Rollout,
    result: RewardResult,
    names: Sequence[str],
    advantages: Tensor,
) -> list[dict[str, Any]]:
    """This process's completions with their rewards and advantages (the first action's, if one a token)."""
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    first = (advantages if advantages.ndim == 1 else advantages[:, 0]).tolist()
    out = []
    for i, prompt in enumerate(rollout.prompt_index.tolist()):
        row = {
            "prompt": prompts[prompt][1]["prompt"],
            "completion": texts[i],
            "reward": float(result.total[i]),
        }
        row |= {f"rewards/{name}": float(result.values[i, f]) for f, name in enumerate(names)}
        row |= {name: column[i] for name, column in result.extra.items()}
        out.append(row | {"advantage": first[i], "truncated": bool(rollout.truncated[i])})
    return out
