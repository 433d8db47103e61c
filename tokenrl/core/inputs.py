"""Holds what advantages are computed from: the arguments, and the step that baselines and scales read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from tokenrl.core import guards
from tokenrl.core.choices import choice_of

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


class Inputs(NamedTuple):
    """The arguments of `Estimator.advantages`; its docstring explains them."""

    rewards: Float[Tensor, " N *T"]
    mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"]
    group_size: int | None
    valid: Bool[Tensor, " N"] | None
    logprobs: Float[Tensor, "N T"] | None
    ref_logprobs: Float[Tensor, "N T"] | None
    values: Float[Tensor, "N T"] | None
    bootstrap: Float[Tensor, " N"] | None
    greedy_rewards: Float[Tensor, " N"] | None
    score_norms: Float[Tensor, "N T"] | None
    baseline_value: float | Tensor | None
    max_length: int | None


class Step(NamedTuple):
    """What baselines and scales are computed from: an estimator and the step that it was given."""

    estimator: Estimator
    inputs: Inputs
    valid: Bool[Tensor, " N"]
    actions: Bool[Tensor, "N T"]
    """The actions of valid rows."""
    totals: Float[Tensor, " N"]
    """Return of each row: the sum of its rewards, discounted by gamma."""
    returns: Float[Tensor, " N *T"]
    """Return of each action [N, T], or [N, 1] where all actions of a row share the row's."""

    def set_size(self, axis: str) -> int | None:
        """Return how many consecutive rows the baseline or the scale compares; None when it compares none."""
        return guards.set_size(self.estimator, axis, len(self.totals), self.inputs.group_size)

    def needed(self) -> Any:
        """Return the input that the baseline requires.

        Raises:
            Refused: When it was not given.
        """
        baseline = self.estimator.baseline
        name = choice_of("baseline", baseline).needs
        return guards.given(name, getattr(self.inputs, name), f"the baseline {baseline!r}")
