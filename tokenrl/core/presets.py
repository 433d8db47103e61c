"""Named points of the space of estimators: their fields, their paper, and where others differ."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """The fields that differ from `Estimator`'s defaults, the paper, and a note on the formula."""

    fields: dict[str, str | float | int | None]
    paper: str
    note: str


PRESETS: dict[str, Preset] = {
    "reinforce": Preset(
        {"baseline": "none"},
        "Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement "
        "learning",
        "A_i = R_i, the mean over sequences of A_i sum_t log pi. No baseline at all: unbiased, and the "
        "yardstick for the variance of the rest. TRL, verl and OpenRLHF offer no such choice by name.",
    ),
    "reinforce_running_mean": Preset(
        {"baseline": "running_mean", "running_mean_decay": 0.9},
        "Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement "
        "learning",
        "A_i = R_i - b with b <- 0.9 b + 0.1 mean(R) after the step, starting at running_mean_init (0). "
        "Works with one completion a prompt. Updating b before its use would leak a return into its own "
        "baseline.",
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
    "grpo": Preset(
        {
            "baseline": "group_mean",
            "scale": "group_std",
            "scale_ddof": 1,
            "scale_eps": 1e-4,
            "aggregation": "sequence_mean",
            "ratio": "token",
            "epsilon": 0.2,
            "kl_estimator": "k3",
            "kl_placement": "loss",
        },
        "Shao et al. 2024, DeepSeekMath, arXiv 2402.03300",
        "A_i = (R_i - mean)/(std + 1e-4) in the group, std with ddof 1 and eps outside the root, as TRL "
        "1.16; the mean over sequences of the mean over tokens, PPO's clip at 0.2, k3 in the loss with "
        "beta 0 unless set (the paper has 0.04). TRL's loss_type 'grpo' is this one, but its default is "
        "'dapo', a token mean over the step; verl has eps 1e-6 and a token mean, OpenRLHF eps 1e-9 and a "
        "token mean. Groups of equal rewards get exactly zero here; elsewhere rounding divided by eps may "
        "not vanish in float32.",
    ),
    "dr_grpo": Preset(
        {"baseline": "group_mean", "aggregation": "fixed_length", "ratio": "token", "epsilon": 0.2},
        "Liu et al. 2025, Understanding R1-Zero-like training: a critical perspective, arXiv 2503.20783",
        "A_i = R_i - group mean, not divided by the std, and tokens divided by the constant max_length: "
        "the gradient times (G-1)/(G max_length). TRL's loss_type 'dr_grpo' changes the divisor only and "
        "keeps the std unless scale_rewards is off; verl divides by the padded width unless told a "
        "constant; OpenRLHF has the centring but no constant divisor.",
    ),
    "ppo_clip": Preset(
        {"baseline": "batch_mean", "ratio": "token", "epsilon": 0.2},
        "Schulman et al. 2017, Proximal policy optimization algorithms, arXiv 1707.06347",
        "PPO's clipped ratio (eq. 7) without a critic: A_i = R_i - mean over the whole step, so that it "
        "needs no groups and serves control as well as language. Advantages are not divided by their std, "
        "as many programs do: add scale 'batch_std' for that. The peers' PPO learns a value and uses GAE "
        "instead.",
    ),
}
