"""The tables behind `bias`: what each name on each axis does to the expected gradient, and why."""

from __future__ import annotations

from typing import NamedTuple

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
one. unknown: the settings do not decide it."""


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
        "remax": Effect(EXACT, "the greedy completion depends on the prompt only"),
        "opo": Effect(EXACT, "the baseline and its weights are made of the other completions only"),
        "optimal": Effect(EXACT, "the baseline and its weights are made of the other completions only"),
        "shrinkage": Effect(
            EXACT, "both means leave the row out, and the weight is fixed or made of the other prompts only"
        ),
        "value": Effect(
            EXACT, "the value of a state does not see the action taken there, however wrong it is"
        ),
        "episode_mean": Effect(
            BIASED,
            "the mean over the row's own steps contains what its actions lead to: undiscounted and paid to "
            "go, ascends the return with the u-th of L rewards counted 1 - u/L, the last not at all; half "
            "the gradient if every step is paid the same",
        ),
        "timestep_mean": Effect(
            EXACT, "the baseline is made of what the other rows get at the same timestep"
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
        "loo_std": Effect(
            PER_PROMPT,
            "the divisor is made of the other completions of the prompt: E[1/(std + eps)] of its gradient",
        ),
        "other_groups_std": Effect(
            PER_PROMPT, "the divisor is made of the other prompts: E[1/(std + eps)] of the prompt's gradient"
        ),
        "token_whiten": Effect(
            ASYMPTOTIC,
            "the row's own advantages are in mean and divisor, which tend to two numbers for all as the step "
            "grows",
        ),
        "episode_std": Effect(
            BIASED, "each episode is divided by the spread of its own returns to go; no objective"
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
        "sequence_mean": Effect(EXACT, "at the first update every ratio is 1"),
        "sequence_product": Effect(EXACT, "on-policy, and off-policy too: the ratio of the whole sequence"),
        "cispo": Effect(EXACT, "at the first update every ratio is 1, inside its bounds"),
    },
}

SELF_INCLUDING: dict[str, Effect] = {
    "opo": Effect(
        BIASED, "the row's own return, weighted by its length, is in the baseline; with equal lengths (G-1)/G"
    ),
    "optimal": Effect(BIASED, "the row's own return, weighted by its score, is in the baseline"),
    "timestep_mean": Effect(
        ASYMPTOTIC,
        "the row's own return is in the mean of its timestep: (n-1)/n with the n rows that still act",
    ),
}
"""What the baselines do with `leave_one_out=False`."""

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
    ("loss", "k2_sequence"): Effect(
        EXACT, "half the squared log ratio of the sequence has the KL's gradient"
    ),
    ("loss", "full_path"): Effect(EXACT, "each action carries the log ratios from there on"),
}
"""What a KL does in each place; a pair that is missing makes no sense."""

ENTROPY_EFFECTS = {
    "per_step": Effect(
        BIASED,
        "the entropy of each step with its prefix held fixed; what an action does to later steps is missing",
    ),
    "sequence": Effect(EXACT, "each action carries the entropy of later steps too"),
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
    "blame_window": (
        Effect(
            BIASED,
            "rewards that come later than the window are credited to nobody, which is the gradient of no "
            "objective; exact if no row is longer than the window",
        ),
        Effect(BIASED, "rewards later than the window are credited to nobody, and the others are discounted"),
    ),
    "gae": (
        Effect(
            BIASED,
            "with lam < 1 values stand in for rewards; unbiased only with the exact values, V^pi of the "
            "state and of the steps left",
        ),
        Effect(BIASED, "discounting from each action, without gamma^t, is the gradient of no objective"),
    ),
}

TRUNCATIONS_EFFECTS = {
    "keep": Effect(EXACT, "a truncated completion is an outcome like any other"),
    "mask": Effect(
        BIASED,
        "truncated rows stay in the baseline and have no gradient: ascends E[m R] - b P(m = 1), m for not "
        "truncated and b = J held fixed, which rewards or punishes truncation by how J compares with 0",
    ),
    "drop": Effect(BIASED, "ascends the reward given that the completion is not truncated, E[R | not cut]"),
}

ZERO_SPREAD_EFFECTS = {
    "keep": Effect(EXACT, "groups of equal returns have no advantage and count in the divisor"),
    "drop": Effect(
        PER_PROMPT,
        "divided by the groups that are kept: a prompt counts by E[1/kept | it is kept]; with one prompt "
        "1/P(kept) of the gradient",
    ),
    "refill": Effect(
        UP_TO_SCALE,
        "new prompts fill the step in proportion to P(kept), which undoes 1/P(kept): one number, if prompts "
        "are drawn independently (a second try of the SAME prompt would be biased)",
    ),
}
"""When the dropped groups had no advantage; `bias.zero_spread_effect` says when that is so. Only rewards are
compared: groups equal in them, and not in what follows a truncation (`bootstrap`), had one."""

CENTRED = ("rloo", "group_mean", "opo", "optimal")
"""Baselines that equal the return in a group of equal returns."""

BUILT: dict[str, tuple[str, ...]] = {axis: tuple(effects) for axis, effects in EFFECTS.items()} | {
    "optimal_form": ("sequence", "per_timestep", "cumulative"),
    "kl_estimator": tuple(dict.fromkeys(estimator for _, estimator in KL_EFFECTS)),
    "kl_placement": tuple(dict.fromkeys(placement for placement, _ in KL_EFFECTS)),
    "entropy_form": tuple(ENTROPY_EFFECTS),
    "returns": tuple(RETURNS_EFFECTS),
    "zero_spread": tuple(ZERO_SPREAD_EFFECTS),
    "truncations": tuple(TRUNCATIONS_EFFECTS),
}
"""The names of each axis about which something is stated: all."""
