"""Says which estimator a configuration of TRL is, and what of it no axis expresses. Imports no torch.

The tables follow grpo_config.py, grpo_trainer.py, rloo_config.py and rloo_trainer.py in trl/trainer of TRL 1.16.0.
TRL itself is not needed.
"""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import read_changes
from tokenrl.errors import Refused
from tokenrl.settings import check_choice

CLASSES = {"grpo": "GRPOConfig of TRL 1.16.0", "rloo": "RLOOConfig of TRL 1.16.0"}
OF_OTHERS = {"teacher_model_name_or_path", "lmbda"}
"""Fields of configurations of distillation."""
Axes = dict[str, str | dict[str, str]]
OF_BOTH: Axes = {
    "beta": "beta",
    "mask_truncated_completions": {"true": "truncations=mask", "false": "truncations=keep"},
}
AXES: dict[str, Axes] = {
    "grpo": OF_BOTH
    | {
        "epsilon": "epsilon",
        "epsilon_high": "epsilon_high",
        "delta": "dual_clip",
        "entropy_coef": "entropy_coef",
        "use_bias_correction_kl": {"true": "kl_estimator=k2", "false": "kl_estimator=k3"},
        "importance_sampling_level": {"token": "ratio=token", "sequence": "ratio=sequence_mean"},
        "scale_rewards": {
            "group": "scale=group_std",
            "true": "scale=group_std",
            "batch": "scale=batch_std",
            "none": "scale=none",
            "false": "scale=none",
        },
        "multi_objective_aggregation": {
            "sum_then_normalize": "components=summed",
            "normalize_then_sum": "components=separate,scale=group_std",
        },
        "loss_type": {
            "grpo": "aggregation=sequence_mean",
            "dr_grpo": "aggregation=fixed_length",
            "dapo": "aggregation=token_mean",
            "bnpo": "aggregation=token_mean",
            "luspo": "aggregation=sequence_sum",
            "sapo": "aggregation=sequence_mean,ratio=none",
            "vespo": "aggregation=token_mean,ratio=none",
            "cispo": "aggregation=token_mean,ratio=none",
        },
    },
    "rloo": OF_BOTH | {"normalize_advantages": {"true": "scale=batch_std", "false": "scale=none"}},
}
"""For each field the axis of the same value, or changes by value. Of two that set one axis the later counts."""
CLIP = "TRL clips the ratio of the sequence in later updates of a rollout, which no axis has."
UNSAMPLED = (
    "Tokens outside top_p, top_k or min_p are never drawn, and the gradient is that of the whole "
    "distribution; the numbers here assume that the two agree."
)
SEVERAL_UPDATES = (
    "A rollout may be used for several updates. The status and the numbers are those of the first one; in "
    "later ones the ratio and its clip bias the gradient as well."
)
SEVERAL_UPDATES_OF_RLOO = (
    "A rollout may be used for several updates. TRL clips the ratio of the sequence at 1 - epsilon and 1 + "
    "epsilon. Here it is not clipped, and exact in later updates too."
)
Remarks = dict[str, tuple[str, str]]
SHARED: Remarks = {
    "temperature": (
        "1",
        "TRL divides the logits by the temperature in training too, so the policy at that temperature is what "
        "is trained, and nothing is biased by it.",
    ),
    "top_p": (
        "1",
        UNSAMPLED,
    ),
    "top_k": (
        "0",
        UNSAMPLED,
    ),
    "min_p": (
        "none",
        UNSAMPLED,
    ),
    "repetition_penalty": (
        "1",
        "A repetition penalty changes the distribution that is sampled, and the gradient is that of the "
        "policy without it.",
    ),
    "generation_kwargs": (
        "none",
        "What generation_kwargs change in the sampler is not in the gradient; the numbers here assume that "
        "they change nothing.",
    ),
    "sync_ref_model": (
        "false",
        "The reference moves toward the policy every ref_model_sync_steps updates, so the penalty is not one "
        "objective over the whole run. TRL refuses to start with it and beta 0.",
    ),
}
BEYOND: dict[str, Remarks] = {
    "grpo": SHARED
    | {
        "beta": (
            "0",
            "The KL is k3 of each token; with use_bias_correction_kl it is multiplied by the ratio. At the first "
            "update k3 times the ratio of the token has the gradient of k2, which is shown then; later it "
            "differs, and the ratio of the sequence is no axis.",
        ),
        "mask_truncated_completions": (
            "false",
            "Truncated completions stay in the mean of their group.",
        ),
        "importance_sampling_level": (
            "token",
            "In the first update from a rollout, with beta 0 and top_entropy_quantile 1, the ratio of a token and "
            "that of a sequence are both 1 and have, summed over the tokens, the same gradient.",
        ),
        "multi_objective_aggregation": (
            "sum_then_normalize",
            "Each reward function is standardised in its group, and their weighted sum once more in the step "
            "(GDPO). The second standardisation is not here; it divides all prompts by one number that depends on "
            "the actions.",
        ),
        "entropy_coef": (
            "0",
            "TRL averages the entropy over the tokens of a pass for every loss_type; here it is divided as the "
            "loss is.",
        ),
        "use_adaptive_entropy": (
            "false",
            "The weight of the entropy changes from step to step, and is 0 while the entropy exceeds "
            "entropy_target.",
        ),
        "top_entropy_quantile": (
            "1",
            "Tokens of low entropy have no policy gradient, which no axis has and which is a bias. With "
            'importance_sampling_level "sequence" and a clip, every token keeps its gradient instead, and each '
            "completion is weighed by the share of its tokens of high entropy.",
        ),
        "off_policy_mask_threshold": (
            "none",
            "Completions of negative advantage whose policy has moved too far from the sampler's, by several "
            "updates or by vLLM, are left out, which no axis has.",
        ),
        "use_vllm": (
            "false",
            "vLLM and the trainer give a token slightly different probabilities. TRL weighs completions or tokens "
            "by their ratio, within bounds, if vllm_importance_sampling_correction is on; the numbers here assume "
            "that the two agree.",
        ),
        "num_iterations": (
            "1",
            SEVERAL_UPDATES,
        ),
        "steps_per_generation": (
            "1",
            SEVERAL_UPDATES,
        ),
        "generation_batch_size": (
            "8",
            SEVERAL_UPDATES,
        ),
    },
    "rloo": SHARED
    | {
        "epsilon": ("0.2", CLIP),
        "epsilon_high": ("none", CLIP),
        "normalize_advantages": (
            "false",
            "TRL divides by the standard deviation of the advantages, here by that of the rewards.",
        ),
        "reward_clip_range": (
            "none",
            "Rewards are clipped before the KL is subtracted, so where the clip acts the objective is the clipped "
            "reward.",
        ),
        "mask_truncated_completions": (
            "false",
            "Truncated completions stay in the mean of their group. TRL subtracts no KL from their reward, so the "
            "mean with which the others are compared lacks it; here it has it.",
        ),
        "use_vllm": (
            "false",
            "vLLM and the trainer give a token slightly different probabilities, which RLOOTrainer does not "
            "correct; the numbers here assume that the two agree.",
        ),
        "num_iterations": (
            "1",
            SEVERAL_UPDATES_OF_RLOO,
        ),
        "steps_per_generation": (
            "1",
            SEVERAL_UPDATES_OF_RLOO,
        ),
        "generation_batch_size": (
            "8",
            SEVERAL_UPDATES_OF_RLOO,
        ),
    },
}
"""For each field its default, and what no axis expresses where it has another value."""
LOSS_TYPES = {
    "dr_grpo": "loss_type dr_grpo changes the divisor of the tokens only. The division by the standard deviation, "
    'which Dr. GRPO removes, is another field: scale_rewards "none" turns it off.',
    "bnpo": "The divisor is the number of tokens of one pass on one device (per_device_train_batch_size completions), "
    "not of the whole update, so N of the error of order 1/N is that of a pass. With one completion per pass "
    "it is loss_type grpo, the aggregation sequence_mean.",
    "luspo": 'LUSPO is meant with importance_sampling_level "sequence"; else each token has its own ratio.',
    "sapo": "After the first update SAPO's gate falls off smoothly where a clip would stop, which no axis has.",
    "vespo": "After the first update VESPO weighs a row by a function of its whole ratio, which no axis has.",
    "cispo": "The bound of CISPO is epsilon_high itself (epsilon without one) and not 1 + epsilon_high. Above 1 it "
    "changes nothing in the first update from a rollout; 5.0 is what TRL recommends. At 1 or less it "
    "multiplies the gradient of the rewards by itself, but neither that of the KL nor that of the entropy: "
    "then their weights, relative to the rewards, are beta and entropy_coef divided by the bound.",
}
"""What no axis expresses of a loss type."""


