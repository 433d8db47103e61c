"""Splits a step over processes and into micro-batches: shares prompts, gathers rows, sums gradients.

Advantages and weights are computed from the whole step, identically on every process, and then sliced; the
completions of one prompt stay on one process. Processes may make different numbers of passes, of different
widths, because their gradients are summed only after the last pass of an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.memories import Memory, read
from tokenrl.core.objectives import check_rewards
from tokenrl.core.rows import Kept, keep
from tokenrl.errors import Stopped
from tokenrl.language.rollout.rewarded import failures_of
from tokenrl.language.rollout.rollout import (
    NOT_YET,
    OF_PROMPTS,
    Rollout,
    lengths,
    to_device,
    to_host,
)
from tokenrl.language.rollout.scoring import Scores
from tokenrl.runs.processes import gather_rows

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.rollout.sampling import Sampling
    from tokenrl.language.training.learner import Learner


def gather(accelerator: Any, rows: Rollout) -> Rollout:
    """Gather the rows of all processes, in the order of the prompts, with rewards in the policy's precision.

    Hidden states and what is no tensor stay with their process.

    Raises:
        Stopped: no row of the step has a reward.
    """
    like, failed = rows.logprobs, failures_of(rows.failures or ())
    names = ("rewards", "by_function", "turn_rewards")
    columns = {name: x.to(like) for name in names if (x := getattr(rows, name)) is not None}
    rows = replace(rows, **columns)
    if accelerator.num_processes > 1:
        columns = {
            name: x for name, x in rows.columns().items() if isinstance(x, Tensor) and x.ndim < 3
        }
        gathered = gather_rows(accelerator, columns, OF_PROMPTS)
        host = dict(zip(gathered, to_host(gathered.values()), strict=True))
        whole = {name: x.to(columns[name].dtype) for name, x in host.items()}
        rows = replace(rows, **dict.fromkeys(rows.columns(), NOT_YET) | whole)
    if not rows.valid.any():
        raise Stopped(
            f"Every reward function abstained from every completion of this step. {failed}".strip()
        )
    return rows


def kept_rows(estimator: Estimator, rows: Rollout, sampling: Sampling) -> Kept:
    """Return which of all N rows count in the divisor, and which tokens are learnt from.

    Raises:
        Refused: A row that does not abstain has a reward that the objective does not take.
    """
    states: dict[str, Any] = {"valid": rows.valid, "truncated": rows.truncated}
    kept = keep(estimator, rows.rewards, rows.mask, group_size=sampling.group_size, **states)
    check_rewards(estimator, rows.rewards, rows.valid)
    return kept


def advantage_inputs(
    rows: Rollout, sampling: Sampling, memory: Memory, rewards: Rewards
) -> dict[str, Any]:
    """Return keyword arguments of `Estimator.advantages`: columns of all N rows, and their sizes."""
    names = ("logprobs", "ref_logprobs", "values", "score_norms", "greedy_rewards", "turns")
    sizes = {"group_size": sampling.group_size, "max_length": sampling.max_completion_length}
    value = None if rows.keys is None else read(memory, rows.keys)  # [N]
    computed = {"baseline_value": value, "components": rows.by_function}
    computed["component_weights"] = torch.from_numpy(rewards.weights)  # [F]
    computed["rewards"] = (
        rows.rewards if rows.turn_rewards is None else rows.turn_rewards
    )  # [N] or [N, T]
    return sizes | {name: getattr(rows, name) for name in names} | computed


def learning_rows(learner: Learner, counting: Kept, advantages: Tensor, chosen: Tensor) -> Tensor:
    """Return True for the rows of an update that can have a gradient [N]; other rows count in divisors only.

    Args:
        learner: the settings.
        counting: which rows of the step, and which of their tokens, are learnt from.
        advantages: one for each row [N] or for each token [N, T].
        chosen: True for the rows of the update [N].
    """
    learning = chosen & counting.counted & counting.mask.any(dim=1)
    if not learner.estimator.loss_side_terms:  # a KL or an entropy term has a gradient everywhere
        learning &= (advantages != 0).reshape(len(learning), -1).any(dim=1)
    return learning


def micro_batches(learner: Learner, rows: Rollout, learning: Tensor) -> list[Tensor]:
    """Divide the rows that this process learns from into micro-batches.

    Args:
        learner: the settings.
        rows: this process's n rows.
        learning: True for those that are learnt from [n].

    Returns:
        For each micro-batch the numbers of its rows; nothing if there are none.
    """
    columns = (learning, lengths(rows.mask), rows.prompt_mask.sum(dim=1))
    packed = _packed(learner, *(x.tolist() for x in columns))
    return [torch.tensor(sorted(part)) for part in packed]


def _packed(
    learner: Learner, active: Sequence[bool], lengths: Sequence[int], prompts: Sequence[int]
) -> list[list[int]]:
    """Fill passes with the active rows of a process, in whole groups, those of the longest completions first.

    A group that is too large for one pass is split, and its prompt is computed again.
    """
    args, size = learner.args, learner.sampling.group_size
    shared = learner.forward.scoring.share_prompt
    limit, most_rows = learner.forward.tokens, args.micro_batch_size or len(active)

    def fits(part: Sequence[int]) -> bool:
        computed = len({i // size for i in part}) if shared else len(part)  # how many prompts
        tokens = len(part) * max(lengths[i] for i in part) + computed * max(
            prompts[i] for i in part
        )
        return tokens <= limit and len(part) <= most_rows

    groups = [[i for i in range(k, k + size) if active[i]] for k in range(0, len(active), size)]
    plan: list[list[int]] = []
    for group in sorted(filter(None, groups), key=lambda part: -max(lengths[i] for i in part)):
        most = max(n for n in range(1, len(group) + 1) if n == 1 or fits(group[:n]))
        for part in (group[k : k + most] for k in range(0, len(group), most)):
            if plan and fits(plan[-1] + part):
                plan[-1] += part
            else:
                plan.append(part)
    return plan


def loss_inputs(rows: Rollout, scores: Scores) -> dict[str, Any]:
    """Return the arguments of `Estimator.loss` for the rows of a micro-batch with their present scores.

    They are on the device of the scores.

    If the present policy is also the one that sampled, the denominator of the ratio is the same number
    without its gradient: the ratio is 1, and its gradient is that of the log-probabilities.
    """
    names = ("advantages", "weights", "mask", "old_logprobs", "sampling_logprobs", "ref_logprobs")
    columns = {name: getattr(rows, name) for name in names}
    device = scores.logprobs.device
    inputs = {name: None if x is None else to_device(x, device) for name, x in columns.items()}
    if rows.old_logprobs is None:
        inputs["old_logprobs"] = scores.logprobs.detach()
    return inputs | {
        "logprobs": scores.logprobs,
        "entropy": scores.entropy,
        "centres": scores.centres,
    }
