"""What a step learns from: completions with their rewards, in place of dead groups those of new prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tokenrl.core import rows as core_rows
from tokenrl.language.rewards.rewards import RewardResult, Rewards
from tokenrl.language.rollout.judged import Row, reward_rows
from tokenrl.language.rollout.rollout import Rollout, joined
from tokenrl.language.rollout.sampling import sample
from tokenrl.language.rollout.scoring import score
from tokenrl.language.rollout.streams import uniforms
from tokenrl.language.training.update import Learner

Prompts = Sequence[tuple[int, Row]]  # (place in the stream of prompts, row of the task)


class Experience(NamedTuple):
    """This process's part of a step.

    Attributes:
        prompts: the prompts that rows of the rollout continue.
        rollout: their completions, in groups.
        result: the rewards.
        refilled: groups of equal rewards that were replaced, over all processes.
    """

    prompts: list[tuple[int, Row]]
    rollout: Rollout
    result: RewardResult
    refilled: int


def collect(
    learner: Learner, rewards: Rewards, step: int, prompts: Prompts, more: Callable[[int], Prompts]
) -> Experience:
    """Sample and reward this process's share of the prompts.

    With `zero_spread="refill"` a group in which all rewards are equal gives its place to a new prompt, up to
    `max_refills` times (dynamic sampling of DAPO, arXiv 2503.14476).

    Args:
        learner: the policy and the settings.
        rewards: the reward functions.
        step: number of this step, from 1.
        prompts: the whole step's prompts, the same on every process.
        more: deals further prompts, the same on every process.
    """
    args, accelerator = learner.args, learner.accelerator
    share = len(prompts) // accelerator.num_processes
    mine = list(prompts[accelerator.process_index * share :][:share])
    out = Experience(mine, *_sampled(learner, rewards, step, mine), refilled=0)
    if learner.estimator.zero_spread != "refill":
        return out
    for _ in range(args.max_refills):
        totals, valid = torch.from_numpy(out.result.total), torch.from_numpy(out.result.valid)
        dead = core_rows.zero_spread(totals, args.num_generations, valid).to(accelerator.device)
        counts = accelerator.gather(dead.sum()[None]).tolist()
        if not sum(counts):
            break
        fresh = more(sum(counts))
        rank = accelerator.process_index
        own = list(fresh[sum(counts[:rank]) :][: counts[rank]])
        if own:
            out = _replaced(out, dead, own, *_sampled(learner, rewards, step, own))
        out = out._replace(refilled=out.refilled + sum(counts))
    return out


def inputs(
    learner: Learner, rewards: Rewards, step: int, prompts: Prompts, rollout: Rollout
) -> dict[str, Tensor | None]:
    """What `Estimator.advantages` needs beside rewards, of this process's rows; None for what it does not."""
    estimator, critic = learner.estimator, learner.critic
    found: dict[str, Tensor | None] = dict.fromkeys(
        ("ref_logprobs", "values", "score_norms", "greedy_rewards")
    )
    if estimator.needs_reference:
        found["ref_logprobs"] = reference_logprobs(learner, rollout)
    if critic is not None:
        found["values"] = critic.values(rollout.hidden).detach()
    if estimator.needs_score_norms:
        found["score_norms"] = rollout.score_norms
    if estimator.needs_greedy:
        found["greedy_rewards"] = greedy_rewards(learner, rewards, step, prompts, rollout.prompt_index)
    return found


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


def greedy_rewards(learner: Learner, rewards: Rewards, step: int, prompts: Prompts, index: Tensor) -> Tensor:
    """Reward [n] of the greedy completion of each row's prompt; `index` [n] says which prompt that is."""
    _, result = _sampled(learner, rewards, step, prompts, greedy=True)
    return torch.as_tensor(result.total, device=index.device)[index]


def _sampled(
    learner: Learner, rewards: Rewards, step: int, prompts: Prompts, *, greedy: bool = False
) -> tuple[Rollout, RewardResult]:
    """A group of completions for each prompt, or the greedy one, and their rewards."""
    args, policy, rows = learner.args, learner.policy, [row for _, row in prompts]
    length = args.max_completion_length
    shape = {
        "num_generations": 1 if greedy else args.num_generations,
        "max_completion_length": length,
    }
    ids = policy.encode_all(
        [row["prompt"] for row in rows], max_completion_length=length, truncate=args.truncate_prompts
    )
    with learner.accelerator.autocast():
        rollout = sample(
            policy,
            ids,
            temperature=args.temperature,
            draws=None if greedy else uniforms(args.seed, step, [place for place, _ in prompts], **shape),
            keep_hidden=learner.estimator.needs_values and not greedy,
            **shape,
        )
    return rollout, reward_rows(policy, rewards, rows, rollout, step=step - 1, max_steps=args.max_steps)


def _replaced(
    old: Experience, dead: Tensor, prompts: list[tuple[int, Row]], rollout: Rollout, result: RewardResult
) -> Experience:
    """The old groups, with new ones in the places of those that are dead [B]."""
    n, size = len(old.rollout.mask), len(old.rollout.mask) // len(dead)
    index = torch.arange(n, device=dead.device)
    index[dead.repeat_interleave(size)] = n + torch.arange(len(prompts) * size, device=dead.device)
    order = index.cpu().numpy()
    arrays = {
        name: np.concatenate([getattr(old.result, name), getattr(result, name)])[order]
        for name in ("values", "total", "valid")
    }
    both = {name: [*old.result.extra[name], *result.extra[name]] for name in result.extra}
    extra = {name: [column[i] for i in order] for name, column in both.items()}
    return old._replace(
        prompts=old.prompts + prompts,
        rollout=joined(old.rollout, rollout, index),
        result=replace(result, **arrays, extra=extra),
    )
