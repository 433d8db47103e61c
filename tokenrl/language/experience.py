"""What a step learns from: completions with their rewards, in place of dead groups those of new prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenrl.core import rows as core_rows
from tokenrl.language.policy import Policy
from tokenrl.language.rewards import RewardResult, Rewards
from tokenrl.language.sampling import Rollout, sample, uniforms
from tokenrl.language.scoring import score
from tokenrl.language.update import Learner

Row = Mapping[str, Any]
Prompts = Sequence[tuple[int, Row]]  # (place in the stream of prompts, row of the task)


STREAMS = {
    "evaluation": 2**63,
    "measurement": 2**62,
    "probe": 2**62 + 2**61,
    "difficulty": 2**61,
    "preferences": 2**60,
}
"""Added to the seed: what is sampled for another purpose than training has random numbers of its own."""


class Judged(NamedTuple):
    """Completions of some prompts with their rewards; `places` are the prompts' numbers."""

    places: range
    rollout: Rollout
    result: RewardResult


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


def reward_rows(
    policy: Policy, rewards: Rewards, rows: Sequence[Row], rollout: Rollout, **state: Any
) -> RewardResult:
    """Call the rewards on a rollout, with the columns of each row; `state` is passed on."""
    each = [rows[i] for i in rollout.prompt_index.tolist()]
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    pairs = zip(rollout.completion_ids.cpu(), rollout.mask.cpu(), strict=True)
    ids = [row[keep].tolist() for row, keep in pairs]
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    columns = {name: [row.get(name) for row in each] for name in names}
    # Rows on which all abstain are judged over the whole step, of which another process may hold the rest.
    return rewards([row["prompt"] for row in each], texts, ids, columns, all_may_abstain=True, **state)


def judged(
    policy: Policy,
    prompts: Sequence[Row],
    rewards: Rewards,
    *,
    stream: str,
    num_generations: int,
    max_completion_length: int,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    truncate_prompts: bool = False,
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Judged]:
    """Sample completions of prompts batch by batch and reward them, outside training.

    Args:
        policy: sampled from.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        stream: whose random numbers, a name in `STREAMS`.
        num_generations: completions a prompt; 0 is the greedy one.
        max_completion_length: most tokens a completion may have.
        temperature: of sampling.
        seed: of sampling.
        step: passed to the rewards.
        truncate_prompts: drop tokens from the left of prompts too long.
        batch_size: completions in one batch; changes memory only.
        rank: number of this process, which takes every `world`-th prompt.
        world: processes that share the prompts.
    """
    ids = policy.encode_all(
        [row["prompt"] for row in prompts],
        max_completion_length=max_completion_length,
        truncate=truncate_prompts,
    )
    shape: dict[str, Any] = {
        "num_generations": max(1, num_generations),
        "max_completion_length": max_completion_length,
    }
    size = max(1, batch_size // shape["num_generations"])
    for start in range(rank, len(prompts), world * size):
        places = range(start, min(start + world * size, len(prompts)), world)
        draws = uniforms(STREAMS[stream] + seed, 0, places, **shape) if num_generations else None
        rollout = sample(policy, [ids[i] for i in places], temperature=temperature, draws=draws, **shape)
        result = reward_rows(policy, rewards, [prompts[i] for i in places], rollout, step=step)
        yield Judged(places, rollout, result)


def _sampled(
    learner: Learner, rewards: Rewards, step: int, prompts: Prompts, *, greedy: bool = False
) -> tuple[Rollout, RewardResult]:
    """A group of completions for each prompt, or the greedy one, and their rewards."""
    args, policy, rows = learner.args, learner.policy, [row for _, row in prompts]
    length = args.max_completion_length or 256
    shape = {
        "num_generations": 1 if greedy else args.num_generations or 1,
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
    return rollout, reward_rows(policy, rewards, rows, rollout, step=step - 1, max_steps=args.max_steps or 0)


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
        rollout=_joined(old.rollout, rollout, index),
        result=replace(result, **arrays, extra=extra),
    )


def _joined(old: Rollout, new: Rollout, index: Tensor) -> Rollout:
    """Rows `index` of two rollouts laid end to end, with the prompts of both."""

    def rows(name: str) -> Tensor | None:
        a, b = getattr(old, name), getattr(new, name)
        if a is None:
            return None
        if a.ndim > 1:  # completions are padded on the right
            width = max(a.shape[1], b.shape[1])
            tail = (0, 0) * (a.ndim - 2)
            a, b = (pad(x, (*tail, 0, width - x.shape[1])) for x in (a, b))
        return torch.cat([a, b])[index]

    left = max(old.prompt_ids.shape[1], new.prompt_ids.shape[1])
    prompts = {
        name: torch.cat([pad(x, (left - x.shape[1], 0)) for x in (getattr(old, name), getattr(new, name))])
        for name in ("prompt_ids", "prompt_mask")
    }
    both = torch.cat([old.prompt_index, new.prompt_index + len(old.prompt_ids)])[index]
    names = ("completion_ids", "mask", "logprobs", "entropy", "truncated", "score_norms", "hidden")
    return Rollout(**prompts, prompt_index=both, **{name: rows(name) for name in names})  # type: ignore[arg-type]
