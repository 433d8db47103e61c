"""What the choices of an estimator do to the expected gradient together. The table is in `choices`.

The statements are about the expected gradient of the first on-policy update, before clipping and the
optimiser, with no row abstaining, for every reward and every policy; the target is the gradient of `J =
E[R] - beta KL(pi || ref) + entropy_coef H(pi)`, averaged over prompts. R is the undiscounted sum of rewards
and contains what is added to them: a penalty on long rows, the value of what follows a truncation. With
V^pi for that value it is the gradient of the whole return through the actions before the cut; with another
it is not. Where an environment draws states, its chances are in the expectation and not in the score. The
statements are sufficient conditions: a choice declared `biased` may be harmless on a special problem (all
completions of one length, say). What is said of `zero_spread` supposes that nothing follows a truncation.
What the settings do not decide is `unknown`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.core.choices import KL_EFFECTS, choice_of
from tokenrl.core.effects import ASYMPTOTIC, BIASED, EXACT, FROM_BEST_TO_WORST, UNKNOWN, UP_TO_SCALE, Effect

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


def effects(estimator: Estimator) -> list[Effect]:
    """List what every choice of an estimator does; a term whose coefficient is 0 does nothing."""
    return [
        baseline_effect(estimator),
        *(choice_of(axis, getattr(estimator, axis)) for axis in ("scale", "aggregation", "ratio")),
        returns_effect(estimator),
        zero_spread_effect(estimator),
        choice_of("truncations", estimator.truncations),
        *loss_term_effects(estimator),
        *combination_effects(estimator),
    ]


def baseline_effect(estimator: Estimator) -> Effect:
    """What the baseline does; some leave the row itself out or not, by `leave_one_out`."""
    choice = choice_of("baseline", estimator.baseline)
    return choice if estimator.leave_one_out or choice.row_inside is None else choice.row_inside


def returns_effect(estimator: Estimator) -> Effect:
    """What the returns do; GAE with lam 1 is the reward to go."""
    reward_to_go = estimator.returns == "gae" and estimator.lam == 1.0
    choice = choice_of("returns", "reward_to_go" if reward_to_go else estimator.returns)
    return choice if estimator.gamma == 1.0 or choice.discounted is None else choice.discounted


def zero_spread_effect(estimator: Estimator) -> Effect:
    """What dropping groups of equal rewards does: little if they had no advantage, a bias otherwise."""
    effect = choice_of("zero_spread", estimator.zero_spread)
    if estimator.zero_spread == "keep":
        return effect
    if callable(estimator.baseline):
        return Effect(UNKNOWN, "whether a dropped group had an advantage depends on your baseline")
    with_gradient = (
        not choice_of("baseline", estimator.baseline).centred
        or estimator.scale == "token_whiten"
        or estimator.overlong_buffer > 0
        or estimator.loss_side_terms
        or (estimator.needs_kl and estimator.kl_placement == "reward")
    )
    if with_gradient:
        return Effect(BIASED, "the groups of equal rewards that are left out had a gradient of their own")
    if estimator.returns != "total":
        return Effect(
            UNKNOWN,
            f"{effect.reason}; with rewards before the last action the groups left out had a gradient",
        )
    return effect


def loss_term_effects(estimator: Estimator) -> list[Effect]:
    """What a KL and an entropy do, by themselves."""
    found: list[Effect] = []
    if estimator.needs_kl:
        found.append(KL_EFFECTS[estimator.kl_placement, estimator.kl_estimator])
    if estimator.needs_entropy:
        found.append(choice_of("entropy_form", estimator.entropy_form))
    return found


def combination_effects(estimator: Estimator) -> list[Effect]:
    """What choices do only together."""
    found = []
    baseline = choice_of("baseline", estimator.baseline)
    shrinks = baseline.status == UP_TO_SCALE
    if estimator.loss_side_terms:
        # (G-1)/G is another coefficient however many prompts there are; (N-1)/N tends to 1 with the step
        if estimator.scale != "none" or (shrinks and baseline.compares == "group"):
            found.append(
                Effect(
                    BIASED, "the advantage is rescaled and the term in the loss is not: another coefficient"
                )
            )
        elif shrinks:
            found.append(
                Effect(ASYMPTOTIC, "the term in the loss is not multiplied by (N-1)/N as the advantage is")
            )
    limits = {baseline_effect(estimator).status, choice_of("aggregation", estimator.aggregation).status}
    if estimator.scale == "loo_std" and ASYMPTOTIC in limits:
        found.append(
            Effect(
                BIASED, "prompts stay weighted unequally, and each one's direction is right in the limit only"
            )
        )
    return found


def declared(estimator: Estimator) -> Effect:
    """Return the worst status among the choices, and the reasons of every choice that is not exact.

    Worst wins because scales multiply (a group mean with a fixed length is still one number), limits
    combine, and no choice mends another one's bias. The exceptions are `combination_effects`.
    """
    found = effects(estimator)
    status = max((effect.status for effect in found), key=FROM_BEST_TO_WORST.index)
    reasons = [effect.reason for effect in found if effect.status != EXACT]
    return Effect(status, "; ".join(reasons) or "no choice changes the expected gradient")
