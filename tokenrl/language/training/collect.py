"""Collects the data of a training step: completions, rewards, and what else the estimator needs.

The functions work on the rows of one process. `refill` replaces groups whose rewards are all equal by groups
of new prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tokenrl.core.rows import zero_spread
from tokenrl.language.rollout.rewarded import reward_rows
from tokenrl.language.rollout.rollout import Rollout, joined
from tokenrl.language.rollout.sampling import Sampling, encode, uniforms
from tokenrl.language.rollout.scoring import score_in_parts, with_missing_fields
from tokenrl.language.training.batch import StepRows

if TYPE_CHECKING:
    from tokenrl.language.rewards.rewards import RewardResult, Rewards
    from tokenrl.language.training.learner import Learner

Prompts = list[tuple[int, Mapping[str, Any]]]  # (place in the stream of prompts, row of the task)
Deal = Callable[[int], Prompts]  # takes a number and returns that many further prompts


class Experience(NamedTuple):
    """This process's part of a step: prompts, their rollout (G rows for each) and its rewards."""

    prompts: Prompts
    rollout: Rollout
    result: RewardResult


def sample(learner: Learner, prompts: Prompts, sampling: Sampling) -> Rollout:
    """Sample completions with the run's generator, and compute what else the estimator needs of a rollout.

    All completions of a training step come from here, and are counted in `learner.generated`.
    """
    estimator = learner.estimator
    prompt_ids = encode(learner.policy, [row["prompt"] for _, row in prompts], sampling)
    draws = uniforms("training", sampling, [place for place, _ in prompts])
    if draws is not None:
        norms, hidden = estimator.needs_score_norms, estimator.needs_values
        sampling = replace(sampling, keep_score_norms=norms, keep_hidden=hidden)
    rollout = learner.generator.generate(prompt_ids, sampling, draws)
    learner.generated += len(rollout.mask)
    if draws is None:  # greedy completions are only rewarded, never learnt from
        return rollout
    return with_missing_fields(
        learner.forward.policy,
        rollout,
        **learner.scoring,
        rows_at_once=rows_at_once(learner, rollout),
        entropy=True,
        score_norms=estimator.needs_score_norms,
        hidden=estimator.needs_values,
    )


def reward(learner: Learner, rewards: Rewards, prompts: Prompts, rollout: Rollout, step: int) -> RewardResult:
    """Reward completions of a step; functions may read the steps done before this one, and steps in all."""
    rows, state = [row for _, row in prompts], {"step": step - 1, "max_steps": learner.args.max_steps}
    return reward_rows(learner.policy, rewards, rows, rollout, **state)


def refill(learner: Learner, rewards: Rewards, sampling: Sampling, own: Experience, more: Deal) -> Experience:
    """Replace groups whose rewards are all equal by groups of new prompts, in up to `max_refills` rounds.

    This is the dynamic sampling of DAPO (arXiv 2503.14476): with a group baseline, such groups have no
    gradient. The metric `refilled` is the number of groups replaced, over all processes.

    Args:
        learner: the policy and the settings.
        rewards: the reward functions.
        sampling: how completions are sampled.
        own: this process's groups.
        more: deals further prompts, the same on every process.
    """
    accelerator, refilled = learner.accelerator, 0
    for _ in range(learner.args.max_refills):
        totals, valid = torch.from_numpy(own.result.total), torch.from_numpy(own.result.valid)
        dead = zero_spread(totals, sampling.group_size, valid).to(accelerator.device)
        counts = accelerator.gather(dead.sum()[None]).tolist()
        if not sum(counts):
            break
        refilled += sum(counts)
        # Every process deals the same prompts and takes those that replace its own groups.
        first = sum(counts[: accelerator.process_index])
        prompts = more(sum(counts))[first:][: counts[accelerator.process_index]]
        if prompts:
            rollout = sample(learner, prompts, sampling)
            result = reward(learner, rewards, prompts, rollout, sampling.step)
            own = _replaced(own, dead, Experience(prompts, rollout, result))
    own.result.metrics["refilled"] = float(refilled)
    return own


