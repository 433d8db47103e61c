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
from tokenrl.core.effects import BIASED, EXACT, UNKNOWN, UP_TO_SCALE, Effect

if TYPE_CHECKING:
    from tokenrl.core.axes import Axes

EXACT_FOR_POLICY = "exact_for_policy"
EXACT_FOR_SAMPLER = "exact_for_sampler"

CORRECTIONS = {
    "none": Effect(BIASED, "completions of the sampler count as if the policy had written them"),
    "token": Effect(
        BIASED,
        "a token's weight corrects neither the probability of its prefix nor that of what follows",
    ),
    "prefix": Effect(
        BIASED,
        "a prefix's weight corrects the probability of what came before an action, and what follows it, with "
        "its rewards, stays the sampler's",
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


def correction(axes: Axes) -> Effect:
    """Return what importance and its bounds do by themselves."""
    if axes.importance_centre and axes.importance == "none":
        return CENTRED
    effect = CORRECTIONS[axes.importance]
    bounded = axes.importance_cap or axes.importance_floor
    return BOUNDED if bounded and effect.status == EXACT_FOR_POLICY else effect


def declared_off_policy(axes: Axes) -> Effect:
    """Return the status where sampler and policy differ, and why."""
    effect = correction(axes)
    on_policy = declared(axes)
    reasons = []
    if effect.status == BIASED:
        reasons.append(effect.reason)
    if axes.loss_side_terms:
        reasons.append(
            "the KL or entropy term in the loss is a mean over the sampler's completions"
        )
    if effect is CENTRED and axes.beta:
        reasons.append("the KL is that of the policy, not that of the sampler")
    compares = axes.other_objective and axes.objective_order != 1
    if effect.status == EXACT_FOR_POLICY and compares:
        reasons.append("the rows with which the objective compares a row are those of the sampler")
    if on_policy.status not in (EXACT, UP_TO_SCALE, UNKNOWN):
        reasons.append(f"on-policy it is {on_policy.status} already: {on_policy.reason}")
    if reasons:
        return Effect(BIASED, "; ".join(reasons))
    if on_policy.status == EXACT:
        return effect
    status = UNKNOWN if on_policy.status == UNKNOWN else effect.status
    return Effect(status, f"{effect.reason}; {on_policy.reason}")
