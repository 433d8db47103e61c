"""Computes the metrics of a training step, and the table of its completions.

The metrics of sampling say how far the sampler's log-probabilities are from the trainer's, at the first update
of a step. A generator with weights or arithmetic of its own (another engine, another precision) samples from
a policy that is not quite the one that is trained, and so does one that leaves tokens out unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.rows import from_first
from tokenrl.core.statistics import mean_and_error
from tokenrl.language.policy.stops import decoded
from tokenrl.language.rollout.rewarded import (
    Rewarded,
    completion_kl,
    prompt_text,
    prompts_of,
    texts_of,
)
from tokenrl.language.rollout.rollout import lengths, to_host
from tokenrl.runs.processes import all_reduce_sum, gather_objects

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.training.learner import Learner
    from tokenrl.language.training.rows import Experience


def averaged(logged: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Average what rewards logged over calls and processes, by rows; every process has to call this."""
    values: dict[str, list[float]] = {}
    for means, count in gather_objects(list(logged)):
        for name, value in means.items():
            values.setdefault(name, []).extend(repeat(value, count))
    return {name: mean(rows) for name, rows in values.items()}


def step_metrics(rows: Experience, names: Sequence[str], group_size: int) -> dict[str, float]:
    """Compute the metrics of the step's rows, under TRL's names.

    `frac_reward_zero_std` is the share of groups in which all rewards are equal; with a group baseline they
    have no gradient. `reward_stderr` is the standard error of `reward` over prompts; it is missing with a
    single prompt. `entropy` is the mean over sampled tokens, in nats. `kl` and `kl_k3` are the means over
    completions of both estimates of `completion_kl`, with standard errors over prompts. The run adds
    `num_samples`, the number of completions generated so far, greedy and replaced ones included, and adds up
    `num_tokens`, the tokens of prompts and of the completions learnt from.

    Args:
        rows: all N rows of the step; replayed ones are left out.
        names: names of the F reward functions; without any, the metrics of rewards are left out.
        group_size: new completions per prompt.
    """
    if rows.replayed.any():
        rows = rows.take((~rows.replayed).nonzero().flatten())
    rewards = rows.rewards
    valid = rows.valid
    mask = rows.mask
    counts = mask.sum(dim=1).double()
    tokens = mask.sum().clamp(min=1)
    # With one completion per prompt there are no groups to compare, so the whole step is taken as one group.
    size = group_size if group_size > 1 else len(rewards)
    differences, _ = from_first(rewards.view(-1, size), valid.view(-1, size))
    rewarded = rewards[valid].double()
    means = rewards.double().masked_fill(~valid, math.nan).view(-1, group_size).nanmean(dim=1)
    metrics = dict[str, Tensor]()
    errors = dict[str, Tensor]()
    if names:
        errors["reward"] = mean_and_error(means[~means.isnan()])[1]
        metrics["reward"] = rewarded.mean()
        metrics["reward_std"] = rewarded.std(correction=min(1, len(rewarded) - 1))
        metrics["frac_reward_zero_std"] = (differences == 0).all(dim=1).double().mean()
    # Equal prompts with equal completions are one of both; the mask tells completions of padding apart.
    texts = torch.cat([rows.prompt_ids, rows.completion_ids.masked_fill(~mask, -1)], dim=1)
    metrics |= {
        "completions/unique": torch.tensor(len(texts.unique(dim=0)) / len(texts)),
        "entropy": (rows.entropy * mask).double().sum() / tokens,
        "completions/mean_length": counts.mean(),
        "completions/min_length": counts.min(),
        "completions/max_length": counts.max(),
        "completions/clipped_ratio": rows.truncated.double().mean(),
        "num_tokens": lengths(mask).sum() + rows.prompt_mask.sum(),
    }
    if rows.ref_logprobs is not None:
        for name, values in completion_kl(rows.logprobs, rows.ref_logprobs, mask).items():
            metrics[name], errors[name] = mean_and_error(values, group_size)
    metrics |= {f"{name}_stderr": error for name, error in errors.items() if not error.isnan()}
    if len(rewarded) < len(rewards):
        metrics["frac_rows_abstained"] = 1 - valid.double().mean()
    for column, name in enumerate(names):
        values = rows.by_function[:, column].double()
        metrics[f"rewards/{name}/abstained"] = values.isnan().double().mean()
        values = values[~values.isnan()]
        if len(values):
            metrics[f"rewards/{name}/mean"] = values.mean()
            metrics[f"rewards/{name}/std"] = values.std(correction=min(1, len(values) - 1))
    return {name: float(value) for name, value in metrics.items()}


