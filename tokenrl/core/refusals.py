"""Refuses choices that exclude each other, and steps whose rows do not fall into the sets they compare.

Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.core.choices import OBJECTIVES
from tokenrl.core.effects import KL_EFFECTS
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.axes import Axes

ALONE = "choose the baseline 'running_mean', 'constant' or 'none', with the scale 'none'"
"""What to do where there are no other rows to compare with."""
REPLACED = {"baseline": "none", "scale": "none", "returns": "total", "components": "summed"}
"""The axes that another objective replaces, with the only choice that goes with it."""
OF_STEP = {"values", "greedy_rewards", "baseline_value"}
"""What is known of the whole reward of a row, and not of each reward function."""
LEAST_EPS = 0.01
"""Least scale_eps where a divisor is made of other rows alone, whose rewards may all be equal."""
LONGEST_WITHOUT_BASELINE = 500
"""Most steps of an episode without a baseline; in longer ones noise hides the effect of one action."""


def check_axes(axes: Axes) -> None:
    """Refuse choices that exclude each other.

    Raises:
        Refused: With the choices, and others to take instead.
    """
    check_objective(axes)
    if axes.beta and (axes.kl_placement, axes.kl_estimator) not in KL_EFFECTS:
        raise Refused(
            f"kl_estimator {axes.kl_estimator!r} is exact in the loss, but kl_placement is {axes.kl_placement!r}. "
            "Set kl_placement 'loss', or take kl_estimator 'k1', which is exact in the reward."
        )
    if axes.kl_baseline != "none" and (
        not axes.kl_in_loss or axes.kl_estimator not in ("k2", "full_path")
    ):
        raise Refused(
            f"kl_baseline {axes.kl_baseline!r} is subtracted from the log ratio of each token, which is the credit "
            "of the token with kl_estimator 'k2' or 'full_path' in the loss only. Set beta above 0, kl_placement "
            "'loss' and one of these two, or kl_baseline 'none'."
        )
    for axis in axes.within_rows:
        if axes.components == "separate" or (axis != "returns" and axes.shares_return):
            raise Refused(
                f"{getattr(axes, axis)!r} compares the steps of one row, which with returns 'total' or "
                "components 'separate' all have the same return. Set returns 'reward_to_go' and components "
                f"'summed', or choose another {axis}."
            )
    if axes.chosen("returns").subtracts_mean and not axes.chosen("baseline").any_units:
        raise Refused(
            f"returns {axes.returns!r} and the baseline {axes.baseline!r}, made of whole returns, are in other "
            "units. Choose the baseline 'none' or 'value', or returns 'reward_to_go'."
        )
    check_importance(axes)
    if axes.chosen("scale").of_others and axes.scale_eps < LEAST_EPS:
        raise Refused(
            f"scale {axes.scale!r} divides by scale_eps alone where the other rows have equal rewards: with "
            f"{axes.scale_eps:g} one right answer in a group counts thousands of times more than the others. Give "
            f"a scale_eps of at least {LEAST_EPS}; its preset has 0.1."
        )
    of_step = axes.overlong_buffer or axes.kl_in_reward or axes.needs & OF_STEP
    if axes.components == "separate" and of_step:
        raise Refused(
            "With components 'separate' the advantages of a reward function are made of its own rewards in "
            "the step. Choose a baseline of these, such as 'rloo' or 'group_mean', returns other than 'gae', "
            "overlong_buffer 0, and for a KL the kl_placement 'loss'."
        )


def check_importance(axes: Axes) -> None:
    """Refuse bounds without weights, a mask without bounds or at 1, and centres that do not exist."""
    names = [x for x in ("importance_cap", "importance_floor") if getattr(axes, x) is not None]
    masks = axes.importance_bound == "mask"
    if axes.importance == "none" and (names or masks):
        raise Refused(
            f"{(names or ['importance_bound'])[0]} is set, but importance is 'none', so there are no weights to "
            "bound. Set importance=token, which is what importance_cap alone meant in earlier versions, or "
            "'sequence' or 'geometric'."
        )
    if axes.importance_clip is not None and axes.importance != "prefix":
        raise Refused(
            f"importance_clip bounds the weights of prefixes, and importance is {axes.importance!r}. Set "
            "importance 'prefix', or bound other weights by importance_cap and importance_floor."
        )
    if masks and not names:
        raise Refused(
            "importance_bound 'mask' sets weights beyond importance_cap and importance_floor to 0, but "
            "neither is set. Set importance_cap, for example 3, or importance_bound 'truncate'."
        )
    at_1 = [name for name in names if 0.9999 < getattr(axes, name) < 1.0001]
    if masks and at_1:
        raise Refused(
            f"importance_bound 'mask' has a bound at 1 ({at_1[0]}). Where sampler and policy agree, a weight is 1 "
            "up to rounding, which would decide whether the completion counts. Set importance_cap to 1.0001 "
            "or more and importance_floor to 0.9999 or less, such as 3 and 0.3, or importance_bound "
            "'truncate', which rounding does not change."
        )
    for axis in ("importance", "ratio"):
        if axes.importance_centre and axes.chosen(axis).whole_row:
            raise Refused(
                f"importance_centre centres the score of each token, but {axis} {getattr(axes, axis)!r} weights "
                f"whole completions. Set {axis} 'token' or 'none', or importance_centre False."
            )


def check_objective(axes: Axes) -> None:
    """Refuse what does not go with the objective.

    Raises:
        Refused: For a form or an order of another objective, and for axes that the objective replaces.
    """
    name = axes.objective
    order = axes.objective_order
    forms = [form for objective, form in OBJECTIVES if objective == name]
    if axes.objective_form not in (*forms, "default"):
        raise Refused(
            f"objective_form {axes.objective_form!r} is not a form of the objective {name!r}. Leave it out, or "
            f"take one of: {', '.join(forms)}."
        )
    if name == "max_at_k" and order is None:
        raise Refused("objective 'max_at_k' needs its k, such as objective_order 4.")
    if (name == "quantile") != (axes.objective_share is not None):
        raise Refused(
            f"objective_share is {axes.objective_share} and the objective {name!r}. The objective 'quantile' needs a "
            "share, such as objective_share 0.05; with others leave it out."
        )
    if name != "max_at_k" and order is not None:
        raise Refused(
            f"objective_order is for the objective 'max_at_k', and the objective is {name!r}. Leave it out; the "
            "order of 'log_success' follows from the number of completions per prompt."
        )
    for axis, value in REPLACED.items():
        is_target = axis != "scale" and axes.scale == "target"
        if (is_target or axes.other_objective) and getattr(axes, axis) != value:
            maker = "scale 'target'" if is_target else f"objective {name!r}"
            raise Refused(
                f"{maker} makes the advantages by itself, without {axis} {getattr(axes, axis)!r}. "
                f"Set {axis} {value!r}, or objective 'reward' with another scale."
            )
    if axes.other_objective and axes.kl_in_reward:
        raise Refused(
            f"objective {name!r} is about rewards alone, and a KL in the reward is not one. Set kl_placement "
            "'loss' and kl_estimator 'full_path', or beta 0."
        )
    if name == "log_success" and axes.overlong_buffer:
        raise Refused(
            "objective 'log_success' needs rewards of 0 or more, and overlong_buffer makes them negative. "
            "Leave overlong_buffer out, or take another objective."
        )
    if axes.form == "sloo_minus_one" and order == 1:
        raise Refused(
            "objective_form 'sloo_minus_one' subtracts the best of k - 1 rows, and objective_order is 1. Give "
            "an order of 2 or more, or take the form 'leave_one_out', which is RLOO at order 1."
        )


def check_groups(
    choice: object, rows: int, group_size: int | None, fewest: int = 2, otherwise: str = ALONE
) -> int:
    """Return the group size.

    Args:
        choice: The choice that compares the rows of a group.
        rows: Number of rows in the step.
        group_size: Number of consecutive rows per prompt; None if rows do not share prompts.
        fewest: The fewest rows of a group that the choice compares.
        otherwise: What to do with smaller groups, for the message.

    Raises:
        Refused: Without groups, with groups that are too small, or when `rows` is no multiple of `group_size`.
    """
    if group_size is None or group_size < fewest:
        raise Refused(
            f"{choice!r} compares the rows of a group, but group_size is {group_size}. Take {fewest} or more "
            f"(num_generations; in control num_envs), or {otherwise}."
        )
    if rows % group_size:
        raise Refused(f"{rows} rows are no multiple of group_size {group_size}; give whole groups.")
    return group_size


def check_sizes(axes: Axes, rows: int, group_size: int | None) -> None:
    """Refuse a step whose rows do not fall into the sets that baseline, scale and objective compare.

    Args:
        axes: The axes of the estimator.
        rows: Number of rows in the step.
        group_size: Number of consecutive rows per prompt; None if rows do not share prompts.

    Raises:
        Refused: With the number of rows that is too small, and choices that need fewer.
    """
    for axis in ("baseline", "scale"):
        entry = axes.chosen(axis)
        choice = getattr(axes, axis)
        fewest = entry.rows
        otherwise = ALONE
        if axis == "baseline" and axes.other_objective:
            choice = axes.objective
            fewest = axes.fewest_rows
            order = "a smaller objective_order, or " if axes.objective_order else ""
            otherwise = f"take {order}objective 'reward' and {ALONE}"
        if entry.compares == "group":
            check_groups(choice, rows, group_size, fewest, otherwise)
        if entry.compares == "step" and rows < fewest:
            raise Refused(
                f"{choice!r} compares the rows of a step, but the step has {rows}. Collect more, or {ALONE}."
            )


def check_horizon(axes: Axes, horizon: int | None, allow_no_baseline: bool = False) -> None:
    """Refuse REINFORCE without a baseline where an episode may last more than 500 steps.

    With rewards of similar size at every step, R grows as the length T and the variance of `sum_t score_t R`
    as T^3. A baseline would remove most of it.

    Args:
        axes: The axes of the estimator.
        horizon: Most steps of an episode (tokens of a completion); None if there is no limit.
        allow_no_baseline: Accept the estimator nevertheless.

    Raises:
        Refused: With the baselines to choose from, and the flag that allows none.
    """
    short = horizon is not None and horizon <= LONGEST_WITHOUT_BASELINE
    if short or allow_no_baseline or axes.subtracts_baseline:
        return
    length = "without limit" if horizon is None else f"up to {horizon:,} steps"
    choice = "the baseline 'value', 'running_mean', 'timestep_mean' with returns 'reward_to_go', or 'rloo'"
    if axes.other_objective:
        choice = "another objective_form, such as 'leave_one_out'"
    raise Refused(
        f"Episodes last {length}, but the estimator subtracts no baseline; beyond {LONGEST_WITHOUT_BASELINE} "
        f"steps noise hides the effect of one action. Choose {choice}; or make episodes shorter, or pass "
        "--allow-no-baseline."
    )
