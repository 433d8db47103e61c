"""Defines the presets with an importance ratio: PPO and the forms that trainers of language models use."""

from __future__ import annotations

from tokenrl.core.presets_reinforce import Fields, Preset

GROUP_STD: Fields = {
    "baseline": "group_mean",
    "scale": "group_std",
    "scale_ddof": 1,
    "scale_eps": 1e-4,
}
"""The advantage of GRPO: `(R - mean) / (std + eps)` over the group."""

GRPO: Fields = {
    **GROUP_STD,
    "aggregation": "sequence_mean",
    "ratio": "token",
    "epsilon": 0.2,
    "kl_estimator": "k3",
    "kl_placement": "loss",
}
"""The fields of GRPO, which two other presets change in one place."""

WHITENED: Fields = {
    "scale": "token_whiten",
    "scale_ddof": 1,
    "scale_eps": 1e-8,
    "aggregation": "token_mean",
    "ratio": "token",
    "epsilon": 0.2,
}
"""The fields that the two forms of REINFORCE++ share."""

PPO: dict[str, Preset] = {
    "grpo": Preset(
        GRPO,
        "Shao et al. 2024, DeepSeekMath, arXiv 2402.03300",
        "A_i = (R_i - mean)/(std + 1e-4) in the group, std with ddof 1 and eps outside the root, as TRL "
        "1.16; the mean over sequences of the mean over tokens, PPO's clip at 0.2, k3 in the loss with "
        "beta 0 unless set (the paper has 0.04). TRL's loss_type 'grpo' is the same, but its default is "
        "'dapo', a token mean over the step; verl has eps 1e-6 and a token mean, OpenRLHF eps 1e-9 and a "
        "token mean. Groups of equal rewards get exactly zero here; elsewhere a rounding error in float32 "
        "may be divided by eps.",
    ),
    "dr_grpo": Preset(
        {"baseline": "group_mean", "aggregation": "fixed_length", "ratio": "token", "epsilon": 0.2},
        "Liu et al. 2025, Understanding R1-Zero-like training: a critical perspective, arXiv 2503.20783",
        "A_i = R_i - group mean, not divided by the std, and tokens divided by the constant max_length: "
        "the gradient times (G-1)/(G max_length). TRL's loss_type 'dr_grpo' changes the divisor only and "
        "keeps the std unless scale_rewards is off; verl divides by the padded width unless given a "
        "constant; OpenRLHF has the centring but no constant divisor.",
    ),
    "ppo_clip": Preset(
        {"baseline": "batch_mean", "ratio": "token", "epsilon": 0.2},
        "Schulman et al. 2017, Proximal policy optimization algorithms, arXiv 1707.06347",
        "PPO's clipped ratio (eq. 7) without a critic: A_i = R_i - mean over the whole step, so that it "
        "needs no groups and works for control as well as for language. Advantages are not divided by their "
        "std, as they are in many programs: add the scale 'batch_std' for that. The PPO of other toolkits "
        "learns a value and uses GAE instead.",
    ),
    "ppo": Preset(
        {
            "baseline": "value",
            "returns": "gae",
            "lam": 0.95,
            "scale": "token_whiten",
            "scale_eps": 1e-8,
            "aggregation": "token_mean",
            "ratio": "token",
            "epsilon": 0.2,
            "value_clip": 0.2,
        },
        "Schulman et al. 2017, arXiv 1707.06347, with GAE, Schulman et al. 2016, arXiv 1506.02438",
        "A_it = GAE with lam 0.95 and a learned value, whitened over the tokens of the step, clip at 0.2 on "
        "ratio and value, token mean; gamma is 1 and the KL k1 in the reward if beta is set. verl 0.9.1 adds "
        "a dual clip at 3, OpenRLHF 0.11.2 a KL of 0.01, by default. lam < 1 relies on "
        "the value, so the gradient is biased unless the value is exact.",
    ),
    "grpo_no_std": Preset(
        {**GRPO, "scale": "none"},
        "Shao et al. 2024, arXiv 2402.03300, without its std, as Liu et al. 2025, arXiv 2503.20783 advise",
        "GRPO without the division; tokens still count by 1/length, which is what remains of its bias. TRL "
        "1.16's scale_rewards 'none' with loss_type 'grpo'; verl 0.9.1's norm_adv_by_std_in_grpo=False "
        "except for the token mean.",
    ),
    "grpo_batch_std": Preset(
        {**GRPO, "scale": "batch_std"},
        "Shao et al. 2024, arXiv 2402.03300, with the std of the step",
        "A_i = (R_i - group mean)/(std of all raw returns of the step + 1e-4), ddof 1: TRL 1.16's "
        "scale_rewards 'batch'. One divisor for all prompts: its bias vanishes as the step grows, that of "
        "1/length does not.",
    ),
    "dapo": Preset(
        {
            **GROUP_STD,
            "aggregation": "token_mean",
            "ratio": "token",
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "zero_spread": "refill",
        },
        "Yu et al. 2025, DAPO, arXiv 2503.14476",
        "GRPO's advantage, the mean over all tokens of the step, clip from 0.8 to 1.28, no KL, and groups "
        "of equal rewards replaced by new prompts. The paper's penalty on long rows is overlong_buffer "
        "(4096 of 20480 tokens there), 0 here. TRL 1.16's loss_type 'dapo', its default, is the token mean "
        "alone; verl 0.9.1 has all parts as options, with eps 1e-6; OpenRLHF 0.11.2 has eps 1e-9.",
    ),
    "gspo": Preset(
        {
            **GROUP_STD,
            "aggregation": "sequence_mean",
            "ratio": "sequence_mean",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
        "Zheng et al. 2025, Group sequence policy optimization, arXiv 2507.18071",
        "The ratio is exp(mean over tokens of log pi/old), clipped at 3e-4 below and 4e-4 above; A_i as in "
        "GRPO, eps 1e-4. On-policy its gradient is that of GRPO. With aggregation 'sequence_sum' and no std "
        "it would be REINFORCE's exactly. TRL 1.16 has it as importance_sampling_level 'sequence'.",
    ),
    "cispo": Preset(
        {
            **GROUP_STD,
            "aggregation": "token_mean",
            "ratio": "cispo",
            "epsilon": 1.0,
            "epsilon_high": 4.0,
        },
        "MiniMax 2025, MiniMax-M1, arXiv 2506.13585",
        "-sg(clip(rho, 1 - epsilon, 1 + epsilon_high)) A log pi, so a clipped token keeps its gradient; the "
        "bounds are relative to 1 as in verl 0.9.1: here 0 and 5. TRL 1.16 takes epsilon_high as the cap "
        "itself, with 0.2 unless set, which multiplies the on-policy gradient by 0.2.",
    ),
    "reinforce_pp": Preset(
        {**WHITENED, "baseline": "none", "returns": "reward_to_go"},
        "Hu et al. 2025, REINFORCE++, arXiv 2501.03262",
        "A_it = (G_it - mean)/(std + 1e-8), mean and std over all tokens of the step, ddof 1, eps outside "
        "the root; k1 in the reward if beta is set. verl 0.9.1 has ddof 1 and eps inside the root; OpenRLHF "
        "0.11.2 ddof 0 and a floor of 1e-8 under the variance. The bias is of order 1/N.",
    ),
    "reinforce_pp_baseline": Preset(
        {**WHITENED, "baseline": "group_mean", "kl_estimator": "k2", "kl_placement": "loss"},
        "Hu et al. 2025, REINFORCE++, arXiv 2501.03262, the variant with a group baseline",
        "R_i - group mean, then whitened over all tokens of the step as in 'reinforce_pp'; k2 in the loss "
        "if beta is set. OpenRLHF 0.11.2 calls it reinforce_baseline, with ddof 0. On binary rewards hard "
        "prompts count less in small steps; the bias vanishes as the step grows.",
    ),
}
