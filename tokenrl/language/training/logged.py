"""Reads completions that somebody else sampled, encodes them once, and makes rows of training steps of them.

A logged row counts like one that the policy samples: its group is whole, its reward is compared, and the estimator's
importance weights it by the log-probabilities of whoever sampled it. With weights of sequences the gradient is that of
the policy's expected reward while no row has moved the policy yet. Without log-probabilities nothing is corrected: the
reward-weighted likelihood of the rows is ascended, which is another objective.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tokenrl.core.statistics import generator_of
from tokenrl.errors import Refused, refusing
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.stops import decoded
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.rewarded import Rewarded, reward_rows
from tokenrl.language.rollout.sampling import encode
from tokenrl.language.supervised.fit import demonstration_batch, encode_demonstrations
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.sources import LeftOut, read_splits, with_prompts
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import PromptTask, is_unrewarded
from tokenrl.settings import LARGEST_REWARD, shown

if TYPE_CHECKING:
    from tokenrl.language.training.arguments import TrainArguments
    from tokenrl.language.training.learner import Learner


def read_log(args: TrainArguments, task: PromptTask, reads_more: bool) -> Rows | None:
    """Read the rows that a run shall learn of, without those of held-out prompts; None where none were given.

    Args:
        args: the settings of the run.
        task: its task.
        reads_more: whether a teacher reads other prompts than the policy.

    Raises:
        Refused: they cannot be read, there are none, or something else was given that cannot be done with them.
    """
    source: Any = args.rows
    if source is None:
        return None
    splits = read_splits(source) if isinstance(source, str) else memory_splits(source)
    rows = splits.get("train", Rows({}, ()))
    repeated = ("replayed", "logged")  # which a run marks in its tables
    rows = rows.take(i for i, row in enumerate(rows) if not any(map(row.get, repeated)))
    rows = with_prompts(rows, f"rows {shown(source, 80)}", args, chat=bool(args.chat))
    estimator = args.estimator
    lacking = rows.column("logprobs").count(None)
    clashes = {
        "no task, whose prompts are evaluated: name one (--task), such as the same file": isinstance(
            args.task, LeftOut
        ),
        "an environment, or completions of several turns": (
            task.environment or "ending" in rows.columns
        ),
        "no column completion, nor completion_ids": (
            not {"completion", "completion_ids"} & rows.columns.keys()
        ),
        "chat messages written as text, as in tables of runs: give them as JSON": any(
            str(prompt).startswith('[{"role"') for prompt in rows.columns["prompt"]
        ),
        f"importance {estimator.importance!r}, which reads the log-probabilities of whoever sampled them, and "
        f"{lacking:,} of {len(rows):,} have no logprobs: add them, or take importance none, which is biased": (
            lacking and "sampling_logprobs" in estimator.needs
        ),
        "allowed, which they need not obey": args.allowed,
        "importance_centre, as no distribution of a sampler is kept": estimator.importance_centre,
        "zero_spread refill, which samples new groups": estimator.zero_spread == "refill",
        "prompt_weights, as nothing says how often they have each prompt": (
            args.prompt_weights != "uniform"
        ),
        "sync_every, as weights of two ages would sample": args.sync_every > 1,
        "replay, which repeats what the policy sampled": args.replay,
        "the control best_of_n, which learns nothing": args.control_arm == "best_of_n",
        "top_k, top_p or min_p, without which every token can be sampled": not args.is_whole,
        "reward none": is_unrewarded(args.reward),
        "a teacher that reads other prompts": reads_more,
        "a baseline of yours or remax, as they have no greedy completions and need not have other columns": (
            callable(estimator.baseline) or "greedy_rewards" in estimator.needs
        ),
        "components separate, as they have one reward": estimator.components == "separate",
    }
    for clash, is_met in clashes.items():
        if is_met:
            raise Refused(f"rows were given with {clash}. Leave out one of the two.")
    is_held_out = np.isin(rows.hashes, task.eval_prompts.hashes)
    is_trained = np.isin(
        rows.hashes, task.train_prompts.hashes
    )  # where both parts have the same prompts
    return rows.take(np.flatnonzero(is_trained | ~is_held_out))


@dataclass
class Log:
    """Logged rows, encoded and cut into groups.

    Attributes:
        rows: the N rows, as they were read.
        prompts, completions: the ids of each.
        order: draws groups, each the numbers of its rows.
        rewards: the reward functions, or one that reads the column `reward`.
        line: what was read, in words for the header.
    """

    rows: Rows
    prompts: list[list[int]]
    completions: list[list[int]]
    order: PromptStream
    rewards: Rewards
    line: str

    def draw(self, step: int, count: int) -> list[tuple[int, Any]]:
        """Return the groups of a step, of which each has so many, with numbers below 0; the step is all their state."""
        if self.order.position != (step - 1) * count:
            state = self.order.state_dict() | {"position": (step - 1) * count}
            self.order.load_state_dict(state)
        return [(-1 - number, group) for number, group in self.order.draw_prompts(count)]


def make_log(rows: Rows, learner: Learner, rewards: Rewards) -> Log:
    """Encode the logged rows of a run and cut them into groups, in random order, as logs may be sorted.

    Args:
        rows: the rows.
        learner: the policy and the settings.
        rewards: the reward functions of rows without a reward.

    Raises:
        Refused: a row is wrong, the log-probabilities are not those of its tokens, or no group is left.
    """
    args, policy = learner.args, learner.policy
    size, limit = args.num_generations, args.max_completion_length
    completions = [_completion_ids(policy, row) for row in rows]
    groups: list[Any] = []
    begun: Any = defaultdict(list)
    lost = 0
    for number in torch.randperm(len(rows), generator=generator_of(args.seed, "log")).tolist():
        if not 0 < len(completions[number]) <= limit:
            lost += 1
            continue
        members = begun[rows.hashes[number]]
        members.append(number)
        if len(members) == size:
            groups.append(members.copy())
            members.clear()
    line = (
        f"{len(groups):,} groups of {size}, of {len(rows):,} rows without held-out prompts; {lost:,} are longer than "
        f"{limit} tokens or read otherwise once this tokenizer encodes them, and the others fill no group"
    )
    if not groups:
        raise Refused(
            f"There are {line}. Give other rows, a larger max_completion_length (--max-completion-length), or fewer "
            "num_generations (--num-generations)."
        )
    if "reward" in rows.columns:
        rewards = Rewards([recorded_reward])
    rewards.check_columns(rows.columns)
    rewards.check_rows(rows)
    prompts = encode(policy, rows, learner.sampling)
    return Log(rows, prompts, completions, PromptStream(groups, args.seed), rewards, line)


def recorded_reward(reward: Sequence[Any], **_: Any) -> list[float | None]:
    """Return the rewards that stand in the rows of a log."""
    return [None if x is None else float(x) for x in reward]


def _completion_ids(policy: Policy, row: Any) -> list[int]:
    """Return the ids of a row's completion, once its values are checked; none of a text that reads otherwise then.

    Raises:
        Refused: one of its values is none that a sampled row can have.
    """
    ids, logprobs = row.get("completion_ids"), row.get("logprobs")
    largest = len(policy.model.get_input_embeddings().weight) - 1  # type: ignore[operator]
    with refusing(
        f"rows, {row.location}: these are no values of a sampled completion",
        f"A completion is text, or ids from 0 to {largest:,}, with no end but the last; a reward is a number, or none; "
        "and logprobs are from -1000 to 0, one for each token and the end. If there are others, they may be of another "
        "tokenizer: give completion_ids of this one, or leave logprobs out.",
    ):
        if ids is None:
            unlimited = replace(policy, context=None)  # what is too long is left out
            ids = encode_demonstrations(unlimited, [row])[0][1]
            if row.get("truncated") and ids[-1] == policy.tokenizer.eos_token_id:
                ids = ids[:-1]
            if decoded(policy.tokenizer, [ids]) != [row["completion"]]:
                return []
        chances = [0.0] * len(ids) if logprobs is None else logprobs
        if (
            not 0 <= min(ids) <= max(ids) <= largest
            or {*ids[:-1]} & {*policy.ends}
            or len(chances) != len(ids)
            or not all(-1000 <= x <= 0 for x in chances)
            or not abs(float(row.get("reward") or 0)) <= LARGEST_REWARD
        ):
            raise ValueError(f"{len(ids)} tokens, logprobs {shown(logprobs)}, {shown(dict(row))}")
    return [*map(int, ids)]


def logged_rows(
    learner: Learner, names: Sequence[str], groups: Sequence[tuple[int, Any]]
) -> Rewarded:
    """Return the rows of groups of the log with the columns that the estimator reads, and with their rewards.

    Args:
        learner: has the log.
        names: the names of the reward functions, for each of which the reward of a row stands.
        groups: the numbers of the groups in the step, and the rows of each.
    """
    log: Any = learner.log
    policy = learner.policy
    numbers = [number for _, group in groups for number in group]
    rows = log.rows.take(numbers)
    completions = [log.completions[number] for number in numbers]
    pairs = [(log.prompts[number], log.completions[number]) for number in numbers]
    logprobs = zip(rows.column("logprobs"), completions, strict=True)
    known = [torch.tensor(x or [math.nan] * len(ids)).double() for x, ids in logprobs]
    table = replace(
        demonstration_batch(policy, pairs),
        prompt_index=torch.tensor([place for place, group in groups for _ in group]),
        sampling_logprobs=pad_sequence(known, batch_first=True),
        truncated=torch.tensor([ids[-1] not in policy.ends for ids in completions]),
    )
    table = learner.with_missing_fields(table)
    rewarded = reward_rows(policy, log.rewards, table, rows)
    return replace(
        rewarded,
        data=[{"prompt": row["prompt"]} for row in rows],
        by_function=rewarded.by_function.expand(-1, len(names)),
    )