def completion_rows(
    policy: Policy,
    rows: Rewarded,
    names: Sequence[str],
    advantages: Tensor,
    teacher_prompts: Sequence[list[int]] | None = None,
) -> list[dict[str, Any]]:
    """Return this process's completions with their rewards and advantages, as rows of a table.

    A row also has the columns of its prompt's row, such as the right answer, but for names that it uses
    itself, and the prompt of a teacher that reads another one, special tokens included. The reward is None
    without functions, and where all abstained, as from a failed episode. Where each token has an advantage of
    its own, the row holds that of the first token.
    """
    if advantages.ndim == 2:
        advantages = advantages[:, 0]
    rewards = rows.rewards.tolist()
    columns: dict[str, Any] = {
        **_columns(rows.data),
        "prompt": prompts_of(policy, rows, rows.data),
        "completion": texts_of(policy, rows),
        "reward": [
            x if rewarded and names else None
            for x, rewarded in zip(rewards, rows.valid, strict=True)
        ],
    }
    for name, values in zip(names, rows.by_function.T.tolist(), strict=True):
        columns[f"rewards/{name}"] = values
    columns |= _columns(rows.logs)
    if teacher_prompts is not None:
        tokenizer = policy.tokenizer
        columns["teacher_prompt"] = decoded(tokenizer, teacher_prompts, skip_special_tokens=False)
    if rows.replayed.any():
        columns["replayed"] = rows.replayed.tolist()
    columns |= {"advantage": advantages.tolist(), "truncated": rows.truncated.tolist()}
    if rows.messages is not None:
        columns |= {"ending": rows.endings, "messages": rows.messages}
        columns["failure"] = [failure or None for failure in rows.failures]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return a list for each name that a row has, with None for the rows that lack it."""
    names = {name: None for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in names}


def mismatch_metrics(rows: Experience, parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return how far the sampler is from the policy, over the rows of all processes, each of which has to call this.

    A completion has the weight w, the exponential of the sum over its tokens of `log pi - log mu`, where pi is
    the trainer's probability and mu the sampler's. With w the gradient would be
    that of the policy on the sampler's rows. Its mean is 1 in expectation, if the sampler can draw whatever
    the policy can, and else the policy's probability of what the sampler keeps.

    Args:
        rows: the rows of this process; replayed ones count nowhere.
        parts: the numbers of the rows of each micro-batch [n], with their log-probabilities under the policy that
            is trained [n, T], on its device.

    Returns:
        `sampling/logp_difference/mean` and `sampling/logp_difference/max` over tokens, in nats and without
        sign; `sampling/effective_sample_size`, `(sum w)^2 / (N sum w^2)`, the share of the N rows that as
        many rows of the policy's own would be worth; and `sampling/kept_mass`, the mean of w, at most 1. They are
        those of the rows that the first update learns from; none if there are no such rows.
    """
    host = to_host(logprobs for _, logprobs in parts)
    local: list[list[float]] = []
    actions = rows.mask & ~rows.replayed[:, None]
    for (index, _), logprobs in zip(parts, host, strict=True):
        width = logprobs.shape[1]
        mask = actions[index, :width]
        gaps = logprobs - rows.sampling_logprobs[index, :width]  # log pi / mu
        gaps = torch.where(mask, gaps, 0).double()
        sizes = gaps.abs()
        numbers = (gaps.sum(1), sizes.sum(1), sizes.amax(1), mask.sum(1))
        local += torch.stack(numbers, dim=1).tolist()
    everywhere = gather_objects(local)
    if not everywhere:
        return {}
    ratios, sums, largest, tokens = torch.tensor(everywhere, dtype=torch.float64).T
    log_total = ratios.logsumexp(0)
    effective = float((2 * log_total - (2 * ratios).logsumexp(0)).exp())
    return {
        "sampling/logp_difference/mean": float(sums.sum() / tokens.sum().clamp(min=1)),
        "sampling/logp_difference/max": float(largest.max()),
        "sampling/effective_sample_size": effective / len(everywhere),
        "sampling/kept_mass": min(1.0, float((log_total - math.log(len(everywhere))).exp())),
    }


def loss_statistics(learner: Learner, loss: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the loss of a micro-batch and counts of its tokens [5].

    These are the columns that its completions were computed to, those that belong to a token, its tokens beyond
    the bounds, and all that it learns from. The inputs are those of `Estimator.loss`.
    """
    mask = inputs["mask"]
    columns = torch.stack([torch.ones_like(mask).sum(), lengths(mask).sum()])
    counts = torch.zeros(2, dtype=torch.int64, device=loss.device)
    if learner.estimator.chosen("ratio").token_bounds:
        learnt = inputs["weights"] != 0
        terms = (inputs[name] for name in ("logprobs", "old_logprobs", "advantages"))
        beyond = learner.estimator.beyond_bounds(*terms) & learnt
        counts = torch.stack([beyond.sum(), learnt.sum()])
    return torch.cat([loss.detach()[None], columns, counts])


def update_metrics(learner: Learner, parts: Sequence[Tensor], norm: float) -> dict[str, float]:
    """Return the metrics of an update.

    Args:
        learner: the settings.
        parts: what `loss_statistics` returned for the micro-batches of this process.
        norm: norm of the gradient before clipping.

    Returns:
        `loss`; `grad_norm`; `grad_clipped`, 1 if the gradient was clipped, else 0; `padding`, the share of the
        completions' columns that were computed and belong to no token; and `clip_ratio`, the share of tokens whose
        ratio is outside the clip range, or that 'trust' drops, for ratios with a bound per token.
    """
    sums = sum(parts, torch.zeros(5, dtype=torch.float64)).float()
    sums = all_reduce_sum(learner.accelerator, sums).cpu()
    loss, columns, tokens, beyond, learnt = sums
    metrics = {
        "loss": float(loss),
        "grad_norm": norm,
        "grad_clipped": float(norm > learner.largest_norm),
        "padding": float((columns - tokens) / columns.clamp(min=1)),
    }
    if learner.estimator.chosen("ratio").token_bounds:
        metrics["clip_ratio"] = float(beyond / learnt.clamp(min=1))
    return metrics


def examples(rows: list[dict[str, Any]], group: int) -> list[dict[str, Any]]:
    """Choose the best and the worst completion of each of the first two groups, as an example for people."""
    chosen = []
    for start in (0, group):
        members = rows[start : start + group]
        ranked = [row for row in members if row["reward"] is not None] or members[:1]
        ranked.sort(key=lambda row: row["reward"])
        chosen += [*ranked[-1:], *ranked[:-1][:1]]
    return [row | {"prompt": prompt_text(row["prompt"])} for row in chosen]
