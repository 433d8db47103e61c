"""Names that settings have in other toolkits, and what they are called here. Imports no torch.

The names are those of TRL (GRPOConfig, RLOOConfig, SFTConfig, keywords of its trainers and scripts), the
commonest ones of OpenRLHF and verl, and names that tokenrl itself had before. Whoever gives one as a keyword,
as a flag or in a configuration is told ours; of what tokenrl has not, a sentence says what happens instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from tokenrl.errors import Refused, nearest, suggest

OURS: Mapping[str, str] = {
    # data, rewards, models; of several names of ours the first one that a command has counts
    "data task": "train_dataset dataset dataset_name dataset_config prompt_data train_files",
    "eval_split": "eval_dataset val_files dataset_test_split",
    "split": "dataset_train_split",
    "prompt_column": "dataset_text_field input_key prompt_key",
    "prompt_template": "formatting_func input_template",
    "reward": "reward_funcs reward_model_name_or_path reward_model_path reward_pretrain remote_rm_url",
    "model": "model_name_or_path model_name sft_model_path pretrain processing_class tokenizer",
    "lora_r": "peft_config use_peft use_lora lora_rank",
    # batches, the length of training, the optimiser
    "prompts_per_step batch_size": "per_device_train_batch_size train_batch_size batch_size "
    "generation_batch_size rollout_batch_size",
    "micro_batch_size": "gradient_accumulation_steps micro_train_batch_size ppo_micro_batch_size_per_gpu",
    "num_minibatches": "steps_per_generation num_mini_batches ppo_mini_batch_size",
    "num_iterations": "num_ppo_epochs ppo_epochs max_epochs",
    "max_steps": "num_train_epochs num_epochs epochs total_epochs total_training_steps",
    "max_samples max_steps": "total_episodes num_episodes",
    "learning_rate": "lr actor_learning_rate",
    "value_learning_rate": "critic_learning_rate vf_coef",
    "max_grad_norm": "grad_clip",
    # the estimator
    "estimator.beta": "kl_coef init_kl_coef kl_loss_coef",
    "estimator.scale": "scale_rewards normalize_advantages whiten_rewards",
    "estimator": "loss_type advantage_estimator adv_estimator",
    "estimator.aggregation": "loss_agg_mode",
    "estimator.ratio": "importance_sampling_level",
    "estimator.dual_clip": "delta",
    "estimator.epsilon": "cliprange eps_clip clip_ratio",
    "estimator.entropy_coef": "entropy_coeff",
    "estimator.truncations": "mask_truncated_completions",
    # sampling, lengths
    "num_generations": "rloo_k num_return_sequences n_samples_per_prompt",
    "eval_generations": "num_generations_eval",
    "max_completion_length": "max_new_tokens response_length generate_max_len max_response_length",
    "truncate_prompts": "max_prompt_length prompt_max_len",
    "completion_column": "completion_only_loss assistant_only_loss",
    "stop": "stop_strings stop_sequences stop_words stop_token until",
    "system_prompt": "system_message",
    "chat": "apply_chat_template",
    "chat_template_kwargs": "chat_template enable_thinking",
    # precision, records, machines
    "mixed_precision dtype": "bf16",
    "cpu": "no_cuda use_cpu",
    "threads": "training_threads sampling_threads",
    "tokens_per_pass": "whole_logits",
    "eval_every": "eval_strategy evaluation_strategy eval_steps test_freq",
    "save_every": "save_strategy save_steps save_freq",
    "keep_checkpoints": "save_total_limit",
    "resume": "resume_from_checkpoint",
    "output_dir": "save_path logging_dir",
    "overwrite": "overwrite_output_dir",
    "quiet": "disable_tqdm",
    "report_to": "use_wandb logger",
    "tracker_project": "project project_name wandb_project",
    "run_name": "experiment_name wandb_run_name",
}
"""Our settings, each with the names that others give it."""

WITHOUT: Mapping[str, str] = {
    "remove_unused_columns label_key": "Every column of the data reaches the reward as a list.",
    "shuffle_dataset data_seed": "Rows are always shuffled, anew for each epoch, by the seed.",
    "reward_processing_classes": "A reward model has its own tokenizer in its directory.",
    "model_init_kwargs": "For options beyond the dtype load the model yourself and give it from Python.",
    "ref_model sync_ref_model": "The reference is the policy before training, and stays so.",
    "lora_dropout": "Adapters have no dropout.",
    "load_in_4bit load_in_8bit": "Weights are not quantised; dtype bfloat16 saves memory.",
    "per_device_eval_batch_size": "Held-out prompts are sampled in parts that fit.",
    "adam_beta1 adam_beta2 adam_epsilon": "AdamW has torch's constants.",
    "warmup_steps lr_scheduler_type": "The learning rate falls linearly to 0.",
    "max_length max_seq_length packing": "Rows are neither cut nor packed: one that is too long is refused.",
    "top_p top_k min_p repetition_penalty generation_kwargs": "Only the temperature changes what is sampled.",
    "use_vllm": "transformers samples the completions, in the training process.",
    "fp16": "There is no training in float16; dtype may be bfloat16.",
    "compile compile_sampling compile_training": "Nothing is compiled, which gained next to nothing.",
    "minutes": "--check prints the seconds of a step, and how long the run will take.",
    "push_to_hub": "Nothing is uploaded; model/ in the output directory can be, as it is.",
    "callbacks": "There are none: metrics.jsonl in the output directory has what each step measured.",
    "deepspeed fsdp zero_stage n_gpus_per_node": "Start processes with accelerate launch.",
    "filter_difficulty filter_samples": "Filter before a run, as recipes/filter_by_difficulty.py does.",
}
"""What other toolkits set and tokenrl does not, each with what happens instead."""


def settings_of(hints: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings of a command, and `estimator.AXIS` for each axis of its estimator."""
    axes = hints.get("estimator")
    return [*hints, *(f"estimator.{axis.name}" for axis in fields(axes))] if is_dataclass(axes) else [*hints]


