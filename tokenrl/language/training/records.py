"""What a step knows of all its rows, and what it records of them for the log and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenrl.errors import Stopped
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import RewardResult
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.training.kl_control import kl_metrics


def gather_rows(
    accelerator: Any, rollout: Rollout, result: RewardResult, more: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Rows of every process in the order of the prompts, identical on all; columns padded to the widest.

    `more` has what some estimators need, [n] or [n, T] by name; what is None is left out.

    Raises:
        Stopped: no row of the step has a reward.
    """
    device, dtype = rollout.logprobs.device, rollout.logprobs.dtype
    rows = {
        "rewards": torch.as_tensor(result.total, dtype=dtype, device=device),  # [n]
        "by_function": torch.as_tensor(result.values, dtype=dtype, device=device),  # [n, F]
        "valid": torch.as_tensor(result.valid, device=device),
        "truncated": rollout.truncated,
        "prompt_length": rollout.prompt_mask.sum(dim=1)[rollout.prompt_index],
        "mask": rollout.mask,  # [n, T]
        "logprobs": rollout.logprobs,
        "entropy": rollout.entropy,
    }
    rows |= {name: x.to(device, dtype) for name, x in more.items() if x is not None}
    whole = rows if accelerator.num_processes == 1 else _gathered(accelerator, rows)
    if not whole["valid"].any():
        raise Stopped(
            "Every reward function abstained from every completion of this step, so there is nothing to "
            "learn from. Return None only where there is no number."
        )
    return whole


def _gathered(accelerator: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = [name for name, x in rows.items() if x.ndim > 1 and name != "by_function"]
    # Padding turns a bool into an int64, on those processes only that need any.
    rows["mask"] = rows["mask"].to(torch.uint8)
    padded = {k: accelerator.pad_across_processes(v, dim=1) if k in wide else v for k, v in rows.items()}
    whole = {k: accelerator.gather(v) for k, v in padded.items()}
    return whole | {"mask": whole["mask"].bool()}


def step_metrics(whole: dict[str, Tensor], names: Sequence[str], group_size: int) -> dict[str, float]:
    """Metrics of the step's rows under TRL's names.

    `frac_reward_zero_std` is the share of groups in which no two rewards differ: they teach a group baseline
    nothing. `entropy` is the mean over sampled tokens, in nats; `kl` the mean over completions of the
    log-ratio to the reference summed over tokens (k1, unbiased, in nats; `kl_metrics` has the others).
    """
    valid, mask = whole["valid"], whole["mask"]
    rewards = whole["rewards"]
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
        "entropy": (whole["entropy"] * mask).double().sum() / tokens,
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": whole["truncated"].double().mean(),
        "num_tokens": lengths.sum() + whole["prompt_length"].sum(),
    }
    if "ref_logprobs" in whole:
        metrics |= kl_metrics(whole, group_size)
    if len(kept) < len(rewards):
        metrics["frac_rows_abstained"] = 1 - valid.double().mean()
    for column, name in enumerate(names):
        values = whole["by_function"][:, column].double()
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
