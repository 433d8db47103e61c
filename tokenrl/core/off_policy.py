"""Says what the expected gradient is where the sampler differs from the policy that is trained.

A sampler may differ by its temperature, by cutting improbable tokens, by its precision, or because it is an
older policy. With pi the policy, mu the sampler, J as in `bias`, and completions drawn from mu, the statuses
are:

- `exact_for_policy`: the gradient of J(pi), up to one positive number for all prompts, if mu can produce
  every completion that pi can.
- `exact_for_sampler`: the gradient of J(mu), up to one positive number, if mu is softmax(a z + d) with z the
  logits of the policy, a one positive number and d any function of the prefix, both held fixed: a
  temperature, noise, or -inf for tokens that are left out.
- `biased`: neither of them for every such sampler, or on-policy the status is worse than exact up to scale.
- `unknown`: the baseline is one of your own, and decides it.

On-policy, `bias` applies. As there, a status is about the first update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.core.bias import declared
from tokenrl.core.choices import BIASED, EXACT, UNKNOWN, UP_TO_SCALE, Effect, choice_of
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator

EXACT_FOR_POLICY, EXACT_FOR_SAMPLER = "exact_for_policy", "exact_for_sampler"

CORRECTIONS = {
    "none": Effect(BIASED, "completions of the sampler count as if the policy had written them"),
    "token": Effect(
        BIASED,
        "a token's weight corrects neither the probability of its prefix nor that of what follows",
    ),
    "sequence": Effect(
        EXACT_FOR_POLICY,
        "each completion is weighted by the ratio of its probabilities; those that the sampler cannot "
        "produce are missing",
    ),
    "geometric": Effect(BIASED, "the geometric mean of the ratios is no ratio of probabilities"),
}
"""What each importance weight does by itself, without bounds."""
CENTRED = Effect(
    EXACT_FOR_SAMPLER,
    "less its mean over the vocabulary, the score of the policy is 1/a times that of the sampler "
    "softmax(a z + d), z the policy's logits: the update is on-policy for the sampler",
)
BOUNDED = Effect(
    BIASED,
    "beyond importance_cap or importance_floor the weight is no ratio of probabilities: completions that are "
    "rare under the sampler count too little",
)


def correction(estimator: Estimator) -> Effect:
    """Return what importance and its bounds do by themselves."""
    if estimator.importance_centre and estimator.importance == "none":
        return CENTRED
    effect = CORRECTIONS[estimator.importance]
    bounded = estimator.importance_cap or estimator.importance_floor
    return BOUNDED if bounded and effect.status == EXACT_FOR_POLICY else effect


def declared_off_policy(estimator: Estimator) -> Effect:
    """Return the status where sampler and policy differ, and why."""
    effect, on_policy, term = correction(estimator), declared(estimator), estimator.loss_side_terms
    compares = estimator.objective != "reward" and estimator.objective_order != 1
    inexact = on_policy.status not in (EXACT, UP_TO_SCALE, UNKNOWN)
    obstacles = {
        effect.reason: effect.status == BIASED,
        "the KL or entropy term in the loss is a mean over the sampler's completions": term,
        "the KL is that of the policy, not that of the sampler": effect is CENTRED
        and estimator.needs_kl,
        "the rows with which the objective compares a row are those of the sampler": (
            effect.status == EXACT_FOR_POLICY and compares
        ),
        f"on-policy it is {on_policy.status} already: {on_policy.reason}": inexact,
    }
    if reasons := [text for text, applies in obstacles.items() if applies]:
        return Effect(BIASED, "; ".join(reasons))
    if on_policy.status == EXACT:
        return effect
    status = UNKNOWN if on_policy.status == UNKNOWN else effect.status
    return Effect(status, f"{effect.reason}; {on_policy.reason}")


def check_importance(estimator: Estimator) -> None:
    """Refuse bounds without weights, a mask without bounds or at 1, and centres that do not exist."""
    names = [x for x in ("importance_cap", "importance_floor") if getattr(estimator, x) is not None]
    masks = estimator.importance_bound == "mask"
    if estimator.importance == "none" and (names or masks):
        raise Refused(
            f"{(names or ['importance_bound'])[0]} is set, but importance is 'none', so there are no "
            "weights to bound. Set importance=token, which is what importance_cap alone meant in earlier "
            "versions, or 'sequence' or 'geometric'."
        )
    if masks and not names:
        raise Refused(
            "importance_bound 'mask' sets weights beyond importance_cap and importance_floor to 0, but "
            "neither is set. Set importance_cap, for example 3, or importance_bound 'truncate'."
        )
    at_1 = [name for name in names if 0.9999 < getattr(estimator, name) < 1.0001]
    if masks and at_1:
        raise Refused(
            f"importance_bound 'mask' has a bound at 1 ({at_1[0]}). Where sampler and policy agree, a weight "
            "is 1 up to rounding, which would decide whether the completion counts. Set "
            "importance_cap to 1.0001 or more and importance_floor to 0.9999 or less, such as 3 and 0.3, or "
            "importance_bound 'truncate', which rounding does not change."
        )
    if len(names) == 2 and estimator.importance_floor == estimator.importance_cap:
        raise Refused(
            "importance_floor must be below importance_cap, but both are 1. Move one of them."
        )
    for axis in ("importance", "ratio"):
        if estimator.importance_centre and choice_of(axis, getattr(estimator, axis)).whole_row:
            raise Refused(
                f"importance_centre centres the score of each token, but {axis} "
                f"{getattr(estimator, axis)!r} weights whole completions. Set {axis} 'token' or 'none', or "
                "importance_centre False."
            )
