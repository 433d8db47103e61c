"""Rewards rollouts, and samples rewarded completions for evaluation, measurement, filters and preferences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.divergences import k1, k3
from tokenrl.core.returns import at_last_action
from tokenrl.core.rows import zero_outside
from tokenrl.errors import locations_of
from tokenrl.language.policy.stops import decoded, markers
from tokenrl.language.rollout.allowed import with_allowed
from tokenrl.language.rollout.episodes import ENDINGS, play
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.rollout import ABSENT, Rollout, lengths
from tokenrl.language.rollout.sampling import Sampling, encode, uniforms
from tokenrl.runs.processes import gather_objects

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.rewards.environments import Environments
    from tokenrl.language.rewards.rewards import Rewards

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rewarded(Rollout):
    """A rollout with its rewards, and with what the reward functions read and logged.

    Attributes:
        data: the row of the data that each prompt comes from, N mappings; None in an `Experience`.
        rewards: total reward of each completion [N], in float64.
        by_function: reward from each of F functions, NaN where it abstained [N, F], like `rewards`.
        valid: False where every function abstained [N].
        replayed: True on completions of earlier steps [N].
        logs: what reward functions gave to `log_extra` for each row, N mappings; None in an `Experience`.
        dense_rewards: the same rewards in time [N, T]: those of an environment in their turns, those of functions
            at the last action of the row. None without an environment.
        greedy_rewards: reward of the greedy completion of each row's prompt, NaN without one [N]; None where no
            baseline reads it.
        ref_logprobs: log-probabilities under the reference [N, T]; None without a KL.
        factors: factor of each row's gradient, by the chance of its prompt [N]; None for 1.
        logged: not a column: for each call of the reward functions the means of their values for
            `log_metric`, and the number of rows. Rows that were replaced since count too.
    """

    data: Sequence[Row] = ABSENT
    rewards: Tensor
    by_function: Tensor
    valid: Tensor
    replayed: Tensor
    logs: Sequence[Row] = ABSENT
    dense_rewards: Tensor | None = None
    greedy_rewards: Tensor | None = None
    ref_logprobs: Tensor | None = None
    factors: Tensor | None = None
    logged: tuple[tuple[Mapping[str, float], int], ...] = ()

    @property
    def sampled(self) -> Tensor:
        """True on completions that the policy has sampled for this step [N]."""
        return ~self.replayed & (self.prompt_index >= 0)

    def reward_list(self) -> list[float]:
        """Return the reward of each of the N rows, NaN where it is not valid."""
        rewards: list[float] = self.rewards.masked_fill(~self.valid, math.nan).tolist()
        return rewards


def sample_rows(
    policy: Policy,
    generator: Generator,
    prompts: Sequence[tuple[int, Row]],
    sampling: Sampling,
    stream: str,
    environments: Environments | None,
    prompt_ids: Sequence[list[int]] | None = None,
) -> Rollout:
    """Sample completions of prompts, of one turn each or, with environments, of several.

    Args:
        policy: encodes the prompts.
        generator: samples.
        prompts: number and row of the data of each prompt; the number decides the random numbers.
        sampling: how to sample.
        stream: the stream of random numbers, a name in `STREAMS`.
        environments: the environments that the policy answers to; None for completions of one turn.
        prompt_ids: the token ids of the prompts, where they were encoded before; episodes have others.
    """
    numbers = [number for number, _ in prompts]
    data = [row for _, row in prompts]
    sampling = with_allowed(policy, data, sampling)
    if environments is not None:
        rollout = play(policy, generator, environments, prompts, sampling, stream)
    else:
        ids = prompt_ids or encode(policy, data, sampling)
        sampling = sampling.beginning(data)
        draws = uniforms(stream, sampling, numbers)
        rollout = generator.generate(ids, sampling, draws).on_host()
    return replace(rollout, prompt_index=torch.tensor(numbers)[rollout.prompt_index])


def texts_of(policy: Policy, rollout: Rollout) -> list[str]:
    """Return the text of each completion; of an episode, with what the environment wrote between turns."""
    if rollout.turns is None:
        return policy.decode(rollout.completion_ids, rollout.mask)
    rows = zip(rollout.completion_ids.tolist(), lengths(rollout.mask).tolist(), strict=True)
    ids = [row[:length] for row, length in rows]
    return decoded(policy.tokenizer, ids)


def unread_tokens(policy: Policy, rollout: Rollout) -> str:
    """Say which special tokens the completions hold that rewards do not read; empty if there are none."""
    names = markers(policy.tokenizer)
    ids = set(rollout.completion_ids[rollout.mask].tolist())
    tokens = sorted(names[i] for i in names.keys() & ids - {*policy.ends})
    if not tokens:
        return ""
    return (
        f"Completions hold special tokens ({', '.join(tokens[:5])}), which the text of a completion leaves "
        "out: rewards and environments do not see them. Read them in completion_ids, or register them in the "
        "tokenizer as tokens that are not special."
    )


def prompts_of(policy: Policy, rollout: Rollout, data: Sequence[Row]) -> list[Any]:
    """Return the prompt of each row of the data; of an episode, what the policy read first, special tokens included."""
    if rollout.turns is None:
        return [row["prompt"] for row in data]
    rows = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    return decoded(
        policy.tokenizer, [ids[mask].tolist() for ids, mask in rows], skip_special_tokens=False
    )


def reward_rows(
    policy: Policy, rewards: Rewards, rollout: Rollout, prompts: Sequence[Row]
) -> Rewarded:
    """Call the reward functions on the completions of a rollout, and return it with their rewards.

    Args:
        policy: decodes the completions.
        rewards: the reward functions.
        rollout: N completions, equally many of each prompt.
        prompts: the row of the data of each prompt.
    """
    data = [row for row in prompts for _ in range(len(rollout) // len(prompts))]
    texts: list[Any] = texts_of(policy, rollout)
    pairs = zip(rollout.completion_ids, rollout.mask, strict=True)
    ids = [row[mask].tolist() for row, mask in pairs]
    of_data = _columns(data)
    prompts_of_rows = of_data.pop("prompt")
    failed = torch.zeros(len(data), dtype=torch.bool)
    episodes = rollout.messages is not None
    if episodes:
        chats = zip(prompts_of_rows, texts, rollout.messages, strict=True)
        texts = [text if isinstance(prompt, str) else [*chat] for prompt, text, chat in chats]
        failed = torch.tensor([bool(failure) for failure in rollout.failures])
        totals = rollout.turn_rewards.sum(dim=1).tolist()
        of_environments = [
            None if off else x for x, off in zip(totals, rollout.failures, strict=True)
        ]
        of_data |= {"environments": [*rollout.environments], "environment_rewards": of_environments}
    # If all functions abstain from all rows here, rows of the same step in another process may have rewards;
    # so the training step, which sees all of them, decides whether there is anything to learn from.
    options: dict[str, Any] = {"all_may_abstain": True, "locations": locations_of(data)}
    result = rewards(prompts_of_rows, texts, ids, of_data, **options)
    # A failed episode counts nowhere.
    total = torch.from_numpy(result.total).masked_fill(failed, 0)
    valid = torch.from_numpy(result.valid) & ~failed
    columns = rollout.columns() | {
        "data": data,
        "rewards": total,
        "by_function": torch.from_numpy(result.values).masked_fill(failed[:, None], math.nan),
        "valid": valid,
        "replayed": torch.zeros_like(valid),
        "logs": in_rows(result.extra) or [{}] * len(data),
    }
    logged = result.logged
    if episodes:
        # Rewards of environments stand in their turns, those of functions at the end.
        in_turns = rewards.environment_weight * rollout.turn_rewards.masked_fill(failed[:, None], 0)
        rest = (total - in_turns.sum(dim=1))[:, None] * at_last_action(rollout.mask)
        columns["dense_rewards"] = in_turns + rest
        logged = logged | episode_metrics(rollout)
    return Rewarded(**columns, logged=((logged, len(data)),))


def episode_metrics(rollout: Rollout) -> dict[str, float]:
    """Return the mean number of turns of the episodes of a rollout, and the share of each ending."""
    turns = (rollout.turns.amax(dim=1) + 1) * rollout.mask.any(dim=1)  # none if reset failed
    metrics = {"episodes/turns": float(turns.double().mean())}
    for name in ENDINGS:
        metrics[f"episodes/{name}"] = rollout.endings.count(name) / len(rollout)
    return metrics


def sample_and_reward(
    policy: Policy,
    generator: Generator,
    prompts: Sequence[Row],
    rewards: Rewards,
    sampling: Sampling,
    *,
    stream: str,
    accelerator: Any = None,
    batch_size: int = 256,
) -> Iterator[Rewarded]:
    """Sample completions of prompts batch by batch and reward them, outside the training step.

    Args:
        policy: the policy to sample from.
        generator: samples.
        prompts: rows with a `prompt`; their other columns are passed to the reward functions.
        rewards: the reward functions.
        sampling: how to sample; 0 generations means the greedy completion.
        stream: the stream of random numbers, a name in `STREAMS`.
        accelerator: accelerate's `Accelerator` in a run of W processes, each of which takes every W-th
            prompt; None for a single process.
        batch_size: completions per batch, which changes memory only.

    Yields:
        The rewarded batches in the order of the prompts, which they number as the list does.
    """
    rank = 0
    world = 1
    if accelerator is not None:
        rank = accelerator.process_index
        world = accelerator.num_processes
    environments = rewards.environments
    sampling = with_allowed(policy, prompts, sampling)
    # All of them on every process, so that every process refuses a prompt that is too long.
    encoded = encode(policy, prompts, sampling) if environments is None else []
    encoded = encoded[rank::world]
    numbered = [*enumerate(prompts)][rank::world]
    size = max(1, batch_size // sampling.group_size)
    for start in range(0, len(numbered), size):
        part = slice(start, start + size)
        rows = numbered[part]
        rollout = sample_rows(
            policy, generator, rows, sampling, stream, environments, encoded[part]
        )
        yield reward_rows(policy, rewards, rollout, [row for _, row in rows])


def averaged(logged: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Average what rewards logged over calls and processes, by rows; every process has to call this."""
    values: dict[str, list[float]] = {}
    for means, count in gather_objects(list(logged)):
        for name, value in means.items():
            values.setdefault(name, []).extend(repeat(value, count))
    return {name: mean(rows) for name, rows in values.items()}


