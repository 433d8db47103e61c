"""What the choices of an estimator do to the expected gradient together. The tables are in `effects`.

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

from tokenrl.core.effects import (
    ASYMPTOTIC,
    BIASED,
    BUILT,
    CENTRED,
    EFFECTS,
    ENTROPY_EFFECTS,
    EXACT,
    FROM_BEST_TO_WORST,
    KL_EFFECTS,
    PER_PROMPT,
    RETURNS_EFFECTS,
    SELF_INCLUDING,
    TRUNCATIONS_EFFECTS,
    UNKNOWN,
    UP_TO_SCALE,
    ZERO_SPREAD_EFFECTS,
    Effect,
)

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator

__all__ = [
    "ASYMPTOTIC", "BIASED", "BUILT", "EFFECTS", "EXACT", "FROM_BEST_TO_WORST", "KL_EFFECTS", "PER_PROMPT",
    "UNKNOWN", "UP_TO_SCALE", "Effect", "declared", "effects",
]  # fmt: skip


def effects(estimator: Estimator) -> list[Effect]:
    """List what every choice of an estimator does; a term whose coefficient is 0 does nothing."""
    return [
        baseline_effect(estimator),
        EFFECTS["scale"][estimator.scale],
        EFFECTS["aggregation"][estimator.aggregation],
        EFFECTS["ratio"][estimator.ratio],
        returns_effect(estimator),
        zero_spread_effect(estimator),
        TRUNCATIONS_EFFECTS[estimator.truncations],
        *loss_term_effects(estimator),
        *combination_effects(estimator),
    ]


def baseline_effect(estimator: Estimator) -> Effect:
    """What the baseline does: a function of the user's is unknown, some depend on `leave_one_out`."""
    if callable(estimator.baseline):
        return Effect(
            UNKNOWN, "a baseline of your own is exact if it contains nothing of the row's own actions"
        )
    if not estimator.leave_one_out and estimator.baseline in SELF_INCLUDING:
        return SELF_INCLUDING[estimator.baseline]
    return EFFECTS["baseline"][estimator.baseline]


def returns_effect(estimator: Estimator) -> Effect:
    """What the returns do; GAE with lam 1 is the reward to go."""
    name = estimator.returns
    if name == "gae" and estimator.lam == 1.0:
        name = "reward_to_go"
    return RETURNS_EFFECTS[name][estimator.gamma < 1.0]


def zero_spread_effect(estimator: Estimator) -> Effect:
    """What dropping groups of equal rewards does: little if they had no advantage, a bias otherwise."""
    effect = ZERO_SPREAD_EFFECTS[estimator.zero_spread]
    if estimator.zero_spread == "keep":
        return effect
    if callable(estimator.baseline):
        return Effect(UNKNOWN, "whether a dropped group had an advantage depends on your baseline")
    with_gradient = (
        estimator.baseline not in CENTRED
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
    found = []
    if estimator.needs_kl:
        found.append(KL_EFFECTS[estimator.kl_placement, estimator.kl_estimator])
    if estimator.needs_entropy:
        found.append(ENTROPY_EFFECTS[estimator.entropy_form])
    return found


def combination_effects(estimator: Estimator) -> list[Effect]:
    """What choices do only together."""
    found = []
    if estimator.loss_side_terms:
        if estimator.scale != "none" or estimator.baseline == "group_mean":
            found.append(
                Effect(
                    BIASED, "the advantage is rescaled and the term in the loss is not: another coefficient"
                )
            )
        elif estimator.baseline == "batch_mean":
            found.append(
                Effect(ASYMPTOTIC, "the term in the loss is not multiplied by (N-1)/N as the advantage is")
            )
    baseline = baseline_effect(estimator).status
    limits = ASYMPTOTIC in (baseline, EFFECTS["aggregation"][estimator.aggregation].status)
    if estimator.scale == "loo_std" and limits:
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
