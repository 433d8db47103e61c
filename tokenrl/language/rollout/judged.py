"""Completions sampled and rewarded outside training: for evaluation, measurement, filters and preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import RewardResult, Rewards
from tokenrl.language.rollout.generator import Generator, TransformersGenerator
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.streams import uniforms

Row = Mapping[str, Any]


class Judged(NamedTuple):
    """Completions of some prompts with their rewards; `places` are the prompts' numbers."""

    places: range
    rollout: Rollout
    result: RewardResult


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
    sampling: Sampling,
    *,
    stream: str,
    generator: Generator | None = None,
    accelerator: Any = None,
    batch_size: int = 256,
) -> Iterator[Judged]:
    """Sample completions of prompts batch by batch and reward them, outside training.

    Args:
        policy: sampled from.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions, which are told `sampling.step`.
        sampling: how to sample; 0 generations for the greedy completion.
        stream: whose random numbers, a name in `STREAMS`.
        generator: what samples; None for the policy's own model.
        accelerator: accelerate's, in a run of W processes, each of which takes every W-th prompt.
        batch_size: completions in one batch; changes memory only.
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
        yield Judged(places, rollout, result)
