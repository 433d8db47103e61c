"""Defines the words for the effect of a choice on the expected gradient, and the rows of `choices`.

This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXACT = "exact"
UP_TO_SCALE = "exact_up_to_scale"
PER_PROMPT = "exact_per_prompt"
ASYMPTOTIC = "asymptotic"
BIASED = "biased"
UNKNOWN = "unknown"

FROM_BEST_TO_WORST = (EXACT, UP_TO_SCALE, PER_PROMPT, ASYMPTOTIC, BIASED, UNKNOWN)
"""What the expected gradient is, compared with the gradient of the objective:

- `exact`: that gradient itself.
- `exact_up_to_scale`: that gradient times one positive number, the same for all prompts.
- `exact_per_prompt`: each prompt's gradient times a positive number of its own.
- `asymptotic`: right in direction in the limit of many rows per step.
- `biased`: wrong in direction; the reason names the objective that is ascended instead, if there is one.
- `unknown`: not decided by the settings."""


@dataclass(frozen=True)
class Effect:
    """What a choice does to the expected gradient: a status of `FROM_BEST_TO_WORST`, and the reason."""

    status: str
    reason: str


@dataclass(frozen=True)
class Choice(Effect):
    """One name on one axis: its effect, and every other fact about it that the code uses.

    Attributes:
        compares: What a baseline or scale compares: the rows of a group, the rows of the whole step, or the
            steps of one row. None if it compares nothing.
        needs: The argument of `Estimator.advantages` that the choice requires; empty if none.
        centred: Whether the baseline equals the return in every group of equal returns.
        whole_row: Whether a ratio or an entropy sums over the row, which must then not be split.
        row_inside: The effect with `leave_one_out=False`, for a baseline that has both forms.
        discounted: The effect with gamma below 1.
    """

    compares: Literal["group", "step", "row"] | None = None
    needs: str = ""
    centred: bool = False
    whole_row: bool = False
    row_inside: Effect | None = None
    discounted: Effect | None = None
