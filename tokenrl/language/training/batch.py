"""Splits a step over processes and into micro-batches: shares prompts, gathers rows, plans the passes.

Advantages and weights are computed from the whole step, identically on every process, and then sliced; the
completions of one prompt stay on one process. Each process makes the same number of passes, because gradients
are averaged over processes in the last of them: a process without one would hang the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tokenrl.core.rows import Kept, keep
from tokenrl.errors import Stopped
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Scores

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator
    from tokenrl.language.training.learner import Learner

Whole = TypeVar("Whole", Tensor, list[Any])


class StepRows(NamedTuple):
    """Rows of a step, the G completions of each prompt one after the other: those of a process, or all N.

    Attributes:
        rewards: total reward of each completion [N].
        by_function: reward from each of F functions, NaN where it abstained [N, F].
        valid: False where every function abstained [N].
        truncated: True where the completion was cut at the maximum length before an EOS [N].
        prompt_length: number of tokens of the prompt [N].
        mask: True on actions [N, T].
        logprobs: log-probabilities of the tokens under the distribution they were sampled from [N, T].
        entropy: entropy of that distribution at each action, in nats [N, T].
        ref_logprobs: log-probabilities of the tokens under the reference [N, T]; None without a KL.
        values: the critic's value of the state before each action [N, T]; None without a critic.
        score_norms: squared norm of each action's score [N, T]; None unless the baseline is weighted by it.
        greedy_rewards: reward of the greedy completion of the row's prompt [N]; None unless it is needed.
    """

    rewards: Tensor
    by_function: Tensor
    valid: Tensor
    truncated: Tensor
    prompt_length: Tensor
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    score_norms: Tensor | None = None
    greedy_rewards: Tensor | None = None

    def inputs(self, sampling: Sampling, baseline_value: Tensor | float) -> dict[str, Any]:
        """Return keyword arguments of `Estimator.advantages`: those of the rows and their sizes."""
        names = ("logprobs", "ref_logprobs", "values", "score_norms", "greedy_rewards")
        sizes = {"group_size": sampling.group_size, "max_length": sampling.max_completion_length}
        return sizes | {name: getattr(self, name) for name in names} | {"baseline_value": baseline_value}

    def kept(self, estimator: Estimator, group_size: int) -> Kept:
        """Say which rows are compared, and which of them, and of their tokens, are learnt from."""
        sizes: dict[str, Any] = {"group_size": group_size, "valid": self.valid, "truncated": self.truncated}
        return keep(estimator, self.rewards, self.mask, **sizes)


def share(accelerator: Any, whole: Whole) -> Whole:
    """Return this process's slice of what all processes hold; the slices have equal lengths."""
    size = len(whole) // accelerator.num_processes
    start = accelerator.process_index * size
    return whole[start : start + size]


def gather(accelerator: Any, rows: StepRows) -> StepRows:
    """Gather the rows of all processes, in the order of the prompts and padded to the longest completion.

    Raises:
        Stopped: no row of the step has a reward.
    """
    if accelerator.num_processes > 1:
        # Padding would turn a bool mask into int64, and only on the processes that need padding.
        own = rows._replace(mask=rows.mask.to(torch.uint8))._asdict()
        known = {name: x for name, x in own.items() if x is not None}
        known = accelerator.gather(accelerator.pad_across_processes(known, dim=1))
        rows = StepRows(**known | {"mask": known["mask"].bool()})
    if not rows.valid.any():
        raise Stopped("Every reward function abstained from every completion of this step.")
    return rows


def passes(
    learner: Learner, rows: StepRows, kept: Kept, advantages: Tensor, chosen: Tensor, measured: bool
) -> tuple[list[Tensor], int]:
    """Divide the rows of an update into micro-batches, as many on every process.

    Rows that can have no gradient are left out; they count in the weights alone.

    Args:
        learner: the settings.
        rows: all N rows of the step.
        kept: which of them, and of their tokens, are learnt from.
        advantages: one for each row [N] or for each token [N, T].
        chosen: True for the rows of the update [N].
        measured: whether the gradient of the first half of the groups is wanted apart.

    Returns:
        For each micro-batch the numbers of its rows among this process's own, none where only other processes
        have work; and how many micro-batches are those of the first half.
    """
    active = chosen & kept.counted & kept.mask.any(dim=1)
    if not learner.estimator.loss_side_terms:  # a KL or an entropy term has a gradient everywhere
        active &= (advantages != 0).reshape(len(active), -1).any(dim=1)
    row = torch.arange(len(active), device=active.device)
    size = learner.sampling.group_size
    middle = len(row) // size // 2 * size if measured else 0
    first, second = (_equally_many(learner, rows, active & half) for half in (row < middle, row >= middle))
    return first + second, len(first)


