"""Every choice on every axis: its name, what it does to the expected gradient and why, and what it needs.

This table is the only place where the names stand. A new choice is one row here and one formula in the module
of its axis: `baselines`, `scales`, `returns`, `kl`, or `objectives` for aggregations and ratios. The command
line then offers the choice, the checks know it and the lab measures it. `bias` says what all choices of one
estimator do together. This module imports no torch.
"""

from __future__ import annotations

from tokenrl.core.effects import ASYMPTOTIC, BIASED, EXACT, PER_PROMPT, UNKNOWN, UP_TO_SCALE, Choice, Effect

CHOICES: dict[str, dict[str, Choice]] = {
    "baseline": {
        "none": Choice(EXACT, "nothing is subtracted"),
        "constant": Choice(EXACT, "a constant baseline times the score has mean zero"),
        "running_mean": Choice(
            EXACT,
            "given the past the running mean is a constant, for it is updated after use",
            needs="baseline_value",
        ),
        "rloo": Choice(
            EXACT,
            "the baseline is made of the other completions of the prompt only",
            compares="group",
            centred=True,
        ),
        "group_mean": Choice(
            UP_TO_SCALE,
            "the row's own return is in the mean of its group: (G-1)/G of the gradient",
            compares="group",
            centred=True,
        ),
        "batch_mean": Choice(
            UP_TO_SCALE,
            "the row's own return is in the mean of the step: (N-1)/N of the gradient",
            compares="step",
        ),
        "remax": Choice(EXACT, "the greedy completion depends on the prompt only", needs="greedy_rewards"),
        "opo": Choice(
            EXACT,
            "the baseline and its weights are made of the other completions only",
            compares="group",
            centred=True,
            row_inside=Effect(
                BIASED,
                "the row's own return, weighted by its length, is in the baseline; with equal lengths "
                "(G-1)/G",
            ),
        ),
        "optimal": Choice(
            EXACT,
            "the baseline and its weights are made of the other completions only",
            compares="group",
            needs="score_norms",
            centred=True,
            row_inside=Effect(BIASED, "the row's own return, weighted by its score, is in the baseline"),
        ),
        "shrinkage": Choice(
            EXACT,
            "both means leave the row out, and the weight is fixed or made of the other prompts only",
            compares="group",
        ),
        "value": Choice(
            EXACT,
            "the value of a state does not see the action taken there, however wrong it is",
            needs="values",
        ),
        "episode_mean": Choice(
            BIASED,
            "the mean over the row's own steps contains what its actions lead to: undiscounted and paid to "
            "go, ascends the return with the u-th of L rewards counted 1 - u/L, the last not at all; half "
            "the gradient if every step is paid the same",
            compares="row",
        ),
        "timestep_mean": Choice(
            EXACT,
            "the baseline is made of what the other rows get at the same timestep",
            compares="step",
            row_inside=Effect(
                ASYMPTOTIC,
                "the row's own return is in the mean of its timestep: (n-1)/n with the n rows that still act",
            ),
        ),
    },
    "scale": {
        "none": Choice(EXACT, "advantages are not divided"),
        "group_std": Choice(
            BIASED,
            "the row's own return is in the divisor: with binary rewards and a mean baseline each prompt "
            "ascends at w_G(p) grad p, w_G(p) = E[s_K^2/(std_K + eps)]/(p(1-p)) with K ~ Binomial(G, p), "
            "s_K^2 = K/G(1 - K/G); with three or more reward levels there is no objective",
            compares="group",
        ),
        "batch_std": Choice(
            ASYMPTOTIC,
            "the row's own return is in the divisor, which tends to one number for all as the step grows",
            compares="step",
        ),
        "loo_std": Choice(
            PER_PROMPT,
            "the divisor is made of the other completions of the prompt: E[1/(std + eps)] of its gradient",
            compares="group",
        ),
        "other_groups_std": Choice(
            PER_PROMPT,
            "the divisor is made of the other prompts: E[1/(std + eps)] of the prompt's gradient",
            compares="group",
        ),
        "token_whiten": Choice(
            ASYMPTOTIC,
            "the row's own advantages are in mean and divisor, which tend to two numbers for all as the step "
            "grows",
        ),
        "episode_std": Choice(
            BIASED,
            "each episode is divided by the spread of its own returns to go; no objective",
            compares="row",
        ),
    },
    "aggregation": {
        "sequence_sum": Choice(EXACT, "the mean over sequences of the sum over their tokens"),
        "fixed_length": Choice(UP_TO_SCALE, "one constant divides everything: 1/max_length of the gradient"),
        "token_mean": Choice(
            ASYMPTOTIC,
            "the number of tokens in the step depends on the actions; the gradient tends to that of J, "
            "divided by the mean length, with an error of order 1/N",
        ),
        "sequence_mean": Choice(
            BIASED, "each sequence counts by 1/length: ascends E[(R - b)/L] with the baseline b held fixed"
        ),
    },
    "ratio": {
        "none": Choice(EXACT, "on-policy"),
        "token": Choice(
            EXACT, "at the first update every ratio is 1, and the clipped gain has REINFORCE's gradient"
        ),
        "sequence_mean": Choice(EXACT, "at the first update every ratio is 1", whole_row=True),
        "sequence_product": Choice(
            EXACT, "on-policy, and off-policy too: the ratio of the whole sequence", whole_row=True
        ),
        "cispo": Choice(EXACT, "at the first update every ratio is 1, inside its bounds"),
    },
    "optimal_form": {
        "sequence": Choice(EXACT, "one baseline for the row, weighted by the other completions' scores"),
        "per_timestep": Choice(EXACT, "one for each timestep, weighted by the others' scores there"),
        "cumulative": Choice(EXACT, "one for each timestep, weighted by the others' scores up to there"),
    },
    "entropy_form": {
        "per_step": Choice(
            BIASED,
            "the entropy of each step with its prefix held fixed; what an action does to later steps is "
            "missing",
        ),
        "sequence": Choice(EXACT, "each action carries the entropy of later steps too", whole_row=True),
    },
    "returns": {
        "total": Choice(
            EXACT,
            "every action is paid the whole return",
            discounted=Effect(BIASED, "ascends the discounted return E[sum_t gamma^t r_t], not J"),
        ),
        "reward_to_go": Choice(
            EXACT,
            "what was paid before an action does not depend on it",
            discounted=Effect(
                BIASED, "discounting from each action, without gamma^t, is the gradient of no objective"
            ),
        ),
        "blame_window": Choice(
            BIASED,
            "rewards that come later than the window are credited to nobody, which is the gradient of no "
            "objective; exact if no row is longer than the window",
            discounted=Effect(
                BIASED, "rewards later than the window are credited to nobody, and the others are discounted"
            ),
        ),
        "gae": Choice(
            BIASED,
            "with lam < 1 values stand in for rewards; unbiased only with the exact values, V^pi of the "
            "state and of the steps left",
            needs="values",
            discounted=Effect(
                BIASED, "discounting from each action, without gamma^t, is the gradient of no objective"
            ),
        ),
    },
    # When the dropped groups had no advantage; `bias.zero_spread_effect` says when that is so. Only rewards
    # are compared: groups equal in them, and not in what follows a truncation (`bootstrap`), had one.
    "zero_spread": {
        "keep": Choice(EXACT, "groups of equal returns have no advantage and count in the divisor"),
        "drop": Choice(
            PER_PROMPT,
            "divided by the groups that are kept: a prompt counts by E[1/kept | it is kept]; with one prompt "
            "1/P(kept) of the gradient",
        ),
        "refill": Choice(
            UP_TO_SCALE,
            "new prompts fill the step in proportion to P(kept), which undoes 1/P(kept): one number, if "
            "prompts are drawn independently (a second try of the SAME prompt would be biased)",
        ),
    },
    "truncations": {
        "keep": Choice(EXACT, "a truncated completion is an outcome like any other"),
        "mask": Choice(
            BIASED,
            "truncated rows stay in the baseline and have no gradient: ascends E[m R] - b P(m = 1), m for "
            "not truncated and b = J held fixed, which rewards or punishes truncation by how J compares "
            "with 0",
        ),
        "drop": Choice(
            BIASED, "ascends the reward given that the completion is not truncated, E[R | not cut]"
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
    ("loss", "k2_sequence"): Effect(
        EXACT, "half the squared log ratio of the sequence has the KL's gradient"
    ),
    ("loss", "full_path"): Effect(EXACT, "each action carries the log ratios from there on"),
}
"""What a KL does, by its place and its estimate; a pair that is missing makes no sense."""

YOUR_OWN = Choice(UNKNOWN, "a baseline of your own is exact if it contains nothing of the row's own actions")


def choice_of(axis: str, name: object) -> Choice:
    """Return the row of a name; a function given as the baseline has a row too, of unknown bias."""
    return YOUR_OWN if callable(name) else CHOICES[axis][str(name)]
