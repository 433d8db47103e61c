"""Collects the rows of a training step and reports on them.

One process samples its completions, rewards them and adds what the estimator compares them with. `refill`
replaces groups whose rewards are all equal by groups of new prompts. The report is the metrics of the step
and a table of its completions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenrl.core.rows import from_first, zero_spread
from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Refused
from tokenrl.language.rollout.rewarded import (
    completion_kl,
    prompts_of,
    reward_rows,
    sample_rows,
    texts_of,
)
from tokenrl.language.rollout.rollout import Rollout, cat, lengths
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import score_in_parts, with_missing_fields
from tokenrl.runs.files import canonical
from tokenrl.runs.processes import gather_numbers, gather_objects

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.rewards.environments import Environments
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.rollout.distribution import Distribution
    from tokenrl.language.training.learner import Learner

Prompts = list[tuple[int, Mapping[str, Any]]]  # (number in the stream of prompts, row of the task)
DrawPrompts = Callable[[int], Prompts]  # takes a number and returns that many further prompts


def sample(
    learner: Learner, prompts: Prompts, sampling: Sampling, environments: Environments | None
) -> Rollout:
    """Sample completions with the run's generator, and compute the columns that the estimator needs."""
    estimator, greedy = learner.estimator, not sampling.num_generations
    if not greedy:
        norms, hidden = estimator.needs_score_norms, estimator.needs_values
        sampling = replace(sampling, keep_score_norms=norms, keep_hidden=hidden)
        sampling = replace(sampling, keep_distribution=estimator.needs_centres)
    rollout = sample_rows(
        learner.policy, learner.generator, prompts, sampling, "training", environments
    )
    if greedy:  # greedy completions are only rewarded, never learnt from
        return rollout
    if estimator.needs_centres and rollout.sampling_distribution is None:
        raise Refused(
            "importance_centre needs the sampler's probability of every token, and this generator returns "
            "none: its Rollout has no sampling_distribution. Set importance_centre to False, or return it."
        )
    return with_missing_fields(
        learner.forward.policy,
        rollout,
        **learner.scoring,
        rows_at_once=rows_at_once(learner, rollout),
        logprobs=True,
        entropy=True,
        score_norms=estimator.needs_score_norms,
        hidden=estimator.needs_values,
    )


def collect_rows(
    learner: Learner, rewards: Rewards, prompts: Prompts, sampling: Sampling
) -> Rollout:
    """Sample completions of a step and reward them.

    Reward functions can read how many steps are done, and how many there will be.
    """
    rows = sample(learner, prompts, sampling, rewards.environments)
    state = {"step": sampling.step - 1, "max_steps": learner.args.max_steps}
    return reward_rows(learner.policy, rewards, rows, **state)


def refill(
    learner: Learner, rewards: Rewards, sampling: Sampling, rows: Rollout, draw_prompts: DrawPrompts
) -> Rollout:
    """Replace groups whose rewards are all equal by groups of new prompts, in up to `max_refills` rounds.

    This is the dynamic sampling of DAPO (arXiv 2503.14476): with a group baseline, such groups have no
    gradient. The metric `refilled` is the number of groups replaced, over all processes.

    Args:
        learner: the policy and the settings.
        rewards: the reward functions.
        sampling: how completions are sampled.
        rows: this process's groups.
        draw_prompts: gives further prompts, the same on every process.
    """
    accelerator, size, refilled = learner.accelerator, sampling.group_size, 0
    for _ in range(learner.args.max_refills):
        dead = zero_spread(rows.rewards, size, rows.valid)
        counts = gather_numbers(accelerator, dead.sum())
        if not sum(counts):
            break
        refilled += sum(counts)
        # Every process draws the same prompts and takes those that replace its own groups.
        first = sum(counts[: accelerator.process_index])
        prompts = draw_prompts(sum(counts))[first:][: counts[accelerator.process_index]]
        if prompts:
            new = collect_rows(learner, rewards, prompts, sampling)
            order = torch.arange(len(rows))
            order[dead.repeat_interleave(size)] = len(rows) + torch.arange(len(new))
            rows = cat([rows, new]).take(order)
    count = ({"refilled": float(refilled)}, 1)  # the same number on every process
    return replace(rows, logged=(*rows.logged, count))


def with_estimates(
    learner: Learner, rewards: Rewards, sampling: Sampling, rows: Rollout
) -> Rollout:
    """Return the rows with what the estimator needs: reference, critic's values, greedy rewards, keys."""
    estimator, columns = learner.estimator, dict[str, Any]()
    if estimator.needs_reference:
        with learner.forward.policy.reference_model() as reference:
            columns["ref_logprobs"] = logprobs_under(
                learner, reference, rows, learner.sampling.whole
            )
    if learner.critic is not None:
        columns["values"] = learner.critic.values(rows.hidden).detach()
    if estimator.needs_greedy:
        columns["greedy_rewards"] = greedy_rewards(learner, rewards, sampling, rows)
    columns = {name: x.to(rows.logprobs) for name, x in columns.items()}
    if estimator.needs_memory:
        columns["keys"] = data_keys(rows.data)
    return replace(rows, **columns)


