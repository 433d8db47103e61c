"""The words for what a choice does to the expected gradient, and the shape of a row of `choices`.

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
"""exact: the gradient itself. exact_up_to_scale: times one positive number, the same for all prompts.
exact_per_prompt: times a positive number for each prompt. asymptotic: the direction is right in the limit
of many rows a step. biased: it is not; the reason names the objective that ascends instead, when there is
one. unknown: the settings do not decide it."""


@dataclass(frozen=True)
class Effect:
    """What a choice does to the expected gradient: one of `FROM_BEST_TO_WORST`, and the reason."""

    status: str
    reason: str


@dataclass(frozen=True)
class Choice(Effect):
    """One name on one axis: its effect, and every other fact about it that the code asks for.

    Attributes:
        compares: Which rows a baseline or scale compares: those of a group or of the whole step, or the steps
            of one row. None where no number of rows is needed.
        needs: The argument of `Estimator.advantages` that the choice cannot do without.
        centred: Whether the baseline equals the return wherever a group has equal returns.
        whole_row: Whether a ratio or an entropy looks along the row, which must then stay in one piece.
        row_inside: The effect with `leave_one_out=False`, for a baseline that has both forms.
        discounted: The effect with gamma below 1.
    """

    compares: Literal["group", "step", "row"] | None = None
    needs: str = ""
    centred: bool = False
    whole_row: bool = False
    row_inside: Effect | None = None
    discounted: Effect | None = None
