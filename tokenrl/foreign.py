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
    "data task": "train_dataset dataset dataset_name prompt_data train_files",
    "split": "dataset_train_split",
    "eval_split, the name of a split": "dataset_test_split",
    "prompt_column": "input_key prompt_key",
    "prompt_template": "input_template",
    "reward": "reward_funcs reward_model_name_or_path reward_model_path reward_pretrain",
    "model": "model_name_or_path model_name sft_model_path pretrain",
    "lora_r": "lora_rank",
    # batches, the length of training, the optimiser
    "prompts_per_step, in prompts over all processes, not in completions": "rollout_batch_size "
    "per_device_train_batch_size train_batch_size batch_size generation_batch_size",
    "batch_size, of a whole update": "per_device_train_batch_size train_batch_size",
    "micro_batch_size": "micro_train_batch_size ppo_micro_batch_size_per_gpu",
    "num_minibatches": "num_mini_batches",
    "num_iterations": "num_ppo_epochs ppo_epochs max_epochs",
    "max_steps": "total_training_steps",
    "max_samples": "total_episodes",
    "learning_rate": "lr actor_learning_rate",
    "learning_rate_schedule": "lr_scheduler_type",
    "value_learning_rate": "critic_learning_rate",
    "max_grad_norm": "grad_clip",
    # the estimator
    "estimator.beta": "kl_coef init_kl_coef",
    "estimator.scale, such as group_std, batch_std or none": "scale_rewards normalize_advantages",
    "estimator, the name of a preset": "advantage_estimator adv_estimator",
    "estimator.aggregation, such as token_mean or sequence_mean": "loss_agg_mode",
    "estimator.ratio, where sequence is sequence_mean": "importance_sampling_level",
    "estimator.dual_clip": "delta",
    "estimator.epsilon": "cliprange eps_clip clip_ratio",
    "estimator.entropy_coef": "entropy_coeff",
    "estimator.truncations, with the value mask": "mask_truncated_completions",
    # sampling, lengths
    "num_generations": "rloo_k num_return_sequences n_samples_per_prompt",
    "eval_generations": "num_generations_eval",
    "max_completion_length": "max_new_tokens response_length generate_max_len max_response_length",
    "stop": "stop_strings stop_sequences stop_words until",
    "system_prompt": "system_message",
    "chat": "apply_chat_template",
    "chat_template_kwargs, in JSON": "enable_thinking",
    # precision, records, machines
    "mixed_precision, with the value bf16": "bf16",
    "cpu": "no_cuda use_cpu",
    "threads": "training_threads sampling_threads",
    "eval_every, a number of steps": "eval_strategy evaluation_strategy eval_steps test_freq",
    "save_every, a number of steps": "save_strategy save_steps save_freq",
    "keep_checkpoints": "save_total_limit",
    "resume, with auto or a checkpoint": "resume_from_checkpoint",
    "output_dir": "save_path",
    "overwrite": "overwrite_output_dir",
    "quiet": "disable_tqdm",
    "report_to, with the names of trackers": "use_wandb logger",
    "tracker_project": "project project_name wandb_project",
    "run_name": "experiment_name wandb_run_name",
}
"""Our settings, each with the names that others give it; a comma begins what is said of the values."""

