"""Which fields an estimator may have, by themselves and together. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.core.axes import AXES
from tokenrl.core.effects import KL_EFFECTS
from tokenrl.errors import Refused
from tokenrl.settings import check_choice, check_number

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator

BOUNDS: dict[str, dict[str, float]] = {
    "baseline_constant": {},
    "running_mean_init": {},
    "running_mean_decay": {"at_least": 0.0, "below": 1.0},
    "shrinkage_weight": {"at_least": 0.0, "at_most": 1.0},
    "scale_eps": {"at_least": 0.0},
    "epsilon": {"above": 0.0, "at_most": 1.0},
    "epsilon_high": {"above": 0.0},
    "dual_clip": {"above": 1.0},
    "importance_cap": {"at_least": 1.0},
    "beta": {"at_least": 0.0},
    "entropy_coef": {"at_least": 0.0},
    "gamma": {"above": 0.0, "at_most": 1.0},
    "lam": {"at_least": 0.0, "at_most": 1.0},
    "value_clip": {"above": 0.0},
}
OPTIONAL = (
    *("running_mean_decay", "shrinkage_weight", "epsilon_high"),
    *("dual_clip", "importance_cap", "value_clip"),
)
"""The numbers that may be None."""
COUNTS = {"window": 1, "overlong_buffer": 0}
"""The whole numbers, and the least of each."""


def check(estimator: Estimator) -> None:
    """Refuse names that are unknown, numbers out of range, and choices that exclude each other.

    Raises:
        Refused: For the first of them.
    """
    for axis, known in AXES.items():
        if not (axis == "baseline" and callable(estimator.baseline)):
            check_choice(axis, getattr(estimator, axis), known)
    for name, bounds in BOUNDS.items():
        value = getattr(estimator, name)
        if not (value is None and name in OPTIONAL):
            check_number(name, value, **bounds)
    for name, least in COUNTS.items():
        value = getattr(estimator, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise Refused(f"{name} was given as {value!r}; it must be a whole number of at least {least}.")
    if estimator.scale_ddof not in (0, 1):
        raise Refused(f"scale_ddof was given as {estimator.scale_ddof!r}; it must be 0 or 1.")
    if not isinstance(estimator.leave_one_out, bool):
        raise Refused(f"leave_one_out was given as {estimator.leave_one_out!r}; it must be True or False.")
    _check_pairs(estimator)


def _check_pairs(estimator: Estimator) -> None:
    place, kind = estimator.kl_placement, estimator.kl_estimator
    if estimator.needs_kl and (place, kind) not in KL_EFFECTS:
        raise Refused(
            f"kl_estimator {kind!r} is made for the loss, where its gradient is that of the KL, but "
            f"kl_placement is {place!r}. Set kl_placement 'loss', or take kl_estimator 'k1', exact in "
            "the reward."
        )
    for choice in (estimator.baseline, estimator.scale):
        if choice in ("episode_mean", "episode_std") and estimator.returns == "total":
            raise Refused(
                f"{choice!r} compares the steps of one row, but with returns 'total' every step is paid the "
                "same. Set returns 'reward_to_go', or choose another baseline and scale."
            )
