"""The axes of an estimator and every name on each, built or not. `bias.BUILT` has the names that work."""

from __future__ import annotations

from typing import Literal, get_args

Baseline = Literal[
    "none", "constant", "batch_mean", "running_mean", "group_mean", "rloo",
    "remax", "opo", "optimal", "shrinkage", "value", "episode_mean", "timestep_mean",
]  # fmt: skip
Scale = Literal[
    "none", "group_std", "batch_std", "loo_std", "other_groups_std", "token_whiten", "episode_std"
]  # fmt: skip
Aggregation = Literal["sequence_sum", "sequence_mean", "token_mean", "fixed_length"]
Ratio = Literal["none", "token", "sequence_mean", "sequence_product", "cispo"]
KlEstimator = Literal["k1", "k2", "k3", "full_path"]
KlPlacement = Literal["reward", "loss"]
EntropyForm = Literal["per_step", "sequence"]
Returns = Literal["total", "reward_to_go", "blame_window", "gae"]
ZeroSpread = Literal["keep", "drop", "refill"]
Truncations = Literal["keep", "mask", "drop"]

AXES: dict[str, tuple[str, ...]] = {
    "baseline": get_args(Baseline),
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

OVER_GROUP = ("group_mean", "rloo", "group_std")
OVER_STEP = ("batch_mean", "batch_std")
"""The baselines and scales that compare the rows of a group, and of the whole step."""
