"""Completions sampled and rewarded outside training: for evaluation, measurement, filters and preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import RewardResult, Rewards
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import sample
from tokenrl.language.rollout.streams import STREAMS, uniforms

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
