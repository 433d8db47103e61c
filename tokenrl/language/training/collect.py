"""What `training_step` asks for before the update: completions, new ones for dead groups, and other numbers.

All of it is about the rows of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tokenrl.core.rows import zero_spread
from tokenrl.language.rewards.rewards import RewardResult, Rewards
from tokenrl.language.rollout.judged import reward_rows
from tokenrl.language.rollout.rollout import Rollout, joined
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.scoring import completed, score_in_parts
from tokenrl.language.rollout.streams import uniforms
from tokenrl.language.training.processes import StepRows
from tokenrl.language.training.update import Learner

Prompts = list[tuple[int, Mapping[str, Any]]]  # (place in the stream of prompts, row of the task)
Deal = Callable[[int], Prompts]  # deals so many further prompts


class Experience(NamedTuple):
    """This process's part of a step: prompts, their completions in groups, and the rewards of these."""

    prompts: Prompts
    rollout: Rollout
    result: RewardResult


def sample(learner: Learner, prompts: Prompts, sampling: Sampling) -> Rollout:
    """Completions of prompts by the run's generator, with all that this estimator asks of a rollout."""
    estimator = learner.estimator
    prompt_ids = encode(learner.policy, [row["prompt"] for _, row in prompts], sampling)
    draws = uniforms("training", sampling, [place for place, _ in prompts])
    with learner.accelerator.autocast():
        rollout = learner.generator.generate(prompt_ids, sampling, draws)
        if draws is None:  # of greedy completions only the reward is asked
            return rollout
        return completed(
            learner.policy,
            rollout,
            sampling.temperature,
            entropy=True,
            score_norms=estimator.needs_score_norms,
            hidden=estimator.needs_values,
            rows_at_once=learner.args.micro_batch_size,
        )


def trainer_state(learner: Learner, step: int) -> dict[str, int]:
    """What rewards that ask for `trainer_state` learn of the run: steps done before this one, of how many."""
    return {"step": step - 1, "max_steps": learner.args.max_steps}


def refill(learner: Learner, rewards: Rewards, sampling: Sampling, own: Experience, more: Deal) -> Experience:
    """Sample new prompts in place of groups in which all rewards are equal, up to `max_refills` times.

    This is the dynamic sampling of DAPO (arXiv 2503.14476): such groups teach a group baseline nothing. The
    metric `refilled` says how many groups were replaced, over all processes.

    Args:
        learner: the policy and the settings.
        rewards: the reward functions.
        sampling: how to sample.
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
        first = sum(counts[: accelerator.process_index])
        prompts = more(sum(counts))[first:][: counts[accelerator.process_index]]
        if prompts:
            rollout = sample(learner, prompts, sampling)
            state = trainer_state(learner, sampling.step)
            result = reward_rows(learner.policy, rewards, [row for _, row in prompts], rollout, **state)
            own = _replaced(own, dead, Experience(prompts, rollout, result))
    own.result.metrics["refilled"] = float(refilled)
    return own


def step_rows(learner: Learner, rewards: Rewards, sampling: Sampling, own: Experience) -> StepRows:
    """This process's rows, with what the estimator asks for besides rewards."""
    prompts, rollout, result = own
    estimator = learner.estimator

    def column(x: Any) -> Tensor:
        return torch.as_tensor(x, dtype=rollout.logprobs.dtype, device=rollout.logprobs.device)

    ref_logprobs = values = greedy = None
    if estimator.needs_reference:
        with learner.policy.reference_model() as reference:
            ref_logprobs = column(logprobs_under(learner, reference, rollout))
    if learner.critic is not None:
        values = column(learner.critic.values(rollout.hidden).detach())
    if estimator.needs_greedy:
        greedy = column(greedy_rewards(learner, rewards, sampling, prompts))[rollout.prompt_index]
    assert rollout.entropy is not None  # `sample` has it computed
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
    """Log-probabilities [n, T] under the policy that sampled, as the trainer computes them.

    None where no update needs them: without a ratio, or if the only update is that of this very policy, whose
    ratio is 1.
    """
    several = learner.args.num_iterations * learner.args.num_minibatches > 1
    if learner.estimator.needs_old_logprobs and several:
        return logprobs_under(learner, learner.policy.model, rollout)
    return None


def logprobs_under(learner: Learner, model: nn.Module, rollout: Rollout) -> Tensor:
    """Log-probabilities [n, T] of this process's rows under a model, without graph."""
    size = learner.args.micro_batch_size
    with learner.accelerator.autocast():
        return score_in_parts(model, rollout, rows_at_once=size, **learner.scoring).logprobs


def greedy_rewards(learner: Learner, rewards: Rewards, sampling: Sampling, prompts: Prompts) -> np.ndarray:
    """Reward [B] of the greedy completion of each prompt."""
    rollout = sample(learner, prompts, replace(sampling, num_generations=0, keep_hidden=False))
    state = trainer_state(learner, sampling.step)
    return reward_rows(learner.policy, rewards, [row for _, row in prompts], rollout, **state).total


def _replaced(old: Experience, dead: Tensor, new: Experience) -> Experience:
    """The old groups, with new ones in the places of those that are dead [B]."""
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
        rollout=joined(old.rollout, new.rollout, index),
        result=replace(new.result, **arrays, extra=extra),
    )