def _equally_many(learner: Learner, rows: StepRows, active: Tensor) -> list[Tensor]:
    """Return the passes of this process, and empty ones until it has as many as any other process."""
    accelerator = learner.accelerator
    columns = (active, rows.mask.sum(dim=1), rows.prompt_length)
    shares = (x.view(accelerator.num_processes, -1).tolist() for x in columns)
    plans = [_packed(learner, *numbers) for numbers in zip(*shares, strict=True)]
    mine = plans[accelerator.process_index]
    mine += [[]] * (max(map(len, plans)) - len(mine))
    return [torch.tensor(sorted(part), dtype=torch.int64, device=active.device) for part in mine]


def _packed(
    learner: Learner, active: Sequence[bool], lengths: Sequence[int], prompts: Sequence[int]
) -> list[list[int]]:
    """Fill passes with the active rows of a process, in whole groups, those of the longest completions first.

    A group that is too large for one pass is split, and its prompt is computed again.
    """
    args, size = learner.args, learner.sampling.group_size
    shared = learner.forward.scoring.share_prompt
    assert args.tokens_per_pass is not None  # `choose_forward` has filled it in
    limit, most_rows = args.tokens_per_pass, args.micro_batch_size or len(active)

    def fits(part: Sequence[int]) -> bool:
        computed = len({i // size for i in part}) if shared else len(part)  # how many prompts
        tokens = len(part) * max(lengths[i] for i in part) + computed * max(prompts[i] for i in part)
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


class Part(NamedTuple):
    """What an update learns from: this process's n rows, or m of them in a micro-batch.

    Attributes:
        rollout: the rows.
        advantages: one for each row [n] or for each token [n, T].
        weights: each token's weight in the loss of the whole update [n, T].
        ref_logprobs: log-probabilities under the reference [n, T]; None without a KL.
        old_logprobs: log-probabilities under the policy that sampled [n, T]; None if that is the present one.
    """

    rollout: Rollout
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    old_logprobs: Tensor | None

    def rows(self, index: Tensor) -> Part:
        """Return the rows of these numbers [m], cut to their longest completion; for none one of weight 0."""
        is_any = len(index) > 0
        index = index if is_any else index.new_zeros(1)
        rollout = self.rollout.rows(index)

        def cut(x: Tensor) -> Tensor:
            return x[index] if x.ndim == 1 else x[index, : rollout.mask.shape[1]]

        ref, old = (None if x is None else cut(x) for x in (self.ref_logprobs, self.old_logprobs))
        return Part(rollout, cut(self.advantages), cut(self.weights) * is_any, ref, old)

    def old(self, logprobs: Tensor) -> Tensor:
        """Return the denominator of the ratio as log-probabilities [m, T].

        `logprobs` are those of the present policy. If it is also the one that sampled, the denominator is the
        same number without its gradient: the ratio is 1, and its gradient is that of `logprobs`.
        """
        return logprobs.detach() if self.old_logprobs is None else self.old_logprobs

    def inputs(self, scores: Scores) -> dict[str, Tensor | None]:
        """Return the keyword arguments of `Estimator.loss`."""
        return {
            "old_logprobs": self.old(scores.logprobs),
            "sampling_logprobs": self.rollout.logprobs,
            "ref_logprobs": self.ref_logprobs,
            "entropy": scores.entropy,
        }


def averaging(accelerator: Any, model: Any, last: bool) -> contextlib.AbstractContextManager[None]:
    """Let a backward pass average gradients over processes if it is the last one of an update."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)  # type: ignore[no-any-return]
