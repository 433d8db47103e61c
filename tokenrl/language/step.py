"""One training step as a straight line: sample, reward, advantages, loss, update, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.core.baselines import RunningMean
from tokenrl.language.policy import Policy
from tokenrl.language.records import completion_rows, gather_rows, step_metrics
from tokenrl.language.rewards import RewardResult, Rewards
from tokenrl.language.sampling import Rollout, sample, uniforms
from tokenrl.language.scoring import score
from tokenrl.language.update import Learner, Step, update

Row = Mapping[str, Any]
Prompts = Sequence[tuple[int, Row]]  # (place in the stream of prompts, row of the task)


class Record(NamedTuple):
    """What a step leaves behind: metrics, rows for people (made when called), seconds by part."""

    metrics: dict[str, float]
    rows: Callable[[], list[dict[str, Any]]]
    timings: dict[str, float]


def training_step(
    learner: Learner, rewards: Rewards, running_mean: RunningMean, step: int, prompts: Prompts
) -> Record:
    """Sample, reward, update and record once.

    Args:
        learner: the policy and what updates it.
        rewards: the reward functions.
        running_mean: mean reward of earlier steps; read before it is updated, or a reward would enter its own
            baseline.
        step: number of this step, from 1.
        prompts: the whole step's prompts, the same on every process.
    """
    args, estimator, accelerator = learner.args, learner.estimator, learner.accelerator
    times = [time.perf_counter()]
    share = len(prompts) // accelerator.num_processes
    mine = prompts[accelerator.process_index * share :][:share]

    rollout = roll_out(learner, step, mine)
    times.append(time.perf_counter())
    state = {"step": step - 1, "max_steps": args.max_steps or 0}
    result = reward_rows(learner.policy, rewards, [row for _, row in mine], rollout, **state)
    times.append(time.perf_counter())

    reference = reference_logprobs(learner, rollout) if estimator.needs_reference else None
    whole = gather_rows(accelerator, rollout, result, reference)  # N rows, the same on every process
    advantages = estimator.advantages(
        whole["rewards"],
        whole["mask"],
        group_size=args.num_generations,
        valid=whole["valid"],
        logprobs=whole["logprobs"],
        ref_logprobs=whole.get("ref_logprobs"),
        baseline_value=running_mean.value,
    )
    known = Step(rollout, whole["mask"], whole["valid"], advantages, ref_logprobs=reference)
    metrics = step_metrics(whole, rewards.names, args.num_generations or 1) | run_updates(
        learner, known, step
    )
    if estimator.baseline == "running_mean":
        metrics["baseline"] = float(running_mean.value)
        running_mean.update(whole["rewards"], valid=whole["valid"])
    times.append(time.perf_counter())

    own = advantages.policy[accelerator.process_index * len(rollout.mask) :]
    rows = partial(completion_rows, learner.policy, mine, rollout, result, rewards.names, own)
    parts = zip(("sample", "reward", "update"), times, times[1:], strict=False)
    return Record(result.metrics | metrics, rows, {name: after - before for name, before, after in parts})


def roll_out(learner: Learner, step: int, prompts: Prompts) -> Rollout:
    """Sample a group of completions for each of this process's prompts."""
    args, policy = learner.args, learner.policy
    length, generations = args.max_completion_length or 256, args.num_generations or 1
    ids = policy.encode_all(
        [row["prompt"] for _, row in prompts], max_completion_length=length, truncate=args.truncate_prompts
    )
    draws = uniforms(
        args.seed,
        step,
        [place for place, _ in prompts],
        num_generations=generations,
        max_completion_length=length,
    )
    with learner.accelerator.autocast():
        return sample(
            policy,
            ids,
            num_generations=generations,
            max_completion_length=length,
            temperature=args.temperature,
            draws=draws,
        )


def reward_rows(
    policy: Policy, rewards: Rewards, rows: Sequence[Row], rollout: Rollout, **state: Any
) -> RewardResult:
    """Call the rewards on a rollout, with the columns of each row; `state` is passed on."""
    each = [rows[i] for i in rollout.prompt_index.tolist()]
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    ids = [
        row[keep].tolist() for row, keep in zip(rollout.completion_ids.cpu(), rollout.mask.cpu(), strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    columns = {name: [row.get(name) for row in each] for name in names}
    # Rows on which all abstain are judged over the whole step, of which another process may hold the rest.
    return rewards([row["prompt"] for row in each], texts, ids, columns, all_may_abstain=True, **state)


@torch.no_grad()
def score_in_parts(learner: Learner, model: nn.Module, rollout: Rollout) -> Tensor:
    """Log-probabilities [n, T] of this process's rows under a model, without graph."""
    n, width = rollout.mask.shape
    size = learner.args.micro_batch_size or n
    out = rollout.logprobs.new_zeros(n, width)
    for rows in torch.arange(n, device=out.device).split(size):
        part = rollout.rows(rows)
        with learner.accelerator.autocast():
            scores = score(
                model, part, temperature=learner.args.temperature, share_prompt=learner.policy.share_prompt
            )
        out[rows, : part.mask.shape[1]] = scores.logprobs.to(out.dtype)
    return out


def reference_logprobs(learner: Learner, rollout: Rollout) -> Tensor:
    """Log-probabilities [n, T] under the reference policy."""
    with learner.policy.reference_model() as reference:
        return score_in_parts(learner, reference, rollout)


def run_updates(learner: Learner, step: Step, number: int) -> dict[str, float]:
    """All updates of a rollout: `num_iterations` passes in `num_minibatches` parts, groups kept whole.

    Returns:
        Means of the updates' metrics.
    """
    args = learner.args
    n, groups = len(step.mask), len(step.mask) // (args.num_generations or 1)
    if learner.estimator.needs_old_logprobs and args.num_iterations * args.num_minibatches > 1:
        step = step._replace(old_logprobs=score_in_parts(learner, learner.policy.model, step.rollout))
    generator = torch.Generator().manual_seed(((args.seed << 32) + number) % 2**63)
    history = []
    for _ in range(args.num_iterations):
        order = (
            torch.randperm(groups, generator=generator) if args.num_minibatches > 1 else torch.arange(groups)
        )
        for part in order.tensor_split(args.num_minibatches):
            chosen = torch.zeros(groups, dtype=torch.bool)
            chosen[part] = True
            rows = chosen.repeat_interleave(n // groups).to(step.mask.device)
            history.append(update(learner, step, rows))
    return {name: sum(m[name] for m in history) / len(history) for name in history[0]}
