"""Rewards rollouts, and samples rewarded completions for evaluation, measurement, filters and preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tokenrl.errors import locations_of
from tokenrl.language.rollout.generator import Generator, TransformersGenerator
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling, encode, uniforms

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.rewards.rewards import Rewards

Row = Mapping[str, Any]


def reward_rows(policy: Policy, rewards: Rewards, rollout: Rollout, **state: Any) -> Rollout:
    """Call the reward functions on the completions of a rollout, and return it with their rewards.

    Args:
        policy: decodes the completions.
        rewards: the reward functions.
        rollout: N completions with the `data` of their prompts.
        **state: what `Rewards` takes besides, such as the `step`.
    """
    data, pairs = rollout.data, zip(rollout.completion_ids.cpu(), rollout.mask.cpu(), strict=True)
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    ids = [row[mask].tolist() for row, mask in pairs]
    names = dict.fromkeys(name for row in data for name in row if name != "prompt")
    columns = {name: [row.get(name) for row in data] for name in names}
    # If all functions abstain from all rows here, rows of the same step in another process may have rewards;
    # so the training step, which sees all of them, decides whether there is anything to learn from.
    state |= {"all_may_abstain": True, "locations": locations_of(data)}
    result = rewards([row["prompt"] for row in data], texts, ids, columns, **state)
    return replace(
        rollout,
        rewards=torch.from_numpy(result.total),
        by_function=torch.from_numpy(result.values),
        valid=torch.from_numpy(result.valid),
        logs=[{name: column[i] for name, column in result.extra.items()} for i in range(len(data))],
        logged=((result.logged, len(data)),),
    )


def sample_and_reward(
    policy: Policy,
    prompts: Sequence[Row],
    rewards: Rewards,
    sampling: Sampling,
    *,
    stream: str,
    generator: Generator | None = None,
    accelerator: Any = None,
    batch_size: int = 256,
) -> Iterator[Rollout]:
    """Sample completions of prompts batch by batch and reward them, outside the training step.

    Args:
        policy: the policy to sample from.
        prompts: rows with a `prompt`; their other columns are passed to the reward functions.
        rewards: the reward functions, which can read `sampling.step`.
        sampling: how to sample; 0 generations means the greedy completion.
        stream: the stream of random numbers, a name in `STREAMS`.
        generator: the engine that samples; None for the policy's own model.
        accelerator: accelerate's `Accelerator` in a run of W processes, each of which takes every W-th
            prompt; None for a single process.
        batch_size: completions per batch, which changes memory only.

    Yields:
        The rewarded batches in the order of the prompts, which they number as the list does.
    """
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    generator = generator or TransformersGenerator(policy)
    ids = encode(policy, [row["prompt"] for row in prompts], sampling, locations_of(prompts))
    size = max(1, batch_size // sampling.group_size)
    for start in range(rank, len(prompts), world * size):
        numbers = range(start, min(start + world * size, len(prompts)), world)
        draws = uniforms(stream, sampling, numbers)
        rollout = generator.generate([ids[i] for i in numbers], sampling, draws)
        rollout = rollout.of([(i, prompts[i]) for i in numbers])
        yield reward_rows(policy, rewards, rollout, step=sampling.step)
