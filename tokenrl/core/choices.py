"""Lists every choice on every axis: its name, its effect on the expected gradient and why, and its needs.

A new choice is one row here, its name in the type of its field in `axes`, and one formula in the module of
its axis: `baselines`, `scales`, `returns` or `losses`. `bias` says what all choices of one estimator do.

In the reasons, G is the number of completions per prompt, N the number of rows in the step, R the return of a
row, b the baseline, L the length of a row and p the probability of a correct completion. No torch is imported.

A reason is a cause. What stands after its colon is the objective that is ascended, or the gradient that is
computed, where no other choice matters; `bias.effects` leaves it out elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenrl.core.effects import (
    ASYMPTOTIC,
    BIASED,
    EXACT,
    FROM_BEST_TO_WORST,
    PER_PROMPT,
    UNKNOWN,
    UP_TO_SCALE,
    Choice,
    Effect,
)
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction

ON_POLICY = "on-policy every importance weight is 1"
FIRST_UPDATE = (
    "at the first update every ratio is 1, inside all bounds, and the gradient is REINFORCE's"
)
DISCOUNTED = "discounting from each action, without gamma^t, is the gradient of no objective"
NO_OBJECTIVE = Effect(BIASED, DISCOUNTED)
OF_OTHERS = "the baseline is made of the other completions of the prompt only"
WEIGHTED_OTHERS = "the baseline and its weights are made of the other completions only"
MEMORY = Choice(
    EXACT,
    "given the past, a memory is a constant, because it is updated after use",
    needs="baseline_value",
)

CHOICES: dict[str, dict[str, Choice]] = {
    "baseline": {
        "none": Choice(EXACT, "nothing is subtracted", any_units=True, in_group=True),
        "constant": Choice(
            EXACT,
            "a constant baseline times the score has mean zero",
            formula="baselines.constant",
            any_units=True,
        ),
        "running_mean": MEMORY,
        "tracker": MEMORY,
        "rloo": Choice(
            EXACT,
            OF_OTHERS,
            formula="baselines.rloo",
            compares="group",
            rows=2,
            centred=True,
            in_group=True,
        ),
        "quantile": Choice(
            EXACT,
            OF_OTHERS,
            formula="baselines.quantile",
            compares="group",
            rows=2,
            centred=True,
            additive=False,
        ),
        "group_mean": Choice(
            UP_TO_SCALE,
            "the row's own return is in the mean of its group, which with 'total' leaves (G-1)/G of the advantage "
            "with 'rloo': ascends E[R] - E[b]/G, (G-1)/G of the gradient",
            formula="baselines.mean",
            compares="group",
            rows=2,
            centred=True,
            in_group=True,
        ),
        "batch_mean": Choice(
            UP_TO_SCALE,
            "the row's own return is in the mean of the step: ascends E[R] - E[b]/N, (N-1)/N of the gradient",
            formula="baselines.mean",
            compares="step",
            rows=2,
        ),
        "remax": Choice(
            EXACT, "the greedy completion depends on the prompt only", needs="greedy_rewards"
        ),
        "opo": Choice(
            EXACT,
            WEIGHTED_OTHERS,
            formula="baselines.opo",
            compares="group",
            rows=2,
            centred=True,
            row_inside=Effect(
                BIASED,
                "the row's own return, weighted by its length, is in the baseline: ascends E[R] - E[b]/G, with "
                "equal lengths (G-1)/G of the gradient",
            ),
        ),
        "optimal": Choice(
            EXACT,
            WEIGHTED_OTHERS,
            formula="baselines.optimal",
            compares="group",
            rows=2,
            needs="score_norms",
            centred=True,
            row_inside=Effect(
                BIASED,
                "the row's own return, weighted by its score, is in the baseline: with one baseline per row ascends "
                "E[R] - E[b]/G, the weights held fixed",
            ),
        ),
        "shrinkage": Choice(
            EXACT,
            "neither the means nor their weights contain the row",
            formula="baselines.shrinkage",
            compares="group",
            rows=2,
        ),
        "value": Choice(
            EXACT,
            "right or wrong, the value of a state does not depend on the action there",
            needs="values",
            any_units=True,
        ),
        "episode_mean": Choice(
            BIASED,
            "the mean over the row's own steps contains the results of its own actions; by itself, with the "
            "undiscounted reward to go, it ascends the return with the u-th of L rewards weighted by 1 - u/L, so "
            "the last does not count; if every step has the same reward that is half the gradient",
            formula="baselines.episode_mean",
            compares="row",
            any_units=True,
        ),
        "timestep_mean": Choice(
            EXACT,
            "the baseline is made of the returns of the other rows at the same timestep",
            formula="baselines.timestep_mean",
            compares="step",
            rows=2,
            any_units=True,
            row_inside=Effect(
                ASYMPTOTIC,
                "the row's own return is in the mean of its timestep: (n-1)/n, with n rows that still act",
            ),
        ),
    },
    "scale": {
        "none": Choice(EXACT, "advantages are not divided"),
        "group_std": Choice(
            BIASED,
            "the row's own return is in the divisor: with binary rewards and the baseline 'group_mean' each prompt "
            "ascends at w_G(p) grad p, w_G(p) = E[s_K^2/(std_K + eps)]/(p(1-p)) with K ~ Binomial(G, p), s_K^2 = "
            "K/G(1 - K/G), and with 'rloo' at G/(G-1) times that; with three or more reward levels there is no "
            "objective",
            PER_PROMPT,
            formula="scales.by_std",
            compares="group",
            rows=2,
            of_prompt=True,
        ),
        "batch_std": Choice(
            ASYMPTOTIC,
            "the row's own return is in the divisor, which tends to the same number for all rows as the step grows",
            PER_PROMPT,
            formula="scales.by_std",
            compares="step",
            rows=2,
        ),
        "loo_std": Choice(
            PER_PROMPT,
            "the divisor is made of the other completions of the prompt: E[1/(std + eps)] of its gradient",
            formula="scales.loo_std",
            compares="group",
            rows=3,
            of_others=True,
            of_prompt=True,
        ),
        "other_groups_std": Choice(
            PER_PROMPT,
            "the divisor is made of the other prompts: E[1/(std + eps)] of the prompt's gradient",
            formula="scales.other_groups_std",
            compares="group",
            of_others=True,
        ),
        "token_whiten": Choice(
            ASYMPTOTIC,
            "the row's own advantages are in the mean and in the divisor, each of which tends to the same number "
            "for all rows as the step grows",
            formula="scales.token_whiten",
            subtracts_mean=True,
        ),
        "episode_std": Choice(
            BIASED,
            "each episode is divided by the spread of its own returns to go; the result is the gradient of no "
            "objective",
            formula="scales.episode_std",
            compares="row",
        ),
    },
    "aggregation": {
        "sequence_sum": Choice(EXACT, "the mean over sequences of the sum over their tokens"),
        "fixed_length": Choice(
            UP_TO_SCALE, "everything is multiplied by one constant, 1/max_length"
        ),
        "token_mean": Choice(
            ASYMPTOTIC,
            "the number of tokens in the step depends on the actions: the gradient tends to that of J, divided by "
            "the mean length, with an error of order 1/N",
        ),
        "sequence_mean": Choice(
            BIASED,
            "each sequence is weighted by 1/length: with one baseline b per row it ascends E[(R - b)/L], b held fixed",
        ),
    },
    "ratio": {
        "none": Choice(EXACT, "on-policy"),
        "token": Choice(EXACT, FIRST_UPDATE, needs="old_logprobs", token_bounds=True),
        "sequence_mean": Choice(EXACT, FIRST_UPDATE, needs="old_logprobs", whole_row=True),
        "sequence_product": Choice(
            EXACT,
            "the ratio of the sequence is exact off-policy too",
            needs="old_logprobs",
            whole_row=True,
        ),
        "geometric_clip": Choice(
            EXACT, FIRST_UPDATE, needs="old_logprobs", token_bounds=True, whole_row=True
        ),
        "cispo": Choice(EXACT, FIRST_UPDATE, needs="old_logprobs", token_bounds=True),
        "trust": Choice(EXACT, FIRST_UPDATE, needs="old_logprobs", token_bounds=True),
    },
    "importance": {  # where the sampler differs, `off_policy` says what these do
        "none": Choice(EXACT, "completions are not weighted"),
        "token": Choice(EXACT, ON_POLICY, needs="sampling_logprobs"),
        "prefix": Choice(EXACT, ON_POLICY, needs="sampling_logprobs", whole_row=True),
        "sequence": Choice(EXACT, ON_POLICY, needs="sampling_logprobs", whole_row=True),
        "geometric": Choice(EXACT, ON_POLICY, needs="sampling_logprobs", whole_row=True),
    },
    "kl_baseline": {
        "none": Choice(EXACT, "nothing is subtracted from the log ratio"),
        "closed_form": Choice(
            EXACT, "the KL of a step does not depend on the action there", needs="token_kl"
        ),
    },
    "importance_bound": {"truncate": Choice(EXACT, ON_POLICY), "mask": Choice(EXACT, ON_POLICY)},
    "optimal_form": {
        "sequence": Choice(
            EXACT, "one baseline per row, weighted by the scores of the other completions"
        ),
        "per_timestep": Choice(
            EXACT, "one per timestep, weighted by the scores of the other rows at it"
        ),
        "cumulative": Choice(
            EXACT, "one per timestep, weighted by the scores of the other rows up to it"
        ),
    },
    "returns": {
        "total": Choice(
            EXACT,
            "every action is credited with the whole return",
            formula="returns.reward_to_go",
            to_go=True,
            discounted=Effect(
                BIASED,
                "rewards are discounted from the first step: ascends the discounted return E[sum_t gamma^t r_t]",
            ),
        ),
        "reward_to_go": Choice(
            EXACT,
            "earlier rewards do not depend on an action",
            formula="returns.reward_to_go",
            to_go=True,
            discounted=NO_OBJECTIVE,
        ),
        "blame_window": Choice(
            BIASED,
            "rewards beyond the window are credited to no action: the gradient of no objective, and exact if no row "
            "is longer than the window",
            formula="returns.in_window",
            discounted=Effect(
                BIASED,
                "rewards beyond the window are credited to no action, and the others are discounted",
            ),
        ),
        "episode_normalized": Choice(
            BIASED,
            "the mean and the spread of each episode's own returns to go depend on its actions: it is the gradient "
            "of no objective, and in sum a good episode gets as much credit as a bad one, none",
            formula="returns.episode_normalized",
            compares="row",
            subtracts_mean=True,
        ),
        "gae": Choice(
            BIASED,
            "with lam < 1 values replace later rewards: unbiased if they are exact, V^pi of the state and of the "
            "number of steps left, or if no action changes their errors",
            formula="returns.lambda_return",
            needs="values",
            discounted=NO_OBJECTIVE,
        ),
    },
    "components": {
        "summed": Choice(EXACT, "the rewards of all functions are added first"),
        "separate": Choice(
            EXACT, "gradients add up, and that of each function has its own baseline"
        ),
    },
    # These hold if the dropped groups had no advantage, see `bias.zero_spread_effect`. Only rewards are compared.
    "zero_spread": {
        "keep": Choice(
            EXACT, "groups of equal returns have the advantage 0 and count in the divisor"
        ),
        "drop": Choice(
            PER_PROMPT,
            "the step is divided by the number of kept groups: of B prompts each is weighted by B E[1/kept | it is "
            "kept], which is 1 with one prompt per step",
            compares="group",
        ),
        "refill": Choice(
            UP_TO_SCALE,
            "new prompts fill the step in proportion to P(kept), which cancels 1/P(kept): one number for all "
            "prompts, if they are drawn independently (resampling the SAME prompt would be biased)",
            compares="group",
        ),
    },
    "truncations": {
        "keep": Choice(EXACT, "a truncated completion is an outcome like any other"),
        "mask": Choice(
            BIASED,
            "truncated rows stay in the baseline and have no gradient: with one baseline b per row it ascends "
            "E[m (R - b)], m = 1 for rows that are not truncated and b held fixed at its mean (J with 'rloo', 0 "
            "with 'none'), as if each truncated row had the reward b",
        ),
    },
}

EACH = "the gradient of each step's {}, with its prefix held fixed"
LATER = "the effect of an action on the {} of later steps is missing"

KL_EFFECTS: dict[tuple[str, str], Choice] = {
    ("reward", "k1"): Choice(
        EXACT,
        "a log ratio in the reward gives the gradient of J - beta KL",
        formula="divergences.k1",
    ),
    ("reward", "k2"): Choice(
        BIASED,
        "the mean of k2 is not the KL: ascends E[R] - beta E[k2] with k2 held fixed",
        formula="divergences.k2",
    ),
    ("reward", "k3"): Choice(
        BIASED,
        "k3 in the reward lacks the gradient of k3 itself, whose mean is not zero as that of k1 is",
        formula="divergences.k3",
    ),
    ("loss", "k1"): Choice(
        BIASED,
        "the gradient of the log ratio is not that of the KL: it has mean zero, so J is ascended without any KL",
        formula="divergences.k1",
    ),
    ("loss", "k2"): Choice(
        BIASED, f"{LATER.format('KL')}: {EACH.format('KL')}", formula="divergences.k2"
    ),
    ("loss", "k3"): Choice(
        BIASED,
        f"k3 differentiated is not the KL(pi || ref): {EACH.format('FORWARD KL(ref || pi)')}",
        formula="divergences.k3",
    ),
    ("loss", "k2_sequence"): Choice(
        EXACT,
        "k2 of the whole sequence has the gradient of the KL",
        formula="divergences.k2_sequence",
    ),
    ("loss", "full_path"): Choice(
        EXACT,
        "each action is credited with its own and later log ratios",
        formula="divergences.full_path",
    ),
    ("loss", "closed_form"): Choice(
        BIASED, f"{LATER.format('KL')}: {EACH.format('KL')}", needs="token_kl"
    ),
    ("loss", "closed_form_path"): Choice(
        EXACT,
        "the gradient of each step's KL, and each action is credited with the KL of later steps",
        needs="token_kl",
        formula="divergences.closed_form_path",
    ),
}
"""A KL term by its place and its estimator; a pair that is missing is refused."""

ENTROPY = Choice(BIASED, f"{LATER.format('entropy')}: {EACH.format('entropy')}")
"""The effect of an entropy bonus."""

LOG_SUCCESS = (
    "the row's own return is in the divisor: with three or more reward levels there is no objective; on rewards of "
    "0 and 1 it ascends "
)
MAXRL = Effect(BIASED, "hard prompts count for more than easy ones", PER_PROMPT)
RARE = "prefers completions that are rarely matched by others; a reward of 1 counts k (1-p)^(k-1)"
BEST = "the mean of the best of k rows, minus a number made of the others"
OF_GROUP: Any = {"compares": "group", "rows": 2, "in_group": True}
BEST_OF_K = Choice(
    EXACT,
    BEST,
    formula="objectives.max_at_k",
    of_reward=Effect(BIASED, RARE, PER_PROMPT),
    **OF_GROUP,
)
OF_LOG: Any = {"formula": "objectives.log_success", **OF_GROUP}

OBJECTIVES: dict[tuple[str, str], Choice] = {
    ("reward", "default"): Choice(EXACT, "the mean reward"),
    # Subtracted is the mean of the best of k others, of k - 1 others, G/(G-1) times the first, and nothing.
    ("max_at_k", "leave_one_out"): replace(BEST_OF_K, centred=True, of_others=True),
    ("max_at_k", "sloo_minus_one"): replace(BEST_OF_K, centred=True),
    ("max_at_k", "sloo"): replace(BEST_OF_K, of_others=True),
    ("max_at_k", "no_baseline"): BEST_OF_K,
    ("log_success", "maxrl"): Choice(
        BIASED,
        f"{LOG_SUCCESS}sum_(k<G) (1-(1-p)^k)/k",
        EXACT,
        centred=True,
        of_reward=MAXRL,
        **OF_LOG,
    ),
    ("log_success", "keep_failures"): Choice(
        BIASED, f"{LOG_SUCCESS}sum_(k<=G) (1-(1-p)^k)/k", EXACT, of_reward=MAXRL, **OF_LOG
    ),
    ("log_success", "leave_one_out"): Choice(
        PER_PROMPT,
        "the divisor b is made of the other completions only: E[1/b; b > 0] of the gradient of E[R]",
        centred=True,
        **OF_LOG,
    ),
}
"""Each form of each objective, with its effect on the objective's own gradient; the first listed is the default.

