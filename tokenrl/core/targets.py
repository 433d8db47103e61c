"""Lists the objectives that an estimator may ascend, and what each form of its estimate does.

The formulas are in `objectives`. G is the number of completions per prompt, p the success rate of the
prompt. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from tokenrl.core.choices import BIASED, EXACT, PER_PROMPT, Choice, Effect
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator

LOG_SUCCESS = (
    "the row's own return is in the divisor: with three or more reward levels there is no objective; on "
    "rewards of 0 and 1 it ascends "
)
MAXRL = Effect(BIASED, "hard prompts count for more than easy ones", PER_PROMPT)
BEST = Effect(
    BIASED,
    "prefers completions that are rarely matched by others; a reward of 1 counts k (1-p)^(k-1)",
    PER_PROMPT,
)
BEST_OF_K = Choice(
    EXACT, "the mean of the best of k rows, minus a number made of the others", of_reward=BEST
)

OBJECTIVES: dict[tuple[str, str], Choice] = {
    ("reward", "default"): Choice(EXACT, "the mean reward", centred=True),
    # Subtracted is the mean of the best of k others, of k - 1 others, G/(G-1) times the first, and nothing.
    ("max_at_k", "leave_one_out"): replace(BEST_OF_K, centred=True),
    ("max_at_k", "sloo_minus_one"): replace(BEST_OF_K, centred=True),
    ("max_at_k", "sloo"): BEST_OF_K,
    ("max_at_k", "no_baseline"): BEST_OF_K,
    ("log_success", "maxrl"): Choice(
        BIASED, f"{LOG_SUCCESS}sum_(k<G) (1-(1-p)^k)/k", EXACT, centred=True, of_reward=MAXRL
    ),
    ("log_success", "keep_failures"): Choice(
        BIASED, f"{LOG_SUCCESS}sum_(k<=G) (1-(1-p)^k)/k", EXACT, of_reward=MAXRL
    ),
    ("log_success", "leave_one_out"): Choice(
        PER_PROMPT,
        "the divisor b is made of the other completions only: E[1/b; b > 0] of the gradient of E[R]",
        centred=True,
    ),
}
"""The effect of each form of each objective on the objective's own gradient; the first form listed is the
default. A pair that is missing is refused."""


if TYPE_CHECKING:
    Objective = str
    ObjectiveForm = str
else:
    Objective = Literal[tuple(dict.fromkeys(objective for objective, _ in OBJECTIVES))]
    ObjectiveForm = Literal[tuple(dict.fromkeys(form for _, form in OBJECTIVES))]


def check_objective(estimator: Estimator) -> None:
    """Refuse what does not go with the objective of an estimator.

    Raises:
        Refused: For a form or an order of another objective, and for axes that the objective replaces.
    """
    name, forms = (
        estimator.objective,
        [form for key, form in OBJECTIVES if key == estimator.objective],
    )
    if estimator.objective_form not in (*forms, "default"):
        raise Refused(
            f"objective_form {estimator.objective_form!r} is not a form of the objective {name!r}. Leave it "
            f"out, or take one of: {', '.join(forms)}."
        )
    if (estimator.objective_order is None) == (name == "max_at_k"):
        raise Refused(
            "objective 'max_at_k' needs its k, such as objective_order 4."
            if name == "max_at_k"
            else f"objective_order is for the objective 'max_at_k', and the objective is {name!r}. Leave "
            "it out; the order of 'log_success' follows from the number of completions per prompt."
        )
    if name == "reward":
        return
    replaced = {"baseline": "rloo", "scale": "none", "returns": "total", "components": "summed"}
    for axis, value in replaced.items():
        if getattr(estimator, axis) != value:
            raise Refused(
                f"objective {name!r} makes the advantages by itself, without {axis} "
                f"{getattr(estimator, axis)!r}. Set {axis} {value!r}, or objective 'reward'."
            )
    if estimator.needs_kl and estimator.kl_placement == "reward":
        raise Refused(
            f"objective {name!r} is about rewards alone, and a KL in the reward is not one. Set "
            "kl_placement 'loss' and kl_estimator 'full_path', or beta 0."
        )
    if name == "log_success" and estimator.overlong_buffer:
        raise Refused(
            "objective 'log_success' needs rewards of 0 or more, and overlong_buffer makes them "
            "negative. Leave overlong_buffer out, or take another objective."
        )
    if estimator.form == "sloo_minus_one" and estimator.objective_order == 1:
        raise Refused(
            "objective_form 'sloo_minus_one' subtracts the best of k - 1 rows, and objective_order is 1. "
            "Give an order of 2 or more, or take the form 'leave_one_out', which is RLOO at order 1."
        )
