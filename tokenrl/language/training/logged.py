"""Reads completions that somebody else sampled, encodes them once, and makes rows of training steps of them.

A logged row counts like one that the policy samples: its group is whole, its reward is compared, and the estimator's
importance weights it by the log-probabilities of whoever sampled it. With weights of sequences the gradient is that of
the policy's expected reward while no row has moved the policy yet. Without log-probabilities nothing is corrected: the
reward-weighted likelihood of the rows is ascended, which is another objective.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tokenrl.core.statistics import generator_of
from tokenrl.errors import Refused, refusing
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.stops import decoded
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.forward import shape_of
from tokenrl.language.rollout.rewarded import Rewarded, reward_rows
from tokenrl.language.rollout.sampling import encode
from tokenrl.language.supervised.fit import demonstration_batch, encode_demonstrations
from tokenrl.language.tasks.held_out import read_parts
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.sources import LeftOut, with_prompts
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import PromptTask, is_unrewarded
from tokenrl.settings import LARGEST_REWARD

if TYPE_CHECKING:
    from tokenrl.language.training.arguments import TrainArguments
    from tokenrl.language.training.learner import Learner


def read_log(args: TrainArguments, task: PromptTask, reads_more: bool) -> Rows | None:
    """Read the rows that a run shall learn of, but for those of held-out prompts; None where none were given.

    Args:
        args: the settings of the run.
        task: its task.
        reads_more: whether a teacher reads other prompts than the policy.

    Raises:
        Refused: they cannot be read, there are none, or something else was given that cannot be done with them.
    """
    if args.rows is None:
        return None
    read = partial(with_prompts, data=args, chat=bool(args.chat))
    rows = read_parts(args.rows, "rows", "train", None, read)[0]
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
        f"{lacking:,} without logprobs: add this column, or take importance none, which is biased": (
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
        "top_k, top_p or min_p, without which every token can be sampled": not args.is_whole,
        "a control arm, which stands for what the policy samples": args.control_arm != "none",
        "reward none": is_unrewarded(args.reward),
        "a teacher that reads other prompts": reads_more,
        "a baseline of yours or remax, as they have no greedy completions and need not have other columns": (
            callable(estimator.baseline) or "greedy_rewards" in estimator.needs
        ),
        "components separate, as they have one reward": estimator.components == "separate",
    }
    for clash, is_met in clashes.items():
        if is_met:
            raise Refused(f"rows cannot be learnt with {clash}. Change one of the two.")
    held_out = {*np.setdiff1d(task.eval_prompts.hashes, task.train_prompts.hashes)}
    # A run marks in its tables what it did not sample in that step.
    is_kept = [
        key not in held_out and not (row.get("replayed") or row.get("logged"))
        for key, row in zip(rows.hashes, rows, strict=True)
    ]
    return rows.take(np.flatnonzero(is_kept))


def logged_groups(
    rows: Rows, learner: Learner, rewards: Rewards, note: Callable[[str], None]
) -> PromptStream:
    """Return what draws groups of logged rows, whose column `encoded` has the ids of prompt and completion.

    Rows are cut into groups in random order, as logs may be sorted.

    Args:
        rows: the rows.
        learner: the policy and the settings.
        rewards: the reward functions of rows without a reward.
        note: prints what was read.

    Raises:
        Refused: a row is wrong, the log-probabilities are not those of its tokens, or no group is left.
    """
    args, policy = learner.args, learner.policy
    completions = [_completion_ids(policy, row) for row in rows]
    pairs = [*zip(encode(policy, rows, learner.sampling), completions, strict=True)]
    rows = replace(rows, columns=rows.columns | {"encoded": pairs})
    groups: list[Any] = []
    begun: Any = defaultdict(list)
    lost = 0
    for number in torch.randperm(len(rows), generator=generator_of(args.seed, "log")).tolist():
        if not 0 < len(completions[number]) <= args.max_completion_length:
            lost += 1
            continue
        members = begun[rows.hashes[number]]
        members.append(number)
        if len(members) == args.num_generations:
            groups.append(rows.take(members))
            members.clear()
    line = (
        f"{len(groups):,} groups of {args.num_generations}, of {len(rows):,} rows without held-out prompts; {lost:,} "
        f"are longer than {args.max_completion_length} tokens or read otherwise once this tokenizer encodes them, the "
        "others fill no group"
    )
    if not groups:
        raise Refused(
            f"There are {line}. Give other rows, a larger max_completion_length (--max-completion-length), or "
            "fewer num_generations (--num-generations)."
        )
    if "reward" not in rows.columns:
        rewards.check_columns(rows.columns)
    note(f"rows: {line}")
    return PromptStream(groups, args.seed)


def _completion_ids(policy: Policy, row: Any) -> list[int]:
    """Return the ids of a row's completion, once its values are checked; none of a text that reads otherwise then.

    Raises:
        Refused: one of its values is none that a sampled row can have.
    """
    ids, logprobs = row.get("completion_ids"), row.get("logprobs")
    with refusing(
        f"rows, {row.location}: these are no values of a sampled completion",
        "A completion is text, or ids of the vocabulary with no end but the last; a reward is a number, or none, "
        "truncated true or false, and logprobs are from -1000 to 0, one for each token and the end. Others may be of "
        "another tokenizer: give completion_ids of this one, or leave logprobs out.",
    ):
        if ids is None:
            unlimited = replace(policy, context=None)  # what is too long is left out
            ids = encode_demonstrations(unlimited, [row])[0][1]
            ids = ids[: len(ids) - bool(row.get("truncated"))]
            if decoded(policy.tokenizer, [ids]) != [row["completion"]]:
                return []
        if (
            not 0 <= min(ids) <= max(ids) < shape_of(policy).vocab_size
            or {*ids[:-1]} & {*policy.ends}
            or not abs(row.get("reward") or 0) <= LARGEST_REWARD
            or (logprobs is not None and len(logprobs) != len(ids))
            or not all(-1000 <= x <= 0 for x in logprobs or ())
            or row.get("truncated") not in (None, True, False)
        ):
            raise ValueError(f"{len(ids)} tokens")
    return [*map(int, ids)]


def recorded_reward(reward: Any, **_: Any) -> Any:
    """Return the rewards that stand in the rows of a log."""
    return reward


def logged_rows(learner: Learner, rewards: Rewards, groups: Sequence[tuple[int, Any]]) -> Rewarded:
    """Return the rows of groups of the log with the columns that the estimator reads, and with their rewards.

    Where rows have a reward, it stands for that of each reward function.
    """
    policy = learner.policy
    rows = Rows.of(chain(*(group for _, group in groups)))
    pairs = rows.columns["encoded"]
    logprobs = [
        torch.tensor(x or [math.nan] * len(ids), dtype=torch.float64)
        for x, (_, ids) in zip(rows.column("logprobs"), pairs, strict=True)
    ]
    table = replace(
        demonstration_batch(policy, pairs),
        prompt_index=torch.tensor([number for number, group in groups for _ in group]),
        sampling_logprobs=pad_sequence(logprobs, batch_first=True),
        truncated=torch.tensor([ids[-1] not in policy.ends for _, ids in pairs]),
    )
    table = learner.with_missing_fields(table)
    recorded = Rewards([recorded_reward]) if "reward" in rows.columns else rewards
    rewarded = reward_rows(policy, recorded, table, rows)
    return replace(
        rewarded,
        data=[*rows.with_columns(["prompt"])],
        by_function=rewarded.by_function.expand(-1, len(rewards.names)),
    )