Another objective than the reward makes the advantages by itself: its entry stands in place of a baseline's."""

REPLACED = {"baseline": "none", "scale": "none", "returns": "total", "components": "summed"}
"""The axes that another objective replaces, with the only choice that goes with it."""

OF_YOUR_OWN = "a baseline of your own is exact if it contains nothing of the row's own actions"
YOUR_OWN = Choice(UNKNOWN, OF_YOUR_OWN, formula="advantages.from_function", any_units=True)


def own_choice(baseline: Any) -> Choice:
    """Return the entry of a user's function, or of a class of memories; it is imported if it was named.

    It declares its bias by its attribute `bias`, a status with the reason.

    Raises:
        Refused: The attribute is anything else, or nothing can be imported by the name.
    """
    own = baseline.load() if isinstance(baseline, NamedFunction) else baseline
    is_memory = isinstance(own, type) and hasattr(own, "read") and hasattr(own, "update")
    choice = MEMORY if is_memory else YOUR_OWN
    declaration = getattr(own, "bias", None)
    match declaration:
        case None:
            return choice
        case (str(status), str(reason)) if status in FROM_BEST_TO_WORST:
            return replace(choice, status=status, reason=reason)
    raise Refused(
        f"The bias of the baseline {baseline.__name__} is {declaration!r}; it must be a status and the "
        f"reason, two texts. A status is one of: {', '.join(FROM_BEST_TO_WORST)}."
    )
