"""Makes the schedule of a learning rate, and sets it to any step."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR


def make_schedule(
    kind: Literal["constant", "linear", "cosine"],
    optimizer: Any,
    max_steps: int,
    warmup_steps: int = 0,
) -> LambdaLR:
    """Make a schedule that is stepped after each update.

    The learning rates are those of `transformers.get_scheduler`, of which the import takes longer than
    hundreds of updates of a toy model.

    Args:
        kind: what the learning rate does after the warm-up: stay, or fall to 0.
        optimizer: a torch optimiser with the peak learning rates.
        max_steps: number of updates after which linear and cosine are at 0.
        warmup_steps: number of updates over which the learning rate rises from 0 to its peak.
    """
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, partial(_share, kind=kind, last=max_steps, warmup=warmup_steps))


def _share(done: int, *, kind: str, last: int, warmup: int) -> float:
    """Return the share of the peak learning rate after a number of updates."""
    if done < warmup:
        return done / warmup
    if kind == "linear":
        return max(0.0, (last - done) / max(1, last - warmup))
    if kind == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * ((done - warmup) / max(1, last - warmup)))))
    return 1.0


def load_schedule(schedule: LambdaLR, updates: int) -> None:
    """Put a schedule to where it is after a number of updates, and set the rates that it gives there.

    The rates are computed anew, so they are those of this schedule even if the saved run had another length;
    with the same length they are the same bit for bit.

    Args:
        schedule: the schedule, which may be in any position.
        updates: number of times that the schedule has been stepped.
    """
    schedule.last_epoch = updates
    rates = []
    for group, base, share in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * share(updates)
        rates.append(group["lr"])
    schedule._last_lr = rates