def meaning(name: str, known: Iterable[str], *, flags: bool = False) -> str:
    """Say what a setting of another toolkit is called here.

    Args:
        name: the name that was given, with underscores.
        known: the settings that the command has, from `settings_of`.
        flags: write our names as flags of the command line, else as keywords.

    Returns:
        A sentence, or an empty text: the name is our own, or not known, or has no meaning for this command.
    """
    known, name = set(known), "use_vllm" if name.startswith("vllm_") else name
    if name in known:
        return ""
    if f"estimator.{name}" in known:
        return f"It is an axis of the estimator: {_shown(f'estimator.{name}', flags)}."
    for ours, theirs in OURS.items():
        there = [one for one in ours.split() if one in known]
        if name in theirs.split() and there:
            return f"It is {_shown(there[0], flags)}."
    trains = "output_dir" in known
    return next((text for theirs, text in WITHOUT.items() if trains and name in theirs.split()), "")


def _shown(name: str, flags: bool) -> str:
    owner, _, axis = name.rpartition(".")
    if flags:
        return "--" + name.replace("_", "-")
    return f"{owner}=Estimator({axis}=...)" if owner else name


def check_names(options: Iterable[str], hints: Mapping[str, Any]) -> None:
    """Refuse keywords that are no settings.

    Args:
        options: the names of the keywords.
        hints: the type of each setting that there is.

    Raises:
        Refused: there is no setting of that name; the message says what it is here, or lists what there is.
    """
    for name in options:
        if name not in hints:
            hint = meaning(name, settings_of(hints))
            raise Refused(f"There is no setting {name!r}.{f' {hint}' if hint else suggest(name, hints)}")


def check_flags(unknown: list[str], hints: Mapping[str, Any], prog: str) -> None:
    """Refuse words of a command line that are no flags of the command.

    Args:
        unknown: the words; those after the first may be its values.
        hints: the type of each setting that the command has.
        prog: the command.

    Raises:
        Refused: there is such a word; the message says what its flag is called here, or which is near.
    """
    if unknown:
        flag, known = unknown[0].partition("=")[0], settings_of(hints)
        near = nearest(flag, [_shown(one, flags=True) for one in known])
        hint = meaning(flag[2:].replace("-", "_"), known, flags=True) or f"See {prog} --help."
        raise Refused(f"There is no flag {flag}.{near if 'See' in hint else ''} {hint}")
