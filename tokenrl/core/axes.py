"""The names that each field of an estimator may hold, as types for the command line. Imports no torch.

The names are written once, in the table of `choices`. At run time each type below is the `Literal` of its
names, and `tokenrl train --help` lists them from it. A type checker cannot read the table, so for it each
type is `str`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from tokenrl.core.choices import CHOICES, KL_EFFECTS
from tokenrl.settings import OR_FUNCTION

if TYPE_CHECKING:
    from torch import Tensor

AXES: dict[str, tuple[str, ...]] = {axis: tuple(rows) for axis, rows in CHOICES.items()} | {
    "kl_estimator": tuple(dict.fromkeys(estimate for _, estimate in KL_EFFECTS)),
    "kl_placement": tuple(dict.fromkeys(place for place, _ in KL_EFFECTS)),
}

if TYPE_CHECKING:
    Baseline = str
    BaselineOrFunction = Baseline | Callable[..., Tensor]
    OptimalForm = str
    Scale = str
    Aggregation = str
    Ratio = str
    KlEstimator = str
    KlPlacement = str
    EntropyForm = str
    Returns = str
    ZeroSpread = str
    Truncations = str
else:
    Baseline = Literal[AXES["baseline"]]
    BaselineOrFunction = Annotated[Baseline, OR_FUNCTION]
    OptimalForm = Literal[AXES["optimal_form"]]
    Scale = Literal[AXES["scale"]]
    Aggregation = Literal[AXES["aggregation"]]
    Ratio = Literal[AXES["ratio"]]
    KlEstimator = Literal[AXES["kl_estimator"]]
    KlPlacement = Literal[AXES["kl_placement"]]
    EntropyForm = Literal[AXES["entropy_form"]]
    Returns = Literal[AXES["returns"]]
    ZeroSpread = Literal[AXES["zero_spread"]]
    Truncations = Literal[AXES["truncations"]]
