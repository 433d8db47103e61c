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
- The status is `unknown` where the settings do not decide it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.core import choices
from tokenrl.core.choices import BIASED, UNKNOWN, UP_TO_SCALE, Effect, choice_of
from tokenrl.core.targets import OBJECTIVES

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def effects(estimator: Estimator, binary: bool = False, of_reward: bool = False) -> list[Effect]:
    """List the effect of every choice of an estimator; a term whose coefficient is 0 has none.

    Args:
        estimator: The estimator.
        binary: Give the effects on rewards of 0 and 1.
        of_reward: Give the effect of the objective on the gradient of the mean reward.
    """
    alone = [objective_effect(estimator, of_reward)]
    alone += [effect(estimator) for effect in (baseline_effect, returns_effect, zero_spread_effect)]
    axes = ["scale", "aggregation", "ratio", "importance", "truncations"]
    alone += [choice_of(axis, getattr(estimator, axis)) for axis in axes]
    if estimator.needs_entropy:
        alone.append(choices.ENTROPY)
    if estimator.needs_kl:
        alone.append(choices.KL_EFFECTS[estimator.kl_placement, estimator.kl_estimator])
    if binary and compares_groups_only(estimator):
        alone = [Effect(effect.binary or effect.status, effect.reason) for effect in alone]
    return alone + combination_effects(estimator, alone)


def objective_effect(estimator: Estimator, of_reward: bool = False) -> Effect:
    """Return the effect of the objective and its form on the objective's own gradient, or that of E[R]."""
    choice = OBJECTIVES[estimator.objective, estimator.form]
    differs = of_reward and estimator.objective_order != 1
    return choice.of_reward if differs and choice.of_reward else choice


def compares_groups_only(estimator: Estimator) -> bool:
    """Whether the advantage of a row depends on its reward and on those of its group only.

    Then on rewards of 0 and 1 it is f(r, K), with K successes among the others, and the expected gradient is
    `E[f(1, K) - f(0, K)] grad p`, with K of the distribution Binomial(G-1, p): a positive number for each
    prompt. `tokenrl.lab.prompt_weight` computes it. Numbers of other prompts are independent of the row.
    """
    in_reward = estimator.needs_kl and estimator.kl_placement == "reward"
    own = estimator.baseline in ("none", "rloo", "group_mean") and estimator.returns == "total"
    return own and estimator.gamma == 1 and not in_reward and not estimator.overlong_buffer


def objective_line(estimator: Estimator) -> dict[str, str]:
    """Return the line of a run's header about another objective than the mean reward; none for that."""
    if estimator.objective == "reward":
        return {}
    order = f" of order {estimator.objective_order}" * (estimator.objective_order is not None)
    statuses = []
    for of_reward in (False, True):
        always, binary = (
            declared(estimator, binary=x, of_reward=of_reward).status for x in (False, True)
        )
        statuses.append(always if always == binary else f"{always}, on rewards of 0 and 1 {binary}")
    name = f"{estimator.objective}{order}, form {estimator.form}"
    return {
        "objective": f"{name}; bias: {statuses[0]}; as a gradient of the mean reward: {statuses[1]}"
    }


def baseline_effect(estimator: Estimator) -> Effect:
    """Return the effect of the baseline, which for some depends on `leave_one_out`."""
    if callable(estimator.baseline) and estimator.needs_memory:
        return choices.MEMORY
    choice = choice_of("baseline", estimator.baseline)
    return choice if estimator.leave_one_out or choice.row_inside is None else choice.row_inside


def returns_effect(estimator: Estimator) -> Effect:
    """Return the effect of the returns; GAE with lam 1 is the reward to go."""
    reward_to_go = estimator.returns == "gae" and estimator.lam == 1.0
    choice = choice_of("returns", "reward_to_go" if reward_to_go else estimator.returns)
    return choice if estimator.gamma == 1.0 or choice.discounted is None else choice.discounted


