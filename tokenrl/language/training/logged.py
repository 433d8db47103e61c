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
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenrl.core.statistics import generator_of
from tokenrl.errors import Placed, Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.stops import decoded
from tokenrl.language.rollout.rewarded import Rewarded, Row, reward_rows
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.supervised.fit import demonstration_batch, encode_demonstrations
from tokenrl.language.tasks.records import described
from tokenrl.language.tasks.rows import Rows, digits
from tokenrl.language.tasks.stream import PromptStream, RowOrder, prompt_orders, prompt_stream
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.training.log import without_samples
from tokenrl.runs.processes import agreed
from tokenrl.settings import LARGEST_REWARD, MAX_COUNT, shown

if TYPE_CHECKING:
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.training.arguments import TrainArguments
    from tokenrl.language.training.learner import Learner

LEAST_LOGPROB = -1000
"""A token with less is never sampled, as for engines."""


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
        reads_otherwise: the number of rows whose text is another one once it is encoded.
    """

    table: Rollout
    data: Rows
    rewards: Tensor | None
    has_sampler: bool
    groups: list[list[int]]
    order: RowOrder
    name: str
    line: str
    reads_otherwise: int

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
    log = make_log(rows, task, learner, rewards)
    learner.policy.trained_prompts |= frozenset(digits(np.unique(log.data.keys)))
    return LoggedPrompts(prompts, choices.seed, log)


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


class Sample(NamedTuple):
    """A logged row, encoded.

    Attributes:
        prompt, ids: the ids of its prompt and of its completion.
        truncated: whether the completion has no end.
        logprobs: the log-probability of each token under whoever sampled it; None where the row has none.
        reward: its reward, NaN where it has none.
        reads_otherwise: whether its text is another one once it is encoded.
    """

    prompt: list[int]
    ids: list[int]
    truncated: bool
    logprobs: list[float] | None
    reward: float
    reads_otherwise: bool


def make_log(rows: Rows, task: PromptTask, learner: Learner, rewards: Rewards) -> Log:
    """Encode the logged rows of a run and cut them into groups.

    Args:
        rows: the rows.
        task: has the held-out prompts, of which no row is learnt, and columns that rows may lack.
        learner: the policy as the run starts, and the settings.
        rewards: the reward functions of rows without a reward.

    Raises:
        Refused: a row is wrong, the log-probabilities are not those of its tokens, or no group is left.
    """
    args = learner.args
    size = args.num_generations
    samples, left_out = _samples(rows, task, learner)
    rows = rows.take(samples)
    groups = _groups(rows, size, args.seed)
    left_out[f"that fill no group of {size}"] = len(rows) - size * len(groups)
    words = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
    if not groups:
        raise Refused(
            f"No row of {shown(args.rows, 80)} is left to learn of; left out are {words}. Give other rows, a larger "
            "max_completion_length (--max-completion-length), or fewer num_generations (--num-generations)."
        )
    table = demonstration_batch(learner.policy, [(x.prompt, x.ids) for x in samples.values()])
    table = replace(table, truncated=torch.tensor([x.truncated for x in samples.values()]))
    sampler = None
    if args.rows_sampler == "start":
        model, regime = learner.policy.model, learner.forward.regime
        sampler = learner.scores(table, model, regime, learner.sampling).logprobs
    elif "logprobs" in rows.columns:
        lists = [x.logprobs or () for x in samples.values()]
        sampler = torch.zeros(table.mask.shape, dtype=torch.float64)
        sampler[table.mask] = torch.tensor([*chain(*lists)], dtype=torch.float64)
    data = _with_columns(rows, task.train_prompts)
    of_rows = None
    if "reward" in rows.columns:
        of_rows = torch.tensor([x.reward for x in samples.values()], dtype=torch.float64)
    else:
        rewards.check_columns(data.columns)
        rewards.check_rows(data)
    others = sum(x.reads_otherwise for x in samples.values())
    return Log(
        table=table if sampler is None else replace(table, sampling_logprobs=sampler),
        data=data,
        rewards=of_rows,
        has_sampler=sampler is not None,
        groups=groups,
        order=RowOrder(len(groups), args.seed, prompt_orders),
        name=described({"train": rows})[0],
        line=f"{len(groups):,} groups of {size} rows{words and f'; left out: {words}'}",
        reads_otherwise=others,
    )


def _samples(
    rows: Rows, task: PromptTask, learner: Learner
) -> tuple[dict[int, Sample], Counter[str]]:
    """Return the rows that can be learnt, encoded, by their numbers; and how many were left out, by the reason."""
    args, policy = learner.args, learner.policy
    limit, context = args.max_completion_length, policy.context or MAX_COUNT
    held_out = np.isin(rows.hashes, task.eval_prompts.hashes)
    held_out &= ~np.isin(rows.hashes, task.train_prompts.hashes)
    samples, left_out = dict[int, Sample](), Counter[str]()
    for number, row in enumerate(rows):
        if held_out[number]:
            left_out["of held-out prompts"] += 1
            continue
        try:
            sample = _encoded(policy, row)
        except Refused as error:
            raise Refused(f"rows, {row.location}: {error}") from error
        if args.truncate_prompts:
            sample = sample._replace(prompt=sample.prompt[limit - context :])
        if len(sample.ids) > min(limit, context - len(sample.prompt)):
            left_out[f"longer than {limit} tokens or than the context"] += 1
        else:
            samples[number] = sample
    has_logprobs = [sample.logprobs is not None for sample in samples.values()]
    if 0 < sum(has_logprobs) < len(has_logprobs):
        raise Refused(
            f"{has_logprobs.count(False):,} of {len(samples):,} rows have no logprobs: leave these rows out, or the "
            "column logprobs, or give rows_sampler start (--rows-sampler start)."
        )
    return samples, left_out


def _encoded(policy: Policy, row: Row) -> Sample:
    """Return a row encoded; a text has an end unless the row says that it is truncated.

    Raises:
        Refused: one of its values is none that a sampled row can have.
    """
    names = ("completion_ids", "logprobs", "reward", "truncated")
    ids, logprobs, reward, truncated = (_value(row, name) for name in names)
    reads_otherwise = False
    if ids is None:
        unlimited = replace(policy, context=None)  # rows that are too long are counted
        (prompt, ids), *others = encode_demonstrations(unlimited, [row])
        if others:
            raise Refused("its completion has several turns; give text, or a single message.")
        if truncated and policy.tokenizer.eos_token_id is not None:
            ids = ids[:-1]
        text = row["completion"]
        reads_otherwise = isinstance(text, str) and decoded(policy.tokenizer, [ids]) != [text]
    else:
        prompt = policy.encode(row["prompt"], row.get("tools"))
        largest = len(policy.model.get_input_embeddings().weight) - 1  # type: ignore[operator]
        if not _are_numbers(ids, 0, largest, int):
            raise Refused(f"completion_ids must be a list of whole numbers from 0 to {largest:,}.")
    if not ids or {*ids[:-1]} & {*policy.ends}:
        raise Refused("its completion has no token, or goes on behind a token that ends it.")
    if logprobs is not None and not _are_numbers(logprobs, LEAST_LOGPROB, 0):
        raise Refused(f"logprobs must be a list of numbers from {LEAST_LOGPROB} to 0.")
    if logprobs is not None and len(logprobs) != len(ids):
        raise Refused(
            f"it has {len(logprobs)} logprobs and {len(ids)} tokens, its end included, so they are of another "
            "tokenizer. Give completion_ids of this model, or leave logprobs out."
        )
    if reward is not None and not _are_numbers([reward], -LARGEST_REWARD, LARGEST_REWARD):
        raise Refused(f"its reward is {shown(reward, 40)}; it must be a number, or none.")
    is_ended = ids[-1] in policy.ends
    return Sample(
        prompt,
        ids,
        truncated=not is_ended if truncated is None else bool(truncated),
        logprobs=logprobs,
        reward=math.nan if reward is None else float(reward),
        reads_otherwise=reads_otherwise,
    )


def _value(row: Row, name: str) -> Any:
    """Return a value of a row that is no text, which CSV and tables of completions write as one."""
    value = row.get(name)
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value.lower())
    return value


def _are_numbers(values: Any, low: float, high: float, kind: Any = int | float) -> bool:
    """Return whether a value is a list of numbers within bounds."""
    return isinstance(values, list) and all(
        isinstance(value, kind) and low <= value <= high for value in values
    )


def _groups(rows: Rows, size: int, seed: int) -> list[list[int]]:
    """Return the numbers of the rows of each group: of one prompt, in random order, as logs may be sorted."""
    of_prompts: dict[int, list[int]] = {}
    for number in torch.randperm(len(rows), generator=generator_of(seed, "log")).tolist():
        of_prompts.setdefault(int(rows.hashes[number]), []).append(number)
    return [
        members[start : start + size]
        for members in of_prompts.values()
        for start in range(0, len(members) - size + 1, size)
    ]


def _with_columns(rows: Rows, prompts: Rows) -> Rows:
    """Return the rows without what was sampled, with the columns of the task's row of their prompt that they lack."""
    of_prompts = dict(zip(prompts.hashes.tolist(), prompts, strict=True))
    every = dict.fromkeys(prompts.columns)
    merged = []
    for key, row in zip(rows.hashes.tolist(), without_samples(rows), strict=True):
        own = {name: value for name, value in row.items() if value is not None}
        merged.append(Placed({**every, **of_prompts.get(key, {}), **own}, row.location))
    return Rows.of(merged)