def data_keys(data: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return a number of 63 bits for each row of the data, from a hash of all its columns [n]."""
    texts = (canonical(row) for row in data)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest[:8], "big") >> 1 for digest in digests])


def old_logprobs(learner: Learner, rows: Rollout) -> Tensor | None:
    """Return the log-probabilities [n, T] under the policy that sampled, as the scoring pass computes them.

    They are not taken from the rollout, because the generator's numbers may differ by rounding, and the ratio
    of the first update must be exactly 1. None if no update needs them: the estimator has no ratio, or the
    step has a single update, in which the ratio is 1 by definition.
    """
    several = learner.args.num_iterations * learner.args.num_minibatches > 1
    if learner.estimator.needs_old_logprobs and several:
        return logprobs_under(learner, learner.forward.model, rows)
    return None


def logprobs_under(
    learner: Learner, model: nn.Module, rows: Rollout, distribution: Distribution | None = None
) -> Tensor:
    """Return the log-probabilities [n, T] of this process's rows under a model, without a graph.

    Args:
        learner: says how models are scored.
        model: the model.
        rows: this process's rows.
        distribution: the distribution of tokens; None for that of sampling.
    """
    options = (
        learner.scoring
        if distribution is None
        else learner.scoring | {"distribution": distribution}
    )
    return score_in_parts(model, rows, rows_at_once=rows_at_once(learner, rows), **options).logprobs


def rows_at_once(learner: Learner, rows: Rollout) -> int:
    """Return how many rows a forward pass without a gradient takes: at most those of one with a gradient."""
    size, tokens = learner.sampling.group_size, learner.forward.tokens
    width = rows.prompt_ids.shape[1] + rows.completion_ids.shape[1]
    groups = tokens // (width * size)
    most = groups * size if groups else max(1, tokens // width)
    return min(most, learner.args.micro_batch_size or most)


def greedy_rewards(learner: Learner, rewards: Rewards, sampling: Sampling, rows: Rollout) -> Tensor:
    """Return the reward [n] of the greedy completion of each row's prompt, for ReMax (arXiv 2310.10505)."""
    size = sampling.group_size
    prompts = list(zip(rows.prompt_index.tolist(), rows.data, strict=True))[::size]
    greedy = collect_rows(learner, rewards, prompts, replace(sampling, num_generations=0))
    return greedy.rewards.repeat_interleave(size)


def averaged(logged: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Average what rewards logged over calls and processes, by rows; every process has to call this."""
    values: dict[str, list[float]] = {}
    for means, count in gather_objects(list(logged)):
        for name, value in means.items():
            values.setdefault(name, []).extend([value] * count)
    return {name: mean(each) for name, each in values.items()}


def step_metrics(rows: Rollout, names: Sequence[str], group_size: int) -> dict[str, float]:
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
    counts, tokens = mask.sum(dim=1).double(), mask.sum().clamp(min=1)
    # With one completion per prompt there are no groups to compare, so the whole step is taken as one group.
    size = group_size if group_size > 1 else len(rewards)
    differences, _ = from_first(rewards.view(-1, size), valid.view(-1, size))
    rewarded = rewards[valid].double()
    means = rewards.double().masked_fill(~valid, math.nan).view(-1, group_size).nanmean(dim=1)
    errors = {"reward": mean_and_error(means[~means.isnan()])[1]}
    metrics = {
        "reward": rewarded.mean(),
        "reward_std": rewarded.std(correction=min(1, len(rewarded) - 1)),
        "frac_reward_zero_std": (differences == 0).all(dim=1).double().mean(),
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
        values = values[~values.isnan()]
        if len(values):
            metrics[f"rewards/{name}/mean"] = values.mean()
            metrics[f"rewards/{name}/std"] = values.std(correction=min(1, len(values) - 1))
    return {name: float(value) for name, value in metrics.items()}


def completion_rows(policy: Policy, rows: Rollout, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return this process's completions with their rewards and advantages, as rows of a table.

    A row also has the columns of its prompt's row, such as the right answer, but for names that it uses
    itself. The reward is None where every function abstained, as from an episode that failed. Where each
    token has an advantage of its own, the row holds that of the first token.
    """
    advantages = rows.advantages if rows.advantages.ndim == 1 else rows.advantages[:, 0]
    rewarded = zip(rows.rewards.tolist(), rows.valid.tolist(), strict=True)
    data = dict.fromkeys(name for row in rows.data for name in row)
    logs = dict.fromkeys(
        name for row in rows.logs for name in row
    )  # of some calls a function logs none
    columns: dict[str, Any] = {
        **{name: [row.get(name) for row in rows.data] for name in data},
        "prompt": prompts_of(policy, rows),
        "completion": texts_of(policy, rows),
        "reward": [x if valid else None for x, valid in rewarded],
        **{f"rewards/{name}": rows.by_function[:, f].tolist() for f, name in enumerate(names)},
        **{name: [row.get(name) for row in rows.logs] for name in logs},
        "advantage": advantages.tolist(),
        "truncated": rows.truncated.tolist(),
    }
    if rows.messages is not None:
        columns |= {"ending": rows.endings, "messages": rows.messages}
        columns |= {"failure": [failure or None for failure in rows.failures]}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