def read_trl_config(path: str) -> tuple[str, Estimator, list[str]]:
    """Read the fields of a configuration of TRL from JSON or YAML; TRL's defaults hold for the others.

    A field `trainer`, grpo or rloo, says which class it is; without one it is RLOOConfig if the file has a field
    that GRPOConfig lacks.

    Returns:
        The class of TRL and its version; the estimator that the configuration is; and what no axis expresses.

    Raises:
        Refused: The file is no such configuration, or TRL does not take one of its values.
    """
    fields = {name: _plain(value) for name, value in read_config(path).items() if value is not None}
    known = {trainer: {"trainer", *AXES[trainer], *BEYOND[trainer]} for trainer in CLASSES}
    names = known["grpo"] | known["rloo"] | OF_OTHERS
    for name in fields.keys() - names:
        for close in get_close_matches(name, names, n=1, cutoff=0.9):
            raise Refused(f"{path}: {name!r} is no field of TRL. Did you mean {close!r}?")
    trainer = fields.get(
        "trainer", "rloo" if fields.keys() & known["rloo"] - known["grpo"] else "grpo"
    )
    check_choice("trainer", trainer, CLASSES)
    for name in fields.keys() & names - known[trainer]:
        raise Refused(f"{path}: a {CLASSES[trainer]}, which it is read as, has no field {name}.")
    axes: dict[str, Any] = {}
    try:
        for name, axis in AXES[trainer].items():
            if name not in fields:
                continue
            if isinstance(axis, dict):
                check_choice(name, fields[name], axis)
                changes = axis[fields[name]]
            else:
                changes = f"{axis}={fields[name]}"
            axes |= read_changes(changes)[1]
        estimator = Estimator.preset(f"trl_{trainer}", **axes)
    except Refused as error:
        raise Refused(f"{path} cannot be read as a {CLASSES[trainer]}: {error}") from error
    remarks = [LOSS_TYPES.get(fields.get("loss_type", ""), "")]
    for name, (default, remark) in BEYOND[trainer].items():
        if fields.get(name, default) != default:
            remarks.append(remark)
    return CLASSES[trainer], estimator, list(dict.fromkeys(remarks))


def _plain(value: Any) -> str:
    """Write a value as the table does: in small letters, and a number without what does not count."""
    text = str(value).lower()
    with suppress(ValueError):
        text = f"{float(text):.12g}"
    return text
