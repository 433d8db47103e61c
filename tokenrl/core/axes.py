"""The axes of an estimator and every name on each. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Baseline = Literal[
    "none", "constant", "batch_mean", "running_mean", "group_mean", "rloo",
    "remax", "opo", "optimal", "shrinkage", "value", "episode_mean", "timestep_mean",
]  # fmt: skip
if TYPE_CHECKING:
    BaselineOrFunction = Baseline | Callable[..., Tensor]
else:
    BaselineOrFunction = Baseline  # all that a command line can name
Scale = Literal[
    "none", "group_std", "batch_std", "loo_std", "other_groups_std", "token_whiten", "episode_std"
]  # fmt: skip
OptimalForm = Literal["sequence", "per_timestep", "cumulative"]
Aggregation = Literal["sequence_sum", "sequence_mean", "token_mean", "fixed_length"]
Ratio = Literal["none", "token", "sequence_mean", "sequence_product", "cispo"]
KlEstimator = Literal["k1", "k2", "k3", "k2_sequence", "full_path"]
KlPlacement = Literal["reward", "loss"]
EntropyForm = Literal["per_step", "sequence"]
Returns = Literal["total", "reward_to_go", "blame_window", "gae"]
ZeroSpread = Literal["keep", "drop", "refill"]
Truncations = Literal["keep", "mask", "drop"]

AXES: dict[str, tuple[str, ...]] = {
    "baseline": get_args(Baseline),
    "optimal_form": get_args(OptimalForm),
    "scale": get_args(Scale),
    "aggregation": get_args(Aggregation),
    "ratio": get_args(Ratio),
    "kl_estimator": get_args(KlEstimator),
    "kl_placement": get_args(KlPlacement),
    "entropy_form": get_args(EntropyForm),
    "returns": get_args(Returns),
    "zero_spread": get_args(ZeroSpread),
    "truncations": get_args(Truncations),
}

OVER_GROUP = (
    *("group_mean", "rloo", "opo", "optimal", "shrinkage"),
    *("group_std", "loo_std", "other_groups_std"),
)
OVER_STEP = ("batch_mean", "timestep_mean", "batch_std")
"""The baselines and scales that compare the rows of a group, and of the whole step."""
