"""Holds the data that the updates of a step learn from, whole and cut into micro-batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tokenrl.core.rows import Kept
from tokenrl.language.rollout.prompts import SharedPrompts
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.scoring import Scores
from tokenrl.language.training.processes import StepRows, share


class Batch(NamedTuple):
    """The data that the updates of a step learn from: this process's n rows, and numbers of all N rows.

    Attributes:
        rollout: this process's n rows, as wide as its own longest completion.
        rows: all N rows.
        kept: which rows, and which of their tokens [N, T], enter the loss and its divisor.
        advantages: one for each row [N] or for each token [N, T].
        old_logprobs: log-probabilities of this process's rows under the policy that sampled them [n, T]; None
            if no update needs them (see `collect.old_logprobs`).
    """

    rollout: Rollout
    rows: StepRows
    kept: Kept
    advantages: Tensor
    old_logprobs: Tensor | None

    def part(self, rows: Tensor, weights: Tensor, accelerator: Any, prompts: SharedPrompts | None) -> Part:
        """Return the micro-batch of some of this process's rows; without any, one row of weight 0.

        Args:
            rows: numbers of rows [m].
            weights: each token's weight in the loss of the whole update [N, T].
            accelerator: accelerate's handle of the processes.
            prompts: shared with other micro-batches; None to compute the prompts for this one alone.
        """
        waits = len(rows) == 0
        rows = rows.new_zeros(1) if waits else rows
        rollout = self.rollout.rows(rows, None if prompts is None else prompts.rows)

        def own(whole: Tensor) -> Tensor:
            mine = share(accelerator, whole)[rows]
            return mine if mine.ndim == 1 else mine[:, : rollout.mask.shape[1]]

        return Part(
            rollout,
            own(self.advantages),
            own(weights) * (0.0 if waits else 1.0),
            None if self.rows.ref_logprobs is None else own(self.rows.ref_logprobs),
            None if self.old_logprobs is None else self.old_logprobs[rows, : rollout.mask.shape[1]],
            prompts,
        )


class Part(NamedTuple):
    """A micro-batch: m of this process's rows, cut to their longest completion.

    Attributes:
        rollout: the rows.
        advantages: one for each row [m] or for each token [m, T].
        weights: each token's weight in the loss of the whole update [m, T].
        ref_logprobs: log-probabilities under the reference [m, T]; None without a KL.
        old_logprobs: log-probabilities under the policy that sampled [m, T]; None if that is the present one.
        prompts: shared with other micro-batches; None to compute the prompts for this one alone.
    """

    rollout: Rollout
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    old_logprobs: Tensor | None
    prompts: SharedPrompts | None

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
