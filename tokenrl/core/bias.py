"""Says what all choices of an estimator together do to the expected gradient.

What each choice does by itself is in the table of `choices`. The target is the gradient of
`J = E[R] - beta KL(pi || ref) + entropy_coef H(pi)`, averaged over prompts; another `objective` stands in
place of E[R]. A status is about the expected gradient of the first on-policy update, before gradient clipping
and the optimiser, when no row abstains and sampler and trainer compute the same probabilities (`off_policy`
is about the case that they do not). It holds for every policy and for every reward of a row that depends on
that row alone; a reward that compares the rows of a group, such as a judge that ranks them, is outside of
every status.

- R is the undiscounted sum of rewards, including what is added to them: the penalty on long rows, and the
  value of the state after a truncation. If that value is V^pi, the result is the gradient of the whole return
  through the actions before the truncation; with any other value it is not.
- Where an environment draws states, its probabilities are part of the expectation but not of the score.
- The conditions are sufficient: a choice declared `biased` may be harmless on a special problem, for example
  when all completions have the same length.
- The status of `zero_spread` assumes that no reward follows a truncation.
- Prompts are random given what was before their pass over the data. A prompt that a pass has dealt hardly comes back
  in it, so within a pass the weights of a later step depend on the earlier prompts, and what is left is not the mean
  of all prompts. That holds for every shuffled epoch, with or without weights of prompts, and no status counts it.
- The status is `unknown` where the settings do not decide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from tokenrl.core.choices import CHOICES
from tokenrl.core.effects import (
    ASYMPTOTIC,
    BIASED,
    EXACT,
    FROM_BEST_TO_WORST,
    PER_PROMPT,
    UNKNOWN,
    UP_TO_SCALE,
    Effect,
)
from tokenrl.core.refusals import REPLACED

if TYPE_CHECKING:
    from tokenrl.core.axes import Axes

LABELS = {"aggregation": "", "beta": "KL"}
"""What the header of a run calls axes, where that is not their name."""


def effects(axes: Axes, binary: bool = False, of_reward: bool = False) -> list[Effect]:
    """List the effect of every choice of an estimator; a term whose coefficient is 0 has none.

    Args:
        axes: The axes of the estimator.
        binary: Give the effects on rewards of 0 and 1.
        of_reward: Give the effect of the objective on the gradient of the mean reward.
    """
    alone: list[Effect] = [
        baseline_effect(axes, of_reward),
        returns_effect(axes),
        zero_spread_effect(axes),
    ]
    entries = axes.entries
    axes_alone = (
        "scale",
        "aggregation",
        "ratio",
        "importance",
        "prompts",
        "truncations",
        "entropy",
        "kl",
    )
    alone += [entries[axis] for axis in axes_alone if axis in entries]
    # If the advantage of a row depends on its reward and on those of its group only, it is f(r, K) on rewards
    # of 0 and 1, with K successes among the others. The expected gradient is then `E[f(1, K) - f(0, K)] grad p`,
    # with K of the distribution Binomial(G-1, p): a positive number for each prompt, which
    # `tokenrl.lab.prompt_weight` computes. Numbers of other prompts are independent of the row.
    own_return = entries["baseline"].in_group and axes.shares_return and axes.gamma == 1
    alone_in_group = own_return and not axes.kl_in_reward and not axes.overlong_buffer
    if binary and alone_in_group:
        alone = [Effect(effect.binary or effect.status, effect.reason) for effect in alone]
    listed = alone + combination_effects(axes, alone)
    # What a reason says after its colon (see `choices`) holds if nothing else matters but constant factors.
    # What is exact matters too, if it adds to the rewards, or credits actions with a part of them.
    matter = [effect for effect in listed if effect.status not in (EXACT, UP_TO_SCALE)]
    if axes.other_objective:
        matter.append(alone[0])
    if not axes.shares_return:
        matter.append(alone[1])
    if axes.beta:
        matter.append(alone[-1])
    return [
        effect
        if all(effect is other for other in matter)
        else replace(effect, reason=effect.reason.partition(": ")[0])
        for effect in listed
    ]


def estimator_line(axes: Axes, always: Sequence[str], status: str) -> str:
    """Return the line of a run's header about an estimator: its status, and the axes that differ from the defaults.

    Args:
        axes: the axes of the estimator.
        always: names of axes that are shown first, whatever they are.
        status: the status in words.
    """
    changed = [field.name for field in fields(axes) if getattr(axes, field.name) != field.default]
    parts = []
    for name in dict.fromkeys([*always, *changed]):
        value = getattr(axes, name)
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if callable(value):
            text = getattr(value, "__name__", type(value).__name__)
        has_own_line = name.startswith("objective")
        if not has_own_line and not (axes.other_objective and name in REPLACED):
            parts.append(f"{LABELS.get(name, name)} {text}".strip())
    return f"{', '.join(parts)}; bias: {status}"


def objective_line(axes: Axes) -> dict[str, str]:
    """Return the line of a run's header about another objective than the mean reward; none for that."""
    if not axes.other_objective:
        return {}
    name: str = axes.objective
    if axes.objective_order is not None:
        name += f" of order {axes.objective_order}"
    if axes.objective_share is not None:
        name += f" of the best {axes.objective_share:g}"
    status = status_line(axes, of_reward=False)
    of_mean = status_line(axes, of_reward=True)
    form = "" if axes.form == "default" else f", form {axes.form}"
    line = f"{name}{form}; bias: {status}; as a gradient of the mean reward: {of_mean}"
    return {"objective": line}


