"""Defines what a choice can do to the expected gradient, in a word and with the reason. Imports no torch.

What the terms of a KL and of the entropy do stands here too; all other choices are in `choices`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    binary: str = field(default="", kw_only=True)
    """A better status that holds if every return is 0 or 1 and rows are compared in their groups only."""


Need = Literal[
    "",
    "values",
    "greedy_rewards",
    "score_norms",
    "baseline_value",
    "old_logprobs",
    "sampling_logprobs",
    "ref_logprobs",
    "token_kl",
]
"""Arguments of `Estimator.advantages` and `Estimator.loss` that choices need."""


@dataclass(frozen=True)
class Choice(Effect):
    """One name on one axis: its effect, its formula, and every other fact about it that the code uses.

    Attributes:
        formula: The function that computes it, a name in a module beside this one, such as `baselines.rloo`.
            Empty if there is nothing to compute: a baseline is then what it `needs`, if anything.
        compares: What a baseline or scale compares: the rows of a group, the rows of the whole step, or the
            steps of one row. Empty if it compares nothing.
        rows: The fewest rows of a group or step that can be compared; an objective needs its order too.
        needs: The argument that the choice requires; empty if none.
        centred: Whether the baseline equals the return in every group of equal returns.
        additive: Whether the baselines of several reward functions add up to that of their sum.
        whole_row: Whether a ratio or a weight sums over the row, which must then not be split.
        row_inside: The effect with `leave_one_out=False`, for a baseline that has both forms.
        discounted: The effect with gamma below 1.
        of_reward: What the gradient of an objective is for the mean reward, if that is something else.
        any_units: Whether a baseline is in the units of the returns of actions, or made of no return.
        in_group: Whether a baseline is known to depend on the rewards of the row's group only.
        of_others: Whether a divisor is made of other rows only, or an objective needs one row more than k.
        subtracts_mean: Whether a scale or a return subtracts a mean too.
        token_bounds: Whether a ratio has a bound for each token.
    """

    formula: str = ""
    compares: Literal["", "group", "step", "row"] = ""
    rows: int = 2
    needs: Need = ""
    centred: bool = False
    additive: bool = True
    whole_row: bool = False
    row_inside: Effect | None = None
    discounted: Effect | None = None
    of_reward: Effect | None = None
    any_units: bool = False
    in_group: bool = False
    of_others: bool = False
    subtracts_mean: bool = False
    token_bounds: bool = False


EACH = "the gradient of each step's {}, with its prefix held fixed"
LATER = "the effect of an action on the {} of later steps is missing"

KL_EFFECTS: dict[tuple[str, str], Choice] = {
    ("reward", "k1"): Choice(
        EXACT, "a log ratio in the reward gives the gradient of J - beta KL", "divergences.k1"
    ),
    ("reward", "k2"): Choice(
        BIASED,
        "the mean of k2 is not the KL: ascends E[R] - beta E[k2] with k2 held fixed",
        "divergences.k2",
    ),
    ("reward", "k3"): Choice(
        BIASED,
        "k3 in the reward lacks the gradient of k3 itself, whose mean is not zero as that of k1 is",
        "divergences.k3",
    ),
    ("loss", "k1"): Choice(
        BIASED,
        "the gradient of the log ratio is not that of the KL: it has mean zero, so J is ascended without any KL",
        "divergences.k1",
    ),
    ("loss", "k2"): Choice(BIASED, f"{LATER.format('KL')}: {EACH.format('KL')}", "divergences.k2"),
    ("loss", "k3"): Choice(
        BIASED,
        f"k3 differentiated is not the KL(pi || ref): {EACH.format('FORWARD KL(ref || pi)')}",
        "divergences.k3",
    ),
    ("loss", "k2_sequence"): Choice(
        EXACT, "k2 of the whole sequence has the gradient of the KL", "divergences.k2_sequence"
    ),
    ("loss", "full_path"): Choice(
        EXACT, "each action is credited with its own and later log ratios", "divergences.full_path"
    ),
    ("loss", "closed_form"): Choice(
        BIASED, f"{LATER.format('KL')}: {EACH.format('KL')}", needs="token_kl"
    ),
    ("loss", "closed_form_path"): Choice(
        EXACT,
        "the gradient of each step's KL, and each action is credited with the KL of later steps",
        "divergences.closed_form_path",
        needs="token_kl",
    ),
}
"""A KL term by its place and its estimator; a pair that is missing is refused."""

ENTROPY = Choice(BIASED, f"{LATER.format('entropy')}: {EACH.format('entropy')}")
"""The effect of an entropy bonus."""