def completion_rows(
    policy: Policy,
    rows: Rewarded,
    names: Sequence[str],
    advantages: Tensor | None = None,
    teacher_prompts: Sequence[list[int]] | None = None,
) -> list[dict[str, Any]]:
    """Return completions with their rewards, and in training their advantages, as rows of a table.

    A row also has the columns of its prompt's row, such as the right answer, but for names that it uses
    itself, and the prompt of a teacher that reads another one, special tokens included. The reward is None
    without functions, and where all abstained, as from a failed episode.
    """
    columns: dict[str, Any] = {
        **_columns(rows.data),
        "prompt": prompts_of(policy, rows, rows.data),
        "completion": texts_of(policy, rows),
        "reward": [
            x if rewarded and names else None
            for x, rewarded in zip(rows.rewards.tolist(), rows.valid, strict=True)
        ],
    }
    for name, values in zip(names, rows.by_function.T.tolist(), strict=True):
        columns[f"rewards/{name}"] = values
    columns |= _columns(rows.logs)
    if teacher_prompts is not None:
        tokenizer = policy.tokenizer
        columns["teacher_prompt"] = decoded(tokenizer, teacher_prompts, skip_special_tokens=False)
    if rows.replayed.any():
        columns["replayed"] = rows.replayed.tolist()
    is_logged = rows.prompt_index < 0
    if is_logged.any():
        columns["logged"] = is_logged.tolist()
    if advantages is not None:
        columns["advantage"] = advantages.tolist()
    columns["truncated"] = rows.truncated.tolist()
    if rows.messages is not None:
        columns |= {"ending": rows.endings, "messages": rows.messages}
        columns["failure"] = [failure or None for failure in rows.failures]
    return in_rows(columns)


