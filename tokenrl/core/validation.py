"""Checks which choices of an estimator go together. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.core.choices import KL_EFFECTS, choice_of
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


IN_UNITS_OF_THE_EPISODE = ("none", "constant", "value", "timestep_mean", "episode_mean")
"""Baselines that do not use the total returns of rows, or that learn the same numbers as are credited."""


def check(estimator: Estimator) -> None:
    """Refuse choices that exclude each other. The bounds of each field by itself stand beside the field.

    Raises:
        Refused: For the first pair that does not go together.
    """
    place, kind = estimator.kl_placement, estimator.kl_estimator
    if estimator.needs_kl and (place, kind) not in KL_EFFECTS:
        raise Refused(
            f"kl_estimator {kind!r} is made for the loss, where its gradient is that of the KL, but "
            f"kl_placement is {place!r}. Set kl_placement 'loss', or take kl_estimator 'k1', which is exact "
            "in the reward."
        )
    for axis in ("baseline", "scale"):
        name = getattr(estimator, axis)
        if choice_of(axis, name).compares == "row" and estimator.returns == "total":
            raise Refused(
                f"{name!r} compares the steps of one row, but with returns 'total' every step has the same "
                "return. Set returns 'reward_to_go', or choose another baseline and scale."
            )
    of_totals = not callable(estimator.baseline) and estimator.baseline not in IN_UNITS_OF_THE_EPISODE
    if estimator.returns == "episode_normalized" and of_totals:
        raise Refused(
            "returns 'episode_normalized' have mean 0 and standard deviation 1 in each episode, but the "
            f"baseline {estimator.baseline!r} is made of whole returns, which are in other units. Choose the "
            "baseline 'none' or 'value', or returns 'reward_to_go'."
        )