def zero_spread_effect(estimator: Estimator) -> Effect:
    """Return the effect of dropping or refilling groups of equal rewards.

    It only reweights prompts if those groups have no gradient anyway, and is a bias otherwise.
    """
    effect = choice_of("zero_spread", estimator.zero_spread)
    if estimator.zero_spread == "keep":
        return effect
    if callable(estimator.baseline):
        return Effect(UNKNOWN, "whether a dropped group had an advantage depends on your baseline")
    baseline = choice_of("baseline", estimator.baseline)
    had_gradient = (
        not baseline.centred
        or (estimator.components == "separate" and not baseline.additive)
        or not OBJECTIVES[estimator.objective, estimator.form].centred
        or estimator.scale == "token_whiten"
        or estimator.overlong_buffer > 0
        or estimator.needs_kl
        or estimator.needs_entropy
    )
    if had_gradient:
        return Effect(
            BIASED, "the groups of equal rewards that are left out had a gradient of their own"
        )
    if estimator.returns == "total":
        return effect
    text = (
        f"{effect.reason}; with rewards before the last action the groups left out had a gradient"
    )
    return Effect(UNKNOWN, text)


def combination_effects(estimator: Estimator, alone: list[Effect]) -> list[Effect]:
    """List the effects that choices have only in combination.

    Args:
        estimator: The estimator.
        alone: The effects of its choices by themselves, that of the objective first.
    """
    baseline = choice_of("baseline", estimator.baseline)
    shrinks, per_prompt = baseline.status == UP_TO_SCALE, alone[0].status == choices.PER_PROMPT
    # A group mean multiplies the advantages by (G-1)/G, and so changes the weight of the loss term relative
    # to them, for any number of prompts. The factor of a batch mean tends to 1 as the step grows.
    rescaled = estimator.scale != "none" or per_prompt or (shrinks and baseline.compares == "group")
    term = estimator.loss_side_terms
    limits = {
        baseline_effect(estimator).status,
        choice_of("aggregation", estimator.aggregation).status,
    }
    unequal = choices.ASYMPTOTIC in limits and (
        per_prompt or estimator.scale in ("loo_std", "group_std")
    )
    separate = estimator.components == "separate" and estimator.scale != "none"
    biased = {
        "the advantages are rescaled and the KL or entropy term in the loss is not, which changes its "
        "coefficient": term and rescaled,
        "each reward function is divided by its own spread, so it has another weight than in J; with rewards "
        "of 0 and 1, 'group_mean' and 'group_std' it ascends sum_k w_G(p_k) grad p_k": separate,
        "prompts stay weighted unequally, and the direction of each is right in the limit only": unequal,
    }
    shrunk = "the KL or entropy term in the loss is not multiplied by (N-1)/N as the advantages are"
    combined = [Effect(BIASED, text) for text, applies in biased.items() if applies]
    return combined + [Effect(choices.ASYMPTOTIC, shrunk)] * (term and shrinks and not rescaled)


def declared(estimator: Estimator, *, binary: bool = False, of_reward: bool = False) -> Effect:
    """Return the worst status among the choices, and the reasons of every choice that is not exact.

    The worst status is that of the whole, because constant factors multiply to one constant factor (a group
    mean with a fixed length), limits combine, and no choice removes the bias of another. The exceptions are
    in `combination_effects`.

    Args:
        estimator: The estimator.
        binary: Give the status on rewards of 0 and 1.
        of_reward: Compare with the gradient of the mean reward, if the objective is another one.
    """
    all_effects = effects(estimator, binary, of_reward)
    status = max((effect.status for effect in all_effects), key=choices.FROM_BEST_TO_WORST.index)
    reasons = [effect.reason for effect in all_effects if effect.status != choices.EXACT]
    if not binary:
        special = declared(estimator, binary=True, of_reward=of_reward).status
        reasons += [f"on rewards of 0 and 1 it is {special}"] * (special != status)
    return Effect(status, "; ".join(reasons) or "no choice changes the expected gradient")
