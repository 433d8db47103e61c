"""Reads completions that somebody else sampled, encodes them once, and makes rows of training steps of them.

A logged row counts like one that the policy samples: its group is whole, its reward is compared, and the estimator's
importance weights it by the log-probabilities of whoever sampled it. With weights of sequences the gradient is that of
the policy's expected reward while no row has moved the policy yet. Without log-probabilities nothing is corrected: the
reward-weighted likelihood of the rows is ascended, which is another objective.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenrl.core.statistics import generator_of
from tokenrl.errors import Placed, Refused, with_places
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.rewarded import Rewarded, Row, reward_rows
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.supervised.fit import demonstration_batch, encode_demonstrations
from tokenrl.language.tasks.records import described
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.stream import PromptStream, RowOrder, prompt_orders, prompt_stream
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.training.log import without_samples
from tokenrl.runs.processes import agreed
from tokenrl.settings import LARGEST_REWARD, shown

if TYPE_CHECKING:
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.training.arguments import TrainArguments
    from tokenrl.language.training.learner import Learner

LEAST_LOGPROB = -1000


@dataclass
class Log:
    """Logged rows, encoded and cut into groups.

    Attributes:
        table: the N rows, as an engine returns those that it samples.
        data: the row of the data that each prompt comes from, N mappings.
        rewards: reward of each row [N], NaN where it has none; None where reward functions give them.
        has_sampler: whether the log-probabilities of a sampler are in `table`.
        groups: the numbers of the rows of each group.
        order: the order in which steps draw groups.
        name: the name of the data, for records.
        line: what was read, in words for the header.
        warnings: what is not as it was written, in words.
    """

    table: Rollout
    data: Rows
    rewards: Tensor | None
    has_sampler: bool
    groups: list[list[int]]
    order: RowOrder
    name: str
    line: str
    warnings: list[str] = field(default_factory=list)

    def draw(self, count: int) -> list[int]:
        """Return the numbers of the next `count` groups."""
        return self.order.draw(count)


class LoggedPrompts(PromptStream):
    """Draws the prompts of training, and groups of logged rows; an epoch is a pass over these."""

    log: Log

    def __init__(self, rows: Rows, seed: int, log: Log) -> None:
        """Start before the first step."""
        super().__init__(rows, seed)
        self.log = log

    @property
    def epoch(self) -> float:
        """Passes over the logged rows so far."""
        return self.log.order.position / len(self.log.groups)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue exactly, as plain integers."""
        return {**super().state_dict(), "log": self.log.order.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the positions of a saved state."""
        super().load_state_dict(state)
        self.log.order.load_state_dict(state["log"])


def training_stream(
    choices: TrainArguments,
    task: PromptTask,
    rows: Rows | None,
    learner: Learner,
    rewards: Rewards,
) -> PromptStream:
    """Return what draws the prompts of training, and of logged rows, if there are any, their groups."""
    prompts = task.train_prompts
    if rows is None:
        return prompt_stream(prompts, choices.seed, choices.prompt_weights, choices.prompt_floor)
    return LoggedPrompts(prompts, choices.seed, make_log(rows, task, learner, rewards))


@agreed
def logged_rows(log: Log, learner: Learner, rewards: Rewards, groups: Sequence[int]) -> Rewarded:
    """Return the rows of groups of a log with the columns that the estimator reads, and with their rewards.

    Where no log-probabilities of a sampler are known, those of the present policy stand in their column.
    """
    numbers = [number for group in groups for number in log.groups[group]]
    index = torch.tensor(numbers)
    number_of_group = torch.tensor(groups).repeat_interleave(len(log.groups[0]))
    rows = replace(log.table.take(index), prompt_index=number_of_group)
    rows = learner.with_missing_fields(rows)
    if not log.has_sampler:
        rows = replace(rows, sampling_logprobs=rows.logprobs)
    data = log.data.take(numbers)
    if log.rewards is None:
        return reward_rows(learner.policy, rewards, rows, data)
    of_rows = log.rewards[index]
    valid = ~of_rows.isnan()
    return Rewarded(
        **rows.columns(),
        data=[*data],
        rewards=of_rows.nan_to_num(),
        by_function=torch.full((len(rows), len(rewards.functions)), math.nan).double(),
        valid=valid,
        replayed=torch.zeros_like(valid),
        logs=[{}] * len(rows),
        logged=(({}, len(rows)),),
    )


def make_log(rows: Rows, task: PromptTask, learner: Learner, rewards: Rewards) -> Log:
    """Encode the logged rows of a run and cut them into groups.

    Args:
        rows: the rows.
        task: has the held-out prompts, of which no row is learnt, and the columns of prompts that rows lack.
        learner: the policy as the run starts, and the settings.
        rewards: the reward functions of rows without a reward.

    Raises:
        Refused: a row is wrong, the log-probabilities are not those of its tokens, or no group is left.
    """
    args, policy = learner.args, learner.policy
    held_out = np.isin(rows.hashes, task.eval_prompts.hashes)
    held_out &= ~np.isin(rows.hashes, task.train_prompts.hashes)
    left_out = Counter({"of held-out prompts": int(held_out.sum())})
    kept = list[int]()
    pairs = list[tuple[list[int], list[int]]]()
    for number in np.flatnonzero(~held_out).tolist():
        prompt, ids = _encoded(policy, rows[number])
        if args.truncate_prompts and policy.context is not None:
            prompt = prompt[args.max_completion_length - policy.context :]
        if len(ids) > args.max_completion_length:
            left_out[f"longer than {args.max_completion_length} tokens"] += 1
        elif len(prompt) + len(ids) > (policy.context or math.inf):
            left_out["longer than the context"] += 1
        else:
            kept.append(number)
            pairs.append((prompt, ids))
    size = args.num_generations
    order = torch.randperm(len(kept), generator=generator_of(args.seed, "log")).tolist()
    of_prompts: dict[int, list[int]] = {}
    for place in order:
        of_prompts.setdefault(int(rows.hashes[kept[place]]), []).append(place)
    groups = [
        members[start : start + size]
        for members in of_prompts.values()
        for start in range(0, len(members) - size + 1, size)
    ]
    left_out[f"that fill no group of {size}"] = len(kept) - size * len(groups)
    words = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
    if not groups:
        raise Refused(
            f"No row of {shown(args.rows, 80)} is left to learn of; left out are {words}. Give other rows, a larger "
            "max_completion_length (--max-completion-length), or fewer num_generations (--num-generations)."
        )
    rows = rows.take(kept)
    table = _table(policy, rows, pairs)
    has_sampler = args.rows_sampler == "start"
    if has_sampler:
        scores = learner.scores(table, policy.model, learner.forward.regime, learner.sampling)
        table = replace(table, sampling_logprobs=scores.logprobs)
    elif "logprobs" in rows.columns:
        has_sampler = True
        table = replace(table, sampling_logprobs=_sampler_of(rows, table))
    log = Log(
        table=table,
        data=_with_columns(rows, task.train_prompts),
        rewards=None,
        has_sampler=has_sampler,
        groups=groups,
        order=RowOrder(len(groups), args.seed, prompt_orders),
        name=described({"train": rows})[0],
        line=f"{len(groups):,} groups of {size} rows{words and f'; left out: {words}'}",
        warnings=_unread(policy, table, rows),
    )
    if "reward" in rows.columns:
        log.rewards = torch.tensor([*map(_reward, rows)], dtype=torch.float64)
    else:
        rewards.check_columns(log.data.columns)
        rewards.check_rows(log.data)
    return log


def _encoded(policy: Policy, row: Row) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and of the completion of a row, which has an end unless it says `truncated`."""
    ids = _value(row, "completion_ids")
    if ids is None:
        unlimited = replace(policy, context=None)  # rows that are too long are counted
        (prompt, ids), *others = encode_demonstrations(unlimited, [row])
        if others:
            raise _refusal(row, "its completion has several turns: give text, or one message")
        if _value(row, "truncated") and policy.tokenizer.eos_token_id is not None:
            ids = ids[:-1]
    else:
        prompt = policy.encode(row["prompt"], row.get("tools"))
        largest = len(policy.model.get_input_embeddings().weight) - 1  # type: ignore[operator]
        if not _are_numbers(ids, int) or not all(0 <= i <= largest for i in ids):
            raise _refusal(row, f"completion_ids must be a list of ids from 0 to {largest:,}")
    if not ids or {*ids[:-1]} & {*policy.ends}:
        raise _refusal(row, "its completion has no token, or goes on behind a token that ends it")
    return prompt, ids


def _table(policy: Policy, rows: Rows, pairs: Sequence[tuple[list[int], list[int]]]) -> Rollout:
    """Return the ids of prompts and completions as a rollout, without log-probabilities of a sampler."""
    ends = [ids[-1] in policy.ends for _, ids in pairs]
    cuts = [_value(row, "truncated") for row in rows]
    truncated = [
        not is_ended if cut is None else bool(cut) for is_ended, cut in zip(ends, cuts, strict=True)
    ]
    return replace(demonstration_batch(policy, pairs), truncated=torch.tensor(truncated))


def _unread(policy: Policy, table: Rollout, rows: Rows) -> list[str]:
    """Return a warning about texts that read otherwise once they are encoded; none without such texts."""
    texts = policy.decode(table.completion_ids, table.mask)
    pairs = zip(texts, rows.column("completion"), rows.locations, strict=True)
    others = [
        location for text, before, location in pairs if isinstance(before, str) and text != before
    ]
    if not others:
        return []
    return [
        f"{len(others):,} of {len(rows):,} logged completions read otherwise once this model's tokenizer has encoded "
        f"them, first that of {others[0]}: what is learnt is the text that it can write."
    ]


def _with_columns(rows: Rows, prompts: Rows) -> Rows:
    """Return the rows without what was sampled, with the columns of the task's row of their prompt that they lack."""
    of_prompts = dict(zip(prompts.hashes.tolist(), prompts, strict=True))
    merged = [
        Placed(
            {
                **dict.fromkeys(prompts.columns),
                **of_prompts.get(key, {}),
                **{name: value for name, value in row.items() if value is not None},
            },
            row.location,
        )
        for key, row in zip(rows.hashes.tolist(), without_samples(rows), strict=True)
    ]
    return Rows.of(merged)


def _sampler_of(rows: Rows, table: Rollout) -> Tensor:
    """Return the log-probabilities that the rows have [N, T]."""
    lists = [_value(row, "logprobs") for row in rows]
    if missing := lists.count(None):
        raise Refused(
            f"{missing:,} of {len(rows):,} rows have no logprobs: leave these rows out, or the column."
        )
    for row, logprobs, count in zip(rows, lists, table.mask.sum(dim=1).tolist(), strict=True):
        if not _are_numbers(logprobs) or not all(LEAST_LOGPROB <= x <= 0 for x in logprobs):
            raise _refusal(row, f"logprobs must be a list of numbers from {LEAST_LOGPROB} to 0")
        if len(logprobs) != count:
            raise _refusal(
                row,
                f"it has {len(logprobs)} logprobs and {count} tokens, its end included. So they are of another "
                "tokenizer: give completion_ids of this one, or rows_sampler start (--rows-sampler start)",
            )
    sampler = torch.zeros(table.mask.shape, dtype=torch.float64)
    sampler[table.mask] = torch.tensor([*chain(*lists)], dtype=torch.float64)
    return sampler


def _reward(row: Row) -> float:
    """Return the reward of a row, NaN where it has none."""
    reward = _value(row, "reward")
    if reward is None:
        return math.nan
    if not _are_numbers([reward]) or not abs(reward) <= LARGEST_REWARD:
        raise _refusal(
            row, f"its reward must be a number within {LARGEST_REWARD:g}, and is {reward!r:.40}"
        )
    return float(reward)


def _value(row: Row, name: str) -> Any:
    """Return a value of a row that is no text, which CSV and tables of completions write as one."""
    value = row.get(name)
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value.lower())
    return value


def _are_numbers(values: Any, kinds: Any = (int, float)) -> bool:
    """Return whether a value is a list of numbers."""
    return isinstance(values, list) and all(isinstance(value, kinds) for value in values)


def _refusal(row: Row, words: str) -> Refused:
    """Return what refuses a row."""
    return Refused(f"rows, {next(with_places([row]))[0]}: {words}.")
