"""In which steps a policy may move, and at which rate, from the settings and the step alone. Imports no torch."""

from __future__ import annotations

import math
from typing import Any, Literal

from tokenrl.errors import Refused


def policy_steps(args: Any, step: int) -> int:
    """Return in how many of the first steps of a training its policy may move; 0 while a critic learns alone.

    Args:
        args: the settings, which may have a `value_warmup`, or a `control_arm` in which no policy learns.
        step: the number of steps.
    """
    if getattr(args, "control_arm", "") == "best_of_n":
        return 0
    return max(0, step - getattr(args, "value_warmup", 0))


def check_warmup(args: Any) -> None:
    """Refuse a critic that learns first where there is none, or where the policy would never learn."""
    fault = ""
    if args.value_warmup and "values" not in args.estimator.needs:
        fault = "lets the critic alone learn: choose an estimator with a critic, such as a2c"
    elif 0 < (args.max_steps or 0) <= args.value_warmup:
        fault = f"is not less than max_steps={args.max_steps}, so the policy would never learn: raise max_steps"
    if fault:
        raise Refused(f"value_warmup={args.value_warmup} {fault}.")


def share_of_rate(
    kind: Literal["constant", "linear", "cosine"],
    updates: int,
    max_steps: int,
    warmup_steps: int = 0,
) -> float:
    """Return the share of the peak learning rate after a number of updates.

    The learning rates are those of `transformers.get_scheduler`.

    Args:
        kind: what the learning rate does after the warm-up: stay, or fall to 0.
        updates: number of updates made so far.
        max_steps: number of updates after which linear and cosine are at 0.
        warmup_steps: number of updates over which the learning rate rises from 0 to its peak.
    """
    if updates < warmup_steps:
        return updates / warmup_steps
    decay_steps = max(1, max_steps - warmup_steps)
    if kind == "linear":
        return max(0.0, (max_steps - updates) / decay_steps)
    if kind == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * ((updates - warmup_steps) / decay_steps))))
    return 1.0


def set_rates(optimizer: Any, share: float) -> None:
    """Set each learning rate of a torch optimiser to a share of the one with which it was made."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