def status_line(axes: Axes, *, of_reward: bool) -> str:
    """Return the status, and that on rewards of 0 and 1 if it is another one."""
    always = declared(axes, of_reward=of_reward).status
    binary = declared(axes, binary=True, of_reward=of_reward).status
    return always if always == binary else f"{always}, on rewards of 0 and 1 {binary}"


def baseline_effect(axes: Axes, of_reward: bool = False) -> Effect:
    """Return the effect of the baseline, or of the objective in its place.

    Args:
        axes: The axes of the estimator.
        of_reward: Give the effect of the objective on the gradient of the mean reward.
    """
    choice = axes.baseline_entry
    if of_reward and axes.objective_order != 1 and choice.of_reward:
        return choice.of_reward
    return choice if axes.leave_one_out or choice.row_inside is None else choice.row_inside


def returns_effect(axes: Axes) -> Effect:
    """Return the effect of the returns; GAE with lam 1 is the reward to go."""
    is_reward_to_go = axes.returns == "gae" and axes.lam == 1.0 and not axes.length_lam
    choice = CHOICES["returns"]["reward_to_go"] if is_reward_to_go else axes.chosen("returns")
    return choice if axes.gamma == 1.0 or choice.discounted is None else choice.discounted


def zero_spread_effect(axes: Axes) -> Effect:
    """Return the effect of dropping or refilling groups of equal rewards.

    It only reweights prompts if those groups have no gradient anyway, and is a bias otherwise.
    """
    effect = axes.chosen("zero_spread")
    if axes.zero_spread == "keep":
        return effect
    if callable(axes.baseline):
        return Effect(UNKNOWN, "whether a dropped group had an advantage depends on your baseline")
    baseline = axes.chosen("baseline")
    had_gradient = (
        not baseline.centred
        or (axes.components == "separate" and not baseline.additive)
        or axes.chosen("scale").subtracts_mean
        or axes.overlong_buffer > 0
        or axes.beta > 0
        or axes.entropy_coef > 0
    )
    if had_gradient:
        return Effect(
            BIASED, "the groups of equal rewards that are left out had a gradient of their own"
        )
    if axes.shares_return:
        return effect
    earlier = "with rewards before the last action the groups left out had a gradient"
    return Effect(UNKNOWN, f"{earlier}; {effect.reason}")


def combination_effects(axes: Axes, alone: list[Effect]) -> list[Effect]:
    """List the effects that choices have only in combination.

    Args:
        axes: The axes of the estimator.
        alone: The effects of its choices by themselves, first that of the baseline or the objective.
    """
    baseline = axes.chosen("baseline")
    shrinks = baseline.status == UP_TO_SCALE
    per_prompt = alone[0].status == PER_PROMPT
    # A group mean multiplies the advantages by (G-1)/G, and so changes the weight of the loss term relative
    # to them, for any number of prompts. The factor of a batch mean tends to 1 as the step grows.
    divides = axes.scale != "none"
    rescaled = divides or per_prompt or (shrinks and baseline.compares == "group")
    combined = []
    if axes.loss_side_terms and rescaled:
        reason = (
            "the advantages are rescaled and the KL or entropy term in the loss is not, which changes its "
            "coefficient"
        )
        combined.append(Effect(BIASED, reason))
    if axes.components == "separate" and divides:
        reason = (
            "each reward function is divided by its own spread, so it has another weight than in J; by themselves, "
            "with rewards of 0 and 1, 'group_mean' and 'group_std' ascend sum_k w_G(p_k) grad p_k"
        )
        combined.append(Effect(BIASED, reason))
    if axes.loss_side_terms and shrinks and not rescaled:
        reason = (
            "the KL or entropy term in the loss is not multiplied by (N-1)/N as the advantages are"
        )
        combined.append(Effect(ASYMPTOTIC, reason))
    # What is divided or centred over the whole step is divided equally in the limit; these stay unequal.
    unequal = per_prompt or axes.chosen("scale").compares == "group" or axes.prompts == "weighted"
    if unequal and any(effect.status == ASYMPTOTIC for effect in (*alone, *combined)):
        reason = (
            "prompts stay weighted unequally, and the direction of each is right in the limit only"
        )
        combined.append(Effect(BIASED, reason))
    return combined


def declared(axes: Axes, *, binary: bool = False, of_reward: bool = False) -> Effect:
    """Return the worst status among the choices, and the reasons of every choice that is not exact.

    The worst status is that of the whole, because constant factors multiply to one constant factor (a group
    mean with a fixed length), limits combine, and no choice removes the bias of another. The exceptions are
    in `combination_effects`.

    Args:
        axes: The axes.
        binary: Give the status on rewards of 0 and 1.
        of_reward: Compare with the gradient of the mean reward, if the objective is another one.
    """
    listed = effects(axes, binary, of_reward)
    status = max((effect.status for effect in listed), key=FROM_BEST_TO_WORST.index)
    reasons = [effect.reason for effect in listed if effect.status != EXACT]
    if not binary:
        special = declared(axes, binary=True, of_reward=of_reward).status
        if special != status:
            reasons.append(f"on rewards of 0 and 1 it is {special}")
    return Effect(status, "; ".join(reasons) or "no choice changes the expected gradient")
