"""Splits a step over processes and into micro-batches: shares prompts, gathers rows, sums gradients.

Advantages and weights are computed from the whole step, identically on every process, and then sliced; the
completions of one prompt stay on one process. The passes of a process are its own affair, as many and as wide
as its rows need: processes meet only after the last pass of an update, where their gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

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
        logprobs: log-probabilities of the tokens under the policy before its update [N, T].
        entropy: entropy of that policy at each action, in nats [N, T].
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


def learning_rows(learner: Learner, kept: Kept, advantages: Tensor, chosen: Tensor) -> Tensor:
    """Return True for the rows of an update that can have a gradient [N]; the others count in weights alone.

    Args:
        learner: the settings.
        kept: which rows of the step, and which of their tokens, are learnt from.
        advantages: one for each row [N] or for each token [N, T].
        chosen: True for the rows of the update [N].
    """
    learning = chosen & kept.counted & kept.mask.any(dim=1)
    if not learner.estimator.loss_side_terms:  # a KL or an entropy term has a gradient everywhere
        learning &= (advantages != 0).reshape(len(learning), -1).any(dim=1)
    return learning


def first_half(kept: Kept, chosen: Tensor, group_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Divide the groups of an update that count into two halves, whose gradients are compared.

    Returns:
        True for the rows of the first half [N], and how many groups are in the first and the second half.
    """
    counted = (chosen & kept.counted).view(-1, group_size).any(dim=1)  # [B]
    groups = int(counted.sum())
    first = counted.cumsum(0) <= groups // 2
    return first.repeat_interleave(group_size), (groups // 2, groups - groups // 2)


def micro_batches(learner: Learner, rows: StepRows, learning: Tensor) -> list[Tensor]:
    """Divide the rows that this process learns from into micro-batches.

    Args:
        learner: the settings.
        rows: all N rows of the step.
        learning: True for the rows that are learnt from [N].

    Returns:
        For each micro-batch the numbers of its rows among this process's own; nothing if it has none.
    """
    columns = (learning, rows.mask.sum(dim=1), rows.prompt_length)
    local = (share(learner.accelerator, x).tolist() for x in columns)
    return [torch.tensor(sorted(part), device=learning.device) for part in _packed(learner, *local)]


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
        """Return the rows of these numbers [m], cut to their longest completion."""
        rollout = self.rollout.rows(index)

        def cut(x: Tensor) -> Tensor:
            return x[index] if x.ndim == 1 else x[index, : rollout.mask.shape[1]]

        ref, old = (None if x is None else cut(x) for x in (self.ref_logprobs, self.old_logprobs))
        return Part(rollout, cut(self.advantages), cut(self.weights), ref, old)

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
            "sampling_logprobs": self.rollout.sampling_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "entropy": scores.entropy,
        }


def sum_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over processes, once after an update's last pass, so that passes need not be equal.

    A weight without a gradient counts as one whose gradient is 0.
    """
    if accelerator.num_processes > 1:
        for p in parameters:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = accelerator.reduce(grad, reduction="sum")