WITHOUT: Mapping[str, str] = {
    "reward: remove_unused_columns label_key": "Every column of the data reaches the reward as a list.",
    "reward: reward_processing_classes": "A reward model has its own tokenizer in its directory.",
    "eval_split: eval_dataset val_files": "Held-out rows are a split of the task, named by eval_split.",
    "completion_column: dataset_text_field formatting_func": "Rows have columns prompt and completion.",
    "completion_column: completion_only_loss assistant_only_loss": "The loss is that of completions alone.",
    "lora_r: peft_config use_peft use_lora": "lora_r is the rank of an adapter, and 0 without one.",
    "lora_r: lora_dropout": "Adapters have no dropout.",
    "lora_r: shuffle_dataset data_seed": "Rows are always shuffled, anew for each epoch, by the seed.",
    "lora_r: model_init_kwargs": "For other options load the model yourself and give it from Python.",
    "lora_r: processing_class tokenizer": "From Python the model may be a pair (model, tokenizer).",
    "lora_r: max_length max_seq_length packing": "Rows are not cut or packed; too long ones are refused.",
    "lora_r: fp16": "There is no training in float16; dtype may be bfloat16.",
    "lora_r: adam_beta1 adam_beta2 adam_epsilon": "AdamW has torch's constants.",
    "completion_column: bf16": "With dtype bfloat16 the weights themselves are held in it.",
    "dtype: load_in_4bit load_in_8bit": "Weights are not quantised; dtype bfloat16 saves memory.",
    "batch_size: warmup_steps lr_scheduler_type": "The learning rate falls linearly to 0, without a warm-up.",
    "batch_size: gradient_accumulation_steps": "batch_size is that of a whole update.",
    "micro_batch_size: gradient_accumulation_steps": "prompts_per_step is a whole step, in one pass or many.",
    "num_minibatches: steps_per_generation ppo_mini_batch_size": "num_minibatches counts updates of a pass.",
    "max_steps: num_train_epochs num_epochs epochs total_epochs num_episodes": "The length of a run is "
    "max_steps, in steps.",
    "estimator.beta: ref_model sync_ref_model": "The reference is the policy before training, and stays so.",
    "estimator.aggregation: loss_type": "The estimator's aggregation is token_mean for dapo, sequence_mean "
    "for grpo, fixed_length for dr_grpo; cispo is a ratio.",
    "truncate_prompts: max_prompt_length prompt_max_len": "Prompts that do not fit are refused, or cut.",
    "temperature: top_p top_k min_p repetition_penalty generation_kwargs": "Only temperature is offered.",
    "max_completion_length: use_vllm": "transformers samples the completions, in this process.",
    "eval_generations: per_device_eval_batch_size": "Held-out prompts are sampled 256 completions at a time.",
    "output_dir: logging_dir push_to_hub": "All that a run writes is in output_dir; nothing is uploaded.",
    "output_dir: callbacks": "There are none: metrics.jsonl in output_dir has what each step measured.",
    "prompts_per_step: deepspeed fsdp zero_stage n_gpus_per_node": "Each process holds the whole model; "
    "accelerate launch starts several.",
    "arms: runs": "Runs that exist are judged by recipes/study/compare_existing_runs.py.",
    "arms: against_itself no_against_itself": "It is opt-in: --check-reference runs the reference twice.",
    "max_completion_length: compile compile_sampling compile_training": "Nothing is compiled, which gained "
    "next to nothing.",
    "max_completion_length: minutes": "--check prints the seconds of a step, and how long the run will take.",
}
"""What is otherwise in other toolkits, after a setting that a command must have for the sentence to hold."""


def settings_of(hints: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings of a command, and `estimator.AXIS` for each axis of its estimator."""
    axes = hints.get("estimator")
    return [*hints, *(f"estimator.{axis.name}" for axis in fields(axes))] if is_dataclass(axes) else [*hints]


def meaning(name: str, settings: Iterable[str], *, flags: bool = False) -> str:
    """Say what a setting of another toolkit is called here.

    Args:
        name: the name that was given, with underscores.
        settings: the settings that the command has, from `settings_of`.
        flags: write our names as flags of the command line, else as keywords.

    Returns:
        A sentence, or an empty text: the name is our own, or not known, or has no meaning for this command.
    """
    settings, name = set(settings), "use_vllm" if name.startswith("vllm_") else name
    if name in settings:
        return ""
    if f"estimator.{name}" in settings:
        return f"It is an axis of the estimator: {_shown(f'estimator.{name}', flags)}."
    for ours, theirs in OURS.items():
        names, comma, values = ours.partition(",")
        there = [setting for setting in names.split() if setting in settings]
        if name in theirs.split() and there:
            return f"It is {_shown(there[0], flags)}{comma}{values}."
    hints = ((*key.split(": "), text) for key, text in WITHOUT.items())
    return next((text for ours, theirs, text in hints if ours in settings and name in theirs.split()), "")


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
        flag, settings = unknown[0].partition("=")[0], settings_of(hints)
        near = nearest(flag, [_shown(setting, flags=True) for setting in settings])
        hint = meaning(flag[2:].replace("-", "_"), settings, flags=True) or f"See {prog} --help."
        raise Refused(f"There is no flag {flag}.{near if 'See' in hint else ''} {hint}")