def step_rows(learner: Learner, rewards: Rewards, sampling: Sampling, own: Experience) -> StepRows:
    """Return this process's rows, with the numbers that the estimator needs besides rewards."""
    prompts, rollout, result = own
    estimator = learner.estimator

    def column(x: Any) -> Tensor:
        return torch.as_tensor(x, dtype=rollout.logprobs.dtype, device=rollout.logprobs.device)

    ref_logprobs = values = greedy = None
    if estimator.needs_reference:
        with learner.forward.policy.reference_model() as reference:
            ref_logprobs = column(logprobs_under(learner, reference, rollout))
    if learner.critic is not None:
        values = column(learner.critic.values(rollout.hidden).detach())
    if estimator.needs_greedy:
        greedy = column(greedy_rewards(learner, rewards, sampling, prompts))[rollout.prompt_index]
    assert rollout.entropy is not None  # `sample` asks for it
    return StepRows(
        rewards=column(result.total),
        by_function=column(result.values),
        valid=torch.as_tensor(result.valid, device=rollout.logprobs.device),
        truncated=rollout.truncated,
        prompt_length=rollout.prompt_mask.sum(dim=1)[rollout.prompt_index],
        mask=rollout.mask,
        logprobs=rollout.logprobs,
        entropy=rollout.entropy,
        ref_logprobs=ref_logprobs,
        values=values,
        score_norms=rollout.score_norms if estimator.needs_score_norms else None,
        greedy_rewards=greedy,
    )


def old_logprobs(learner: Learner, rollout: Rollout) -> Tensor | None:
    """Return the log-probabilities [n, T] under the policy that sampled, as the scoring pass computes them.

    They are not taken from the rollout, because the generator's numbers may differ by rounding, and the ratio
    of the first update must be exactly 1. None if no update needs them: the estimator has no ratio, or the
    step has a single update, in which the ratio is 1 by definition.
    """
    several = learner.args.num_iterations * learner.args.num_minibatches > 1
    if learner.estimator.needs_old_logprobs and several:
        return logprobs_under(learner, learner.forward.model, rollout)
    return None


def logprobs_under(learner: Learner, model: nn.Module, rollout: Rollout) -> Tensor:
    """Return the log-probabilities [n, T] of this process's rows under a model, without a graph."""
    size = rows_at_once(learner, rollout)
    return score_in_parts(model, rollout, rows_at_once=size, **learner.scoring).logprobs


def rows_at_once(learner: Learner, rollout: Rollout) -> int:
    """Return how many rows a forward pass without a gradient takes: as one with a gradient, at the most."""
    args, size = learner.args, learner.sampling.group_size
    width = rollout.prompt_ids.shape[1] + rollout.completion_ids.shape[1]
    assert args.tokens_per_pass is not None  # `choose_forward` has filled it in
    groups = args.tokens_per_pass // (width * size)
    rows = groups * size if groups else max(1, args.tokens_per_pass // width)
    return min(rows, args.micro_batch_size or rows)


def greedy_rewards(learner: Learner, rewards: Rewards, sampling: Sampling, prompts: Prompts) -> np.ndarray:
    """Return the reward [B] of the greedy completion of each prompt, the baseline of ReMax (2310.10505)."""
    rollout = sample(learner, prompts, replace(sampling, num_generations=0))
    return reward(learner, rewards, prompts, rollout, sampling.step).total


def _replaced(old: Experience, dead: Tensor, new: Experience) -> Experience:
    """Return the old groups, with the new ones in place of those where `dead` [B] is True."""
    n, size = len(old.rollout.mask), len(old.rollout.mask) // len(dead)
    index = torch.arange(n, device=dead.device)
    index[dead.repeat_interleave(size)] = n + torch.arange(len(new.prompts) * size, device=dead.device)
    order = index.cpu().numpy()
    arrays = {
        name: np.concatenate([getattr(old.result, name), getattr(new.result, name)])[order]
        for name in ("values", "total", "valid")
    }
    both = {name: [*old.result.extra[name], *new.result.extra[name]] for name in new.result.extra}
    extra = {name: [column[i] for i in order] for name, column in both.items()}
    return old._replace(
        prompts=old.prompts + new.prompts,
        rollout=joined([old.rollout, new.rollout], index),
        result=replace(new.result, **arrays, extra=extra),
    )
