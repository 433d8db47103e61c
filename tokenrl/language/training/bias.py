"""Declares what the gradient of a run is in expectation: that of its estimator, unless its settings make it another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.core.effects import BIASED

if TYPE_CHECKING:
    from tokenrl.language.training.arguments import TrainArguments


def bias_of_run(args: TrainArguments) -> str:
    """Return the declared bias of a run's gradient and, where the settings decide it, the reason."""
    estimator = args.estimator
    if args.control_arm != "none":
        return f"not that of the estimator, as this is the control {args.control_arm}"
    if of_context := bias_of_context(args):
        return of_context
    if args.rows is not None and "sampling_logprobs" in estimator.needs:
        return f"{estimator.off_policy_status} in the first pass over the rows; biased later"
    if args.rows is not None:
        return "biased, as the reward-weighted likelihood of the rows is ascended, and not the expected reward"
    if args.replay:
        return "biased, as rewards choose the replayed completions"
    if args.sync_every > 1:
        return f"{estimator.off_policy_status}, as weights of earlier steps sample"
    status = estimator.bias_status
    if args.num_iterations * args.num_minibatches > 1 and status != BIASED:
        status += " at the first update of a step; later ones learn from an older policy"
    return status


def bias_of_context(args: TrainArguments) -> str:
    """Say why a teacher_context makes the gradient biased, whatever the estimator declares; empty if it does not.

    A KL in the reward is one to a teacher that has read the other rows, so a baseline or a scale that is made of
    their rewards depends on the row's own completion.
    """
    if args.teacher_context is None:
        return ""
    if args.allow_own_feedback:
        return "biased, as the teacher may read the row itself, and its KL is none between two policies"
    estimator = args.estimator
    for axis in ("baseline", "scale"):
        if estimator.kl_in_reward and estimator.chosen(axis).compares:
            return (
                f"biased, as the {axis} compares KLs to teachers that have read each other's rows"
            )
    return ""
