"""Holds the data that the updates of a step learn from, whole and cut into micro-batches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokenrl.core.rows import Kept
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.scoring import Scores
from tokenrl.language.training.processes import StepRows


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


class Part(NamedTuple):
    """A micro-batch: m of this process's rows, cut to their longest completion.

    Attributes:
        rollout: the rows.
        advantages: one for each row [m] or for each token [m, T].
        weights: each token's weight in the loss of the whole update [m, T].
        ref_logprobs: log-probabilities under the reference [m, T]; None without a KL.
        old_logprobs: log-probabilities under the policy that sampled [m, T]; None if that is the present one.
    """

    rollout: Rollout
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    old_logprobs: Tensor | None

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
