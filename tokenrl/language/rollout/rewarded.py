"""Rewards rollouts, and samples rewarded completions for evaluation, measurement, filters and preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenrl.language.rollout.generator import Generator, TransformersGenerator
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling, encode, uniforms

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.rewards.rewards import RewardResult, Rewards

Row = Mapping[str, Any]


class RewardedBatch(NamedTuple):
    """Completions of one batch of prompts with their rewards.

    Attributes:
        places: positions of the prompts in the list that was given.
        rollout: the completions.
        result: their rewards.
    """

    places: range
    rollout: Rollout
    result: RewardResult


def reward_rows(
    policy: Policy, rewards: Rewards, rows: Sequence[Row], rollout: Rollout, **state: Any
) -> RewardResult:
    """Call the reward functions on the completions of a rollout.

    Args:
        policy: decodes the completions.
        rewards: the reward functions.
        rows: B prompts with their columns; `rollout.prompt_index` says which one each completion belongs to.
        rollout: N completions.
        **state: what `Rewards` takes besides, such as the `step`.
    """
    row_of_each = [rows[i] for i in rollout.prompt_index.tolist()]
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    pairs = zip(rollout.completion_ids.cpu(), rollout.mask.cpu(), strict=True)
    ids = [row[keep].tolist() for row, keep in pairs]
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    columns = {name: [row.get(name) for row in row_of_each] for name in names}
    # If all functions abstain from all rows here, rows of the same step in another process may have rewards;
    # so the training step, which sees all of them, decides whether there is anything to learn from.
    return rewards([row["prompt"] for row in row_of_each], texts, ids, columns, all_may_abstain=True, **state)


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
) -> Iterator[RewardedBatch]:
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
        The batches in the order of the prompts.
    """
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    generator = generator or TransformersGenerator(policy)
    ids = encode(policy, [row["prompt"] for row in prompts], sampling)
    size = max(1, batch_size // sampling.group_size)
    for start in range(rank, len(prompts), world * size):
        places = range(start, min(start + world * size, len(prompts)), world)
        draws = uniforms(stream, sampling, places)
        rollout = generator.generate([ids[i] for i in places], sampling, draws)
        result = reward_rows(policy, rewards, [prompts[i] for i in places], rollout, step=sampling.step)
        yield RewardedBatch(places, rollout, result)
