"""What each choice does to the expected gradient: one table, and the rule that the worst entry decides.

The statements are about the expected gradient of the first on-policy update, before clipping and the
optimiser, with no row abstaining, for every reward and every policy; the target is the gradient of `J =
E[R] - beta KL(pi || ref) + entropy_coef H(pi)`, averaged over prompts. They are sufficient conditions: a
choice declared `biased` may be harmless on a special problem (all completions of one length, say).

A name is built exactly when it has an entry here, so no estimator exists whose bias nobody stated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator

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
one."""


class Effect(NamedTuple):
    """What a choice does to the expected gradient, and why."""

    status: str
    reason: str


EFFECTS: dict[str, dict[str, Effect]] = {
    "baseline": {
        "none": Effect(EXACT, "nothing is subtracted"),
        "constant": Effect(EXACT, "a constant baseline times the score has mean zero"),
        "running_mean": Effect(
            EXACT, "given the past the running mean is a constant, for it is updated after use"
        ),
        "rloo": Effect(EXACT, "the baseline is made of the other completions of the prompt only"),
        "group_mean": Effect(
            UP_TO_SCALE, "the row's own return is in the mean of its group: (G-1)/G of the gradient"
        ),
        "batch_mean": Effect(
            UP_TO_SCALE, "the row's own return is in the mean of the step: (N-1)/N of the gradient"
        ),
    },
    "scale": {
        "none": Effect(EXACT, "advantages are not divided"),
        "group_std": Effect(
            BIASED,
            "the row's own return is in the divisor: with binary rewards and a mean baseline each prompt "
            "ascends at w_G(p) grad p, w_G(p) = E[s_K^2/(std_K + eps)]/(p(1-p)) with K ~ Binomial(G, p), "
            "s_K^2 = K/G(1 - K/G); with three or more reward levels there is no objective",
        ),
        "batch_std": Effect(
            ASYMPTOTIC,
            "the row's own return is in the divisor, which tends to one number for all as the step grows",
        ),
    },
    "aggregation": {
        "sequence_sum": Effect(EXACT, "the mean over sequences of the sum over their tokens"),
        "fixed_length": Effect(UP_TO_SCALE, "one constant divides everything: 1/max_length of the gradient"),
        "token_mean": Effect(
            ASYMPTOTIC,
            "the number of tokens in the step depends on the actions; the gradient tends to that of J, "
            "divided by the mean length, with an error of order 1/N",
        ),
        "sequence_mean": Effect(
            BIASED, "each sequence counts by 1/length: ascends E[(R - b)/L] with the baseline b held fixed"
        ),
    },
    "ratio": {
        "none": Effect(EXACT, "on-policy"),
        "token": Effect(
            EXACT, "at the first update every ratio is 1, and the clipped gain has REINFORCE's gradient"
        ),
    },
}

KL_EFFECTS: dict[tuple[str, str], Effect] = {
    ("reward", "k1"): Effect(
        EXACT, "the log ratio as a penalty in the reward gives the gradient of J - beta KL"
    ),
    ("reward", "k2"): Effect(
        BIASED, "k2 in the reward ascends E[R] - beta E[k2] with k2 held fixed, which is not the KL"
    ),
    ("reward", "k3"): Effect(
        BIASED, "k3 in the reward lacks the gradient of k3 itself, which has not mean zero as that of k1 has"
    ),
    ("loss", "k1"): Effect(
        BIASED, "the gradient of the log ratio has mean zero: ascends J without any KL penalty"
    ),
    ("loss", "k2"): Effect(
        BIASED,
        "the KL of each step with its prefix held fixed; what an action does to later steps is missing",
    ),
    ("loss", "k3"): Effect(BIASED, "the FORWARD KL(ref || pi) of each step, with its prefix held fixed"),
}

ENTROPY_EFFECTS = {
    "per_step": Effect(
        BIASED,
        "the entropy of each step with its prefix held fixed; what an action does to later steps is missing",
    ),
}

RETURNS_EFFECTS: dict[str, tuple[Effect, Effect]] = {  # without and with discounting
    "total": (
        Effect(EXACT, "every action is paid the whole return"),
        Effect(BIASED, "ascends the discounted return E[sum_t gamma^t r_t], not J"),
    ),
    "reward_to_go": (
        Effect(EXACT, "what was paid before an action does not depend on it"),
        Effect(BIASED, "discounting from each action, without gamma^t, is the gradient of no objective"),
    ),
}

BUILT: dict[str, tuple[str, ...]] = {axis: tuple(effects) for axis, effects in EFFECTS.items()} | {
    "kl_estimator": tuple(dict.fromkeys(estimator for _, estimator in KL_EFFECTS)),
    "kl_placement": tuple(dict.fromkeys(placement for placement, _ in KL_EFFECTS)),
    "entropy_form": tuple(ENTROPY_EFFECTS),
    "returns": tuple(RETURNS_EFFECTS),
    "zero_spread": ("keep",),
    "truncations": ("keep",),
}
"""The names of each axis that work."""


def effects(estimator: Estimator) -> list[Effect]:
    """List what every choice of an estimator does; a term whose coefficient is 0 does nothing."""
    found = [table[getattr(estimator, axis)] for axis, table in EFFECTS.items()]
    found.append(RETURNS_EFFECTS[estimator.returns][estimator.gamma < 1.0])
    if estimator.needs_kl:
        found.append(KL_EFFECTS[estimator.kl_placement, estimator.kl_estimator])
    if estimator.needs_entropy:
        found.append(ENTROPY_EFFECTS[estimator.entropy_form])
    return found


def declared(estimator: Estimator) -> Effect:
    """Return the worst status among the choices, and the reasons of every choice that is not exact.

    Worst wins because scales multiply (a group mean with a fixed length is still one number), limits
    combine, and no choice mends another one's bias.
    """
    found = effects(estimator)
    status = max((effect.status for effect in found), key=FROM_BEST_TO_WORST.index)
    reasons = [effect.reason for effect in found if effect.status != EXACT]
    return Effect(status, "; ".join(reasons) or "no choice changes the expected gradient")
