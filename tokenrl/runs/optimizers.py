"""Makes the schedule of a learning rate, and keeps what an optimiser and its schedule have become.

A run can then go on exactly where it was. The settings of an optimiser (weight decay, betas) are not kept:
they come from the run's configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tokenrl.errors import Refused

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the moments and counts of every parameter, and the learning rate of every group.

    Args:
        optimizer: an optimiser of torch, bare or wrapped by accelerate.

    Returns:
        `parameters`: by the number of the parameter, as text, its tensors by name (a parameter without any
        gradient so far has none); `rates`: the learning rates; `sizes`: the number of parameters of each
        group. The tensors are the optimiser's own, not copies.
    """
    saved = _bare(optimizer).state_dict()
    return {
        "parameters": {str(number): dict(state) for number, state in saved["state"].items()},
        "rates": [float(group["lr"]) for group in saved["param_groups"]],
        "sizes": [len(group["params"]) for group in saved["param_groups"]],
    }


def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Continue from what `optimizer_state` returned; the optimiser takes over the tensors.

    Args:
        optimizer: an optimiser of the same parameters in the same order.
        state: the saved state.

    Raises:
        Refused: the optimiser has other parameters than the one that was saved.
    """
    bare = _bare(optimizer)
    own = bare.state_dict()
    groups, tensors = own["param_groups"], state["parameters"]
    sizes = [len(group["params"]) for group in groups]
    weights = [weight for group in bare.param_groups for weight in group["params"]]
    unlike = [
        number
        for number, kept in tensors.items()
        for tensor in kept.values()
        if int(number) >= len(weights) or (tensor.ndim and tensor.shape != weights[int(number)].shape)
    ]
    if sizes != list(state["sizes"]) or unlike:
        raise Refused(
            f"The saved optimiser has groups of {state['sizes']} parameters and this run has {sizes}"
            + (f"; the shape of number {unlike[0]} differs" if unlike else "")
            + ". Resume with the model and the adapter that the run was started with, or start anew."
        )
    for group, rate in zip(groups, state["rates"], strict=True):
        group["lr"] = rate
    bare.load_state_dict({"state": {int(k): kept for k, kept in tensors.items()}, "param_groups": groups})


def make_schedule(
    kind: Literal["constant", "linear", "cosine"], optimizer: Any, max_steps: int, warmup_steps: int = 0
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


def _share(done: float, *, kind: str, last: int, warmup: int) -> float:
    """Return the share of the peak learning rate after a number of updates."""
    if done < warmup:
        return done / warmup
    if kind == "linear":
        return max(0.0, (last - done) / max(1, last - warmup))
    if kind == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * ((done - warmup) / max(1, last - warmup)))))
    return 1.0


def load_schedule(schedule: LambdaLR, updates: float) -> None:
    """Put a schedule to where it is after a number of updates, and set the rates that it gives there.

    The rates are computed anew, so they are those of this schedule even if the saved run had another length;
    with the same length they are the same bit for bit.

    Args:
        schedule: the schedule, which may be in any position.
        updates: number of times that the schedule has been stepped; it may also be between two of them.
    """
    place: Any = updates  # torch says int, and computes the rate of any number
    schedule.last_epoch = place
    rates = [base * rate(place) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _bare(optimizer: Any) -> Any:
    """Return the optimiser that accelerate has wrapped, or the optimiser itself."""
    return getattr(optimizer, "optimizer", optimizer)
