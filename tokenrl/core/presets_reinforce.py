"""Defines the presets without an importance ratio: REINFORCE with its baselines and scales."""

from __future__ import annotations

from typing import NamedTuple

Fields = dict[str, str | float | int | bool | None]


class Preset(NamedTuple):
    """The fields that a preset sets, its paper, and a note: the formula and how other toolkits differ.

    The notes use R for the return of a row, G for the number of completions per prompt, N for the number of
    rows of the step and A for the advantage. `G_it` is the reward to go of row i at step t.
    """

    fields: Fields
    paper: str
    note: str


REINFORCE: dict[str, Preset] = {
    "reinforce": Preset(
        {"baseline": "none"},
        "Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement "
        "learning",
        "A_i = R_i, the mean over sequences of A_i sum_t log pi. No baseline at all: unbiased, and the "
        "reference for the variance of the others. TRL, verl and OpenRLHF offer no such choice by name.",
    ),
    "reinforce_running_mean": Preset(
        {"baseline": "running_mean", "running_mean_decay": 0.9},
        "Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement "
        "learning",
        "A_i = R_i - b with b <- 0.9 b + 0.1 mean(R) after the step, starting at running_mean_init (0). "
        "Works with one completion per prompt. If b were updated before use, a return would be in its own "
        "baseline.",
    ),
    "reinforce_baseline": Preset(
        {"baseline": "batch_mean"},
        "Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement "
        "learning",
        "A_i = R_i - mean over the N rows of the step, the row itself included: (N-1)/N of the gradient, "
        "also with several prompts. OpenRLHF 0.11.2's 'reinforce_baseline' centres in the prompt's group and "
        "then whitens over tokens, which is 'reinforce_pp_baseline' here; its 'flash_reinforce' is this one.",
    ),
    "reinforce_timestep_mean": Preset(
        {"baseline": "timestep_mean", "returns": "reward_to_go"},
        "Greensmith et al. 2004, Variance reduction techniques for gradient estimates in reinforcement "
        "learning, for baselines that depend on the step",
        "A_it = G_it - mean over the other rows that still act at t of G_jt, G the reward to go: exact, and "
        "without a critic, for episodes that all start alike (control) or prompts of similar difficulty. "
        "Where no other row acts at t, the latest such mean is used. Not found in TRL, verl or OpenRLHF.",
    ),
    "rloo": Preset(
        {},
        "Kool et al. 2019, Buy 4 REINFORCE samples, get a baseline for free; Ahmadian et al. 2024, "
        "arXiv 2402.14740",
        "A_i = R_i - mean of the other G-1 returns of the prompt; the mean over sequences of A_i sum_t "
        "log pi, with the KL as k1 in the reward before the baseline. TRL 1.16's RLOO is the same with "
        "a ratio and clip on the whole sequence and beta 0.05; verl 0.9.1 keeps its token mean over the "
        "batch, which is unbiased only in the limit; OpenRLHF 0.11.2 adds the KL after the baseline (also "
        "unbiased) and uses a token mean.",
    ),
    "rloo_token_mean": Preset(
        {"aggregation": "token_mean"},
        "Ahmadian et al. 2024, arXiv 2402.14740",
        "RLOO's advantages with the divisor that verl 0.9.1 and OpenRLHF 0.11.2 use by default: every token "
        "of the step counts the same. Unbiased only in the limit, with an error of order 1/N.",
    ),
    "loo_std": Preset(
        {"scale": "loo_std", "scale_eps": 0.1},
        "Kool et al. 2019, Buy 4 REINFORCE samples, get a baseline for free, for the baseline; the divisor "
        "has no paper",
        "A_i = (R_i - mean of the others)/(std of the others + 0.1), ddof 1, with three or more completions "
        "per prompt. Each prompt ascends its own gradient times E[1/(std + eps)], for any rewards. Noisier "
        "than RLOO and GRPO; a small eps makes it worse, because the others are often all equal.",
    ),
    "other_groups_std": Preset(
        {"scale": "other_groups_std", "scale_eps": 0.1},
        "Kool et al. 2019, Buy 4 REINFORCE samples, get a baseline for free, for the baseline; the divisor "
        "has no paper",
        "A_i = (R_i - mean of the others)/(std of the other prompts' rows + 0.1), ddof 1. Each prompt's "
        "direction is exact, and with many prompts the divisor is nearly one number. The counterpart of TRL "
        "1.16's scale_rewards 'batch', whose std contains the row itself.",
    ),
    "remax": Preset(
        {"baseline": "remax"},
        "Li et al. 2024, ReMax, arXiv 2310.10505",
        "A_i = R_i - reward of the greedy completion of the same prompt: one more completion per prompt, and "
        "no group. Exact, but its variance may exceed that of the mean reward as baseline. verl 0.9.1 also "
        "has a token mean over the step.",
    ),
    "opo": Preset(
        {"baseline": "opo", "leave_one_out": False},
        "Hao et al. 2025, On-policy RL with optimal reward baseline, arXiv 2505.23585",
        "A_i = R_i - sum_j L_j R_j / sum_j L_j over the group, the row itself included, as in the paper and "
        "verl 0.9.1: its direction is biased unless all lengths are equal. The baseline is the optimum only "
        "if |S|^2 is proportional to the length.",
    ),
    "opo_loo": Preset(
        {"baseline": "opo"},
        "Hao et al. 2025, On-policy RL with optimal reward baseline, arXiv 2505.23585, without the row "
        "itself",
        "A_i = R_i - sum_{j != i} L_j R_j / sum_{j != i} L_j: the same baseline made of the other "
        "completions only, which makes it exact. Not found in TRL, verl or OpenRLHF.",
    ),
    "optimal": Preset(
        {"baseline": "optimal"},
        "Greensmith et al. 2004, Variance reduction techniques for gradient estimates in reinforcement "
        "learning; Weaver & Tao 2001",
        "A_i = R_i - sum_{j != i} W_j R_j / sum_{j != i} W_j with W_j the squared score norms of row j: the "
        "leave-one-out estimate of b* = E[|S|^2 R]/E[|S|^2], the scalar of least variance. b* is optimal, "
        "its estimate from a small group need not be; it requires the norms of the scores.",
    ),
    "optimal_per_timestep": Preset(
        {"baseline": "optimal", "optimal_form": "per_timestep", "returns": "reward_to_go"},
        "Greensmith et al. 2004, Variance reduction techniques for gradient estimates in reinforcement "
        "learning",
        "A_it = G_it - sum_{j != i} w_jt G_jt / sum_{j != i} w_jt, w the squared score norm of the token at "
        "t, over the other rows that still act at t. OTB weights by the norms up to t instead.",
    ),
    "otb": Preset(
        {
            "baseline": "optimal",
            "optimal_form": "cumulative",
            "leave_one_out": False,
            "returns": "reward_to_go",
        },
        "Optimal token baseline, arXiv 2602.07078",
        "A_it = G_it - sum_j W_jt G_jt / sum_j W_jt, W the squared score norms summed up to t, the row "
        "itself included as in verl 0.9.1: a biased direction, strongly so with two completions per prompt. "
        "verl uses the norms in the logits, 1 - 2 pi + sum pi^2, and a token mean over the step.",
    ),
    "otb_loo": Preset(
        {"baseline": "optimal", "optimal_form": "cumulative", "returns": "reward_to_go"},
        "Optimal token baseline, arXiv 2602.07078, without the row itself",
        "The weights of 'otb', the sums over the other rows only, which makes it exact. Not found in TRL, "
        "verl or OpenRLHF.",
    ),
    "shrinkage": Preset(
        {"baseline": "shrinkage"},
        "arXiv 2511.03710, James-Stein shrinkage of prompt means, with two leave-one-out levels",
        "A_i = R_i - lam * mean of the prompt's others - (1 - lam) * mean of the other prompts' means, lam = "
        "tau^2/(tau^2 + sigma^2/(G-1)) estimated from the other prompts only, so it stays exact. Useful "
        "with few completions per prompt; with one prompt per step it is RLOO. Not found in TRL, verl or "
        "OpenRLHF.",
    ),
    "a2c": Preset(
        {"baseline": "value", "returns": "reward_to_go"},
        "Mnih et al. 2016, Asynchronous methods for deep reinforcement learning, arXiv 1602.01783",
        "A_it = G_it - V_it over whole episodes, the critic's loss half the squared error; exact for any V. "
        "The paper bootstraps after a few steps, discounts, and adds an entropy bonus of 0.01: set returns "
        "'gae', gamma and entropy_coef for that. TRL 1.16 has no such choice by name.",
    ),
}
