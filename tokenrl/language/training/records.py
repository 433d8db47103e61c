"""Summarises the rows of a step: metrics for the log, and the completions as a table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenrl.core.losses import k1, k3
from tokenrl.core.rows import from_first, zero_outside
from tokenrl.core.statistics import mean_and_error
from tokenrl.language.training.batch import StepRows

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.training.collect import Experience


def step_metrics(rows: StepRows, names: Sequence[str], group_size: int) -> dict[str, float]:
    """Compute the metrics of the step's rows, under TRL's names.

    `frac_reward_zero_std` is the share of groups in which all rewards are equal; with a group baseline they
    have no gradient. `reward_stderr` is the standard error of `reward` over prompts; it is missing with a
    single prompt. `entropy` is the mean over sampled tokens, in nats. `kl` and `kl_k3` are the means over
    completions of both estimates of `completion_kl`, with standard errors over prompts. The run adds
    `num_samples`, the number of completions generated so far, greedy and replaced ones included, and adds up
    `num_tokens`, the tokens of prompts and of the completions learnt from.

    Args:
        rows: all N rows of the step.
        names: names of the F reward functions.
        group_size: completions per prompt.
    """
    rewards, valid, mask = rows.rewards, rows.valid, rows.mask
    lengths, tokens = mask.sum(dim=1).double(), mask.sum().clamp(min=1)
    # With one completion per prompt there are no groups to compare, so the whole step is taken as one group.
    size = group_size if group_size > 1 else len(rewards)
    differences, _ = from_first(rewards.view(-1, size), valid.view(-1, size))
    kept = rewards[valid].double()
    means = rewards.double().masked_fill(~valid, math.nan).view(-1, group_size).nanmean(dim=1)
    errors = {"reward": mean_and_error(means[~means.isnan()])[1]}
    metrics = {
        "reward": kept.mean(),
        "reward_std": kept.std(correction=min(1, len(kept) - 1)),
        "frac_reward_zero_std": (differences == 0).all(dim=1).double().mean(),
        "entropy": (rows.entropy * mask).double().sum() / tokens,
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": rows.truncated.double().mean(),
        "num_tokens": lengths.sum() + rows.prompt_length.sum(),
    }
    if rows.ref_logprobs is not None:
        for name, values in completion_kl(rows.logprobs, rows.ref_logprobs, mask).items():
            metrics[name], errors[name] = mean_and_error(values, group_size)
    metrics |= {f"{name}_stderr": error for name, error in errors.items() if not error.isnan()}
    if len(kept) < len(rewards):
        metrics["frac_rows_abstained"] = 1 - valid.double().mean()
    for column, name in enumerate(names):
        values = rows.by_function[:, column].double()
        values = values[~values.isnan()]
        if len(values):
            metrics[f"rewards/{name}/mean"] = values.mean()
            metrics[f"rewards/{name}/std"] = values.std(correction=min(1, len(values) - 1))
    return {name: float(value) for name, value in metrics.items()}


def completion_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Estimate the KL of whole completions to the reference, from one sample each, in nats.

    `kl` is the log-ratio summed over tokens (k1). `kl_k3` sums `ref/pi - 1 + log(pi/ref)` over tokens (k3;
    Schulman 2020, "Approximating KL divergence"). Given the tokens before, the mean of a summand over the
    next token is the KL of that token's distribution, so by the chain rule both sums are unbiased. k3 is
    never negative; its variance is far smaller than that of k1 near the reference, and larger far from it.

    Args:
        logprobs: log-probabilities of the policy that sampled, at the temperature of sampling [N, T].
        ref_logprobs: log-probabilities of the reference, at the same temperature [N, T].
        mask: True on actions [N, T]; elsewhere both tensors may hold anything.

    Returns:
        `kl` and `kl_k3`, each [N].
    """
    log_pi, log_ref = (zero_outside(x.double(), mask) for x in (logprobs, ref_logprobs))
    return {"kl": k1(log_pi, log_ref).sum(dim=1), "kl_k3": k3(log_pi, log_ref).sum(dim=1)}


def prompt_text(prompt: Any) -> str:
    """Return a prompt as a person would type it: the text itself, or the last of its chat messages."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def completion_rows(
    policy: Policy, own: Experience, names: Sequence[str], advantages: Tensor
) -> list[dict[str, Any]]:
    """Return this process's completions with their rewards and advantages, as rows of a table.

    Where each token has an advantage of its own, the row holds that of the first token.
    """
    prompts, rollout, result = own
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    columns = {
        "prompt": [prompts[i][1]["prompt"] for i in rollout.prompt_index.tolist()],
        "completion": texts,
        "reward": result.total.tolist(),
        **{f"rewards/{name}": result.values[:, f].tolist() for f, name in enumerate(names)},
        **result.extra,
        "advantage": (advantages if advantages.ndim == 1 else advantages[:, 0]).tolist(),
        "truncated": rollout.truncated.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