def in_rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table whose columns have N entries each."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return a list for each name that a row has, with None for the rows that lack it."""
    names = {name: None for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in names}


def completion_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Estimate the KL of whole completions to the reference, from one sample each, in nats.

    `kl` is the log-ratio summed over tokens (k1). `kl_k3` sums `ref/pi - 1 + log(pi/ref)` over tokens (k3;
    Schulman 2020, "Approximating KL divergence"). Given the tokens before, the mean of a summand over the
    next token is the KL of that token's distribution, so by the chain rule both sums are unbiased. k3 is
    never negative; its variance is far smaller than that of k1 near the reference, and larger far from it.

    Args:
        logprobs: log-probabilities of the policy that sampled, under the distribution of sampling [N, T].
        ref_logprobs: log-probabilities of the reference, at the same temperature over all tokens [N, T].
        mask: True on actions [N, T]; elsewhere both tensors may hold anything.

    Returns:
        `kl` and `kl_k3`, each [N].
    """
    log_pi = zero_outside(logprobs.double(), mask)
    log_ref = zero_outside(ref_logprobs.double(), mask)
    return {"kl": k1(log_pi, log_ref).sum(dim=1), "kl_k3": k3(log_pi, log_ref).sum(dim=1)}


def prompt_text(prompt: Any) -> str:
    """Return a prompt as a person would type it: the text itself, or the last of its chat messages."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def failures_of(texts: Sequence[str]) -> str:
    """Return how many of N episodes failed, of N texts, and how the first did; empty if none failed."""
    failures = [text for text in texts if text]
    if not failures:
        return ""
    return f"{len(failures)} of {len(texts)} episodes failed. {failures[0]}"
