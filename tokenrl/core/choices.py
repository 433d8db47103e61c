"""Lists every choice on every axis: its effect on the expected gradient and why, its formula, and what it needs.

A new choice is one row here, its name in the type of its field in `axes`, and the formula that the row names, in
`baselines`, `scales` or `returns`. `bias` says what all choices of one estimator do. No torch is imported.

In the reasons, G is the number of completions per prompt, N the number of rows in the step, R the return of a
row, b the baseline, L the length of a row and p the probability of a correct completion. The part after a colon
names what is ascended if no other choice matters; `bias.effects` leaves it out elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

from tokenrl.core.effects import ASYMPTOTIC, BIASED, EXACT, PER_PROMPT, UP_TO_SCALE, Choice, Effect

ON_POLICY = "on-policy every importance weight is 1"
FIRST_UPDATE = "at the first update every ratio is 1, and the gradient is REINFORCE's"
TOKEN_RATIO = Choice(EXACT, FIRST_UPDATE, token_bounds=True, needs="old_logprobs")
ROW_WEIGHT = Choice(EXACT, ON_POLICY, whole_row=True, needs="sampling_logprobs")
NO_OBJECTIVE = Effect(
    BIASED, "discounting from each action, without gamma^t, is the gradient of no objective"
)
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
            "baselines.constant",
            any_units=True,
        ),
        "running_mean": MEMORY,
        "tracker": MEMORY,
        "rloo": Choice(EXACT, OF_OTHERS, "baselines.rloo", "group", centred=True, in_group=True),
        "quantile": Choice(
            EXACT, OF_OTHERS, "baselines.quantile", "group", centred=True, additive=False
        ),
        "group_mean": Choice(
            UP_TO_SCALE,
            "the row's own return is in the mean of its group, which with 'total' leaves (G-1)/G of the advantage "
            "with 'rloo': ascends E[R] - E[b]/G, (G-1)/G of the gradient",
            "baselines.mean",
            "group",
            centred=True,
            in_group=True,
        ),
        "batch_mean": Choice(
            UP_TO_SCALE,
            "the row's own return is in the mean of the step: ascends E[R] - E[b]/N, (N-1)/N of the gradient",
            "baselines.mean",
            "step",
        ),
        "remax": Choice(EXACT, "a greedy completion depends on its prompt", needs="greedy_rewards"),
        "opo": Choice(
            EXACT,
            WEIGHTED_OTHERS,
            "baselines.opo",
            "group",
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
            "baselines.optimal",
            "group",
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
            "baselines.shrinkage",
            "group",
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
            "baselines.mean",
            "row",
            any_units=True,
        ),
        "timestep_mean": Choice(
            EXACT,
            "the baseline is made of the returns of the other rows at the same timestep",
            "baselines.timestep_mean",
            "step",
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
            "scales.by_std",
            "group",
            binary=PER_PROMPT,
        ),
        "batch_std": Choice(
            ASYMPTOTIC,
            "the row's own return is in the divisor, which tends to the same number for all rows as the step grows",
            "scales.by_std",
            "step",
            binary=PER_PROMPT,
        ),
        "loo_std": Choice(
            PER_PROMPT,
            "the divisor is made of the other completions of the prompt: E[1/(std + eps)] of its gradient",
            "scales.loo_std",
            "group",
            rows=3,
            of_others=True,
        ),
        "token_whiten": Choice(
            ASYMPTOTIC,
            "the row's own advantages are in the mean and in the divisor, each of which tends to the same number "
            "for all rows as the step grows",
            "scales.token_whiten",
            subtracts_mean=True,
        ),
        "episode_std": Choice(
            BIASED,
            "each episode is divided by the spread of its own returns to go; the result is the gradient of no "
            "objective",
            "scales.by_std",
            "row",
        ),
        "target": Choice(
            BIASED,
            "a completion counts by its own probability among those of its group: as the group grows, it tends to "
            "ascend log E[exp(u/eta)]/2 under the square of the policy, u the standardised returns held fixed",
            "scales.target",
            "group",
            needs="old_logprobs",
            subtracts_mean=True,
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
        "token": TOKEN_RATIO,
        "sequence_mean": Choice(EXACT, FIRST_UPDATE, whole_row=True, needs="old_logprobs"),
        "sequence_product": Choice(
            EXACT,
            "the ratio of the sequence is exact off-policy too",
            whole_row=True,
            needs="old_logprobs",
        ),
        "geometric_clip": replace(TOKEN_RATIO, whole_row=True),
        "cispo": TOKEN_RATIO,
        "trust": TOKEN_RATIO,
        "delight": Choice(
            BIASED,
            "each token's advantage is gated by itself and by the token's own probability, which is the gradient of no "
            "objective",
            needs="old_logprobs",
        ),
    },
    "importance": {  # where the sampler differs, `off_policy` says what these do
        "none": Choice(EXACT, "completions are not weighted"),
        "token": Choice(EXACT, ON_POLICY, needs="sampling_logprobs"),
        "prefix": ROW_WEIGHT,
        "sequence": ROW_WEIGHT,
        "geometric": ROW_WEIGHT,
    },
    "kl_baseline": {
        "none": Choice(EXACT, "nothing is subtracted from the log ratio"),
        "closed_form": Choice(EXACT, "a step's KL does not depend on its action", needs="token_kl"),
    },
    "importance_bound": {"truncate": Choice(EXACT, ON_POLICY), "mask": Choice(EXACT, ON_POLICY)},
    "optimal_form": {
        "sequence": Choice(EXACT, "one per row, weighted by the scores of the other completions"),
        "cumulative": Choice(EXACT, "one per timestep, weighted by the scores of others up to it"),
    },
    "returns": {
        "total": Choice(
            EXACT,
            "every action is credited with the whole return",
            "returns.reward_to_go",
            discounted=Effect(
                BIASED,
                "rewards are discounted from the first step: ascends the discounted return E[sum_t gamma^t r_t]",
            ),
        ),
        "reward_to_go": Choice(
            EXACT,
            "earlier rewards do not depend on an action",
            "returns.reward_to_go",
            discounted=NO_OBJECTIVE,
        ),
        "blame_window": Choice(
            BIASED,
            "rewards beyond the window are credited to no action: the gradient of no objective, and exact if no row "
            "is longer than the window",
            "returns.in_window",
            discounted=Effect(
                BIASED,
                "rewards beyond the window are credited to no action, and the others are discounted",
            ),
        ),
        "episode_normalized": Choice(
            BIASED,
            "the mean and the spread of each episode's own returns to go depend on its actions: it is the gradient "
            "of no objective, and in sum a good episode gets as much credit as a bad one, none",
            "returns.episode_normalized",
            "row",
            subtracts_mean=True,
        ),
        "gae": Choice(
            BIASED,
            "with lam < 1 values replace later rewards: unbiased if they are exact, V^pi of the state and of the "
            "number of steps left, or if no action changes their errors",
            "returns.lambda_return",
            needs="values",
            discounted=NO_OBJECTIVE,
        ),
    },
    "components": {
        "summed": Choice(EXACT, "the rewards of all functions are added first"),
        "separate": Choice(EXACT, "gradients add up, and each function has its own baseline"),
    },
    # These hold if the dropped groups had no advantage, see `bias.zero_spread_effect`. Only rewards are compared.
    "zero_spread": {
        "keep": Choice(EXACT, "groups of equal returns have advantage 0 and count in the divisor"),
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
    "prompts": {
        "uniform": Choice(EXACT, "all prompts are drawn equally often"),
        "weighted": Choice(
            PER_PROMPT,
            "prompts are drawn with unequal chances q: ascends sum_x U(p(x)) with dU/dp = q, so with q in proportion "
            "to p (1 - p) the sum of p^2 / 2 - p^3 / 3, where the divisor of q is held fixed",
        ),
        "inverse": Choice(
            EXACT,
            "the gradient of each prompt is divided by its chance, which stands still in a pass over the prompts",
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

RARE = "prefers completions that are rarely matched by others; a reward of 1 counts k (1-p)^(k-1)"
BEST_OF_K = Choice(
    EXACT,
    "the mean of the best of k rows, minus a number made of the others",
    "objectives.max_at_k",
    "group",
    of_reward=Effect(BIASED, RARE, binary=PER_PROMPT),
    in_group=True,
)
LOG_SUCCESS = (
    "the row's own return is in the divisor: with three or more reward levels there is no objective; on rewards of "
    "0 and 1 it ascends "
)
OF_MEAN = Choice(
    BIASED,
    LOG_SUCCESS,
    "objectives.log_success",
    "group",
    binary=EXACT,
    of_reward=Effect(BIASED, "hard prompts count for more than easy ones", binary=PER_PROMPT),
    in_group=True,
)

OBJECTIVES: dict[tuple[str, str], Choice] = {
    ("reward", "default"): Choice(EXACT, "the mean reward"),
    # Subtracted is the mean of the best of k others, of k - 1 others, G/(G-1) times the first, and nothing.
    ("max_at_k", "leave_one_out"): replace(BEST_OF_K, centred=True, of_others=True),
    ("max_at_k", "sloo_minus_one"): replace(BEST_OF_K, centred=True),
    ("max_at_k", "sloo"): replace(BEST_OF_K, of_others=True),
    ("max_at_k", "no_baseline"): BEST_OF_K,
    ("quantile", "default"): Choice(
        BIASED,
        "the row's own return is in the quantile: as the group grows, it tends to ascend the mean of the best share of "
        "the returns (conditional value at risk)",
        "objectives.quantile",
        "group",
        centred=True,
        of_reward=Effect(BIASED, "all but the best rows do not count", binary=PER_PROMPT),
        in_group=True,
    ),
    ("log_success", "maxrl"): replace(
        OF_MEAN, reason=f"{LOG_SUCCESS}sum_(k<G) (1-(1-p)^k)/k", centred=True
    ),
    ("log_success", "keep_failures"): replace(
        OF_MEAN, reason=f"{LOG_SUCCESS}sum_(k<=G) (1-(1-p)^k)/k"
    ),
    ("log_success", "leave_one_out"): Choice(
        PER_PROMPT,
        "the divisor b is made of the other completions only: E[1/b; b > 0] of the gradient of E[R]",
        "objectives.log_success",
        "group",
        centred=True,
        in_group=True,
    ),
}
"""Each form of each objective, with its effect on the objective's own gradient; the first listed is the default.

Another objective than the reward makes the advantages by itself: its entry stands in place of a baseline's."""
