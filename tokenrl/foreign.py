"""Names that settings have in other toolkits, and what they are called here. Imports no torch.

The names are those of TRL (GRPOConfig, RLOOConfig, SFTConfig, keywords of its trainers and scripts), and the
commonest ones of OpenRLHF and verl. Whoever gives one as a keyword, as a flag or in a configuration is told
ours. A meaning holds for the commands that have every setting that it names in backticks; the first that
holds is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from tokenrl.errors import Refused, suggest

_MEANINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # data, rewards, models
    (
        "train_dataset dataset dataset_name prompt_data train_files",
        (
            "It is `data`: a file, a hub dataset or, from Python, rows; `num_pairs` are made without it.",
            "It is `task`: a name, a file, a hub dataset or, from Python, a Dataset.",
        ),
    ),
    (
        "eval_dataset val_files",
        (
            "Held-out rows come with the others: the split `eval_split` or, without one, `eval_size` rows of "
            "the training split. From Python, DatasetDict(train=..., test=...) has both.",
        ),
    ),
    ("dataset_config", ("It is part of `task`: owner/name:config.",)),
    ("dataset_train_split", ("It is `split`.",)),
    ("dataset_test_split", ("It is `eval_split`.",)),
    (
        "dataset_text_field formatting_func input_key input_template prompt_key",
        ("It is `prompt_column`, or `prompt_template` to make the prompt from several columns.",),
    ),
    ("remove_unused_columns label_key", ("Every column is kept, and reaches the `reward` as a list.",)),
    ("shuffle_dataset data_seed", ("Rows are always shuffled, anew for each epoch; `seed` says how.",)),
    (
        "reward_funcs reward_model_name_or_path reward_model_path reward_pretrain remote_rm_url",
        ("It is `reward`: one or several, each a function, a name, or the directory of a reward model.",),
    ),
    ("reward_processing_classes", ("A `reward` that is a directory has its own tokenizer there.",)),
    (
        "model_name_or_path model_name sft_model_path pretrain",
        ("It is `model`: a directory or a hub name. In training from Python also (model, tokenizer).",),
    ),
    (
        "processing_class tokenizer",
        ("It comes with `model`: the same directory or, in training from Python, (model, tokenizer).",),
    ),
    (
        "model_init_kwargs",
        ("There are `dtype` and `trust_remote_code`; with others load `model` yourself, from Python.",),
    ),
    (
        "ref_model sync_ref_model",
        ("The reference is the policy before training, and stays so, where `estimator.beta` is above 0.",),
    ),
    ("peft_config use_peft use_lora lora_rank", ("A `lora_r` above 0 trains a LoRA adapter of that rank.",)),
    ("lora_dropout", ("There is none: adapters have `lora_r`, `lora_alpha` and `lora_target_modules`.",)),
    (
        "load_in_4bit load_in_8bit",
        ("Weights are not quantised; `dtype` bfloat16 and `gradient_checkpointing` save memory.",),
    ),
    # batches, the length of training, the optimiser
    (
        "per_device_train_batch_size train_batch_size batch_size generation_batch_size rollout_batch_size",
        (
            "A step samples `prompts_per_step` x `num_generations` completions, over all processes, and "
            "learns from them; `micro_batch_size` only bounds the memory, and by default fits it.",
            "It is `batch_size`, the rows of one update.",
        ),
    ),
    (
        "gradient_accumulation_steps micro_train_batch_size ppo_micro_batch_size_per_gpu",
        (
            "A step is one rollout, however it is cut up; `micro_batch_size` is how many completions one "
            "forward pass takes, which changes the memory and not the update.",
            "There is none: one forward pass takes all `batch_size` rows of an update.",
        ),
    ),
    ("per_device_eval_batch_size", ("It is not set: `eval_size` prompts are sampled in parts.",)),
    (
        "steps_per_generation num_mini_batches ppo_mini_batch_size",
        ("It is `num_minibatches`, the updates in one pass over a rollout.",),
    ),
    ("num_ppo_epochs ppo_epochs max_epochs", ("It is `num_iterations`, the passes over each rollout.",)),
    (
        "num_train_epochs num_epochs epochs total_epochs total_training_steps",
        (
            "It is `max_steps`; an epoch has as many steps as there are prompts / `prompts_per_step`.",
            "It is `max_steps`; an epoch has as many as there are rows / `batch_size`.",
            "It is `max_steps`.",
        ),
    ),
    ("total_episodes num_episodes", ("It is `max_samples`, in completions.", "It is `max_steps`.")),
    ("lr actor_learning_rate", ("It is `learning_rate`.",)),
    ("critic_learning_rate vf_coef", ("The critic learns by itself, at the rate `value_learning_rate`.",)),
    (
        "warmup_steps warmup_ratio",
        ("It is `warmup_steps`, a number.", "There is no warm-up: `learning_rate` falls linearly to 0."),
    ),
    (
        "lr_scheduler lr_scheduler_type",
        ("It is `lr_scheduler_type`.", "There is no choice: `learning_rate` falls linearly to 0."),
    ),
    ("optim", ("It is `optimizer`, adamw or sgd.", "There is no choice: it is AdamW.")),
    ("adam_beta1 adam_beta2 adam_epsilon", ("There is no choice: AdamW has torch's constants.",)),
    ("grad_clip", ("It is `max_grad_norm`.",)),
    # the estimator
    (
        "kl_coef init_kl_coef kl_loss_coef",
        (
            "It is `estimator.beta`; `estimator.kl_estimator` and `estimator.kl_placement` say which KL, and "
            "`target_kl` adapts the weight.",
        ),
    ),
    ("kl_target", ("It is `target_kl`, in nats per completion.",)),
    (
        "scale_rewards normalize_advantages whiten_rewards",
        ("What divides the advantages is `estimator.scale`: group_std, batch_std, none and others.",),
    ),
    (
        "loss_type advantage_estimator adv_estimator loss_agg_mode",
        (
            "The `estimator` says it: a preset (grpo, dr_grpo, dapo, cispo, rloo and others), whose axes can "
            "be changed one by one; `estimator.aggregation` says how tokens are averaged.",
        ),
    ),
    ("importance_sampling_level", ("It is `estimator.ratio`: token, or sequence_mean as in GSPO.",)),
    ("delta", ("It is `estimator.dual_clip`.",)),
    ("cliprange eps_clip clip_ratio", ("It is `estimator.epsilon`, above also `estimator.epsilon_high`.",)),
    ("mask_truncated_completions", ("It is `estimator.truncations`: keep, mask or drop.",)),
    ("entropy_coeff", ("It is `estimator.entropy_coef`.",)),
    # sampling, lengths
    (
        "rloo_k num_return_sequences n_samples_per_prompt",
        ("It is `num_generations`, the completions of each prompt.",),
    ),
    ("num_generations_eval", ("It is `eval_generations`.",)),
    (
        "max_new_tokens response_length generate_max_len max_response_length",
        ("It is `max_completion_length`, in tokens.",),
    ),
    (
        "max_prompt_length prompt_max_len",
        (
            "There is none: a prompt that leaves no room in the context is refused before the run, or cut "
            "with `truncate_prompts`; `max_completion_length` bounds the completion.",
        ),
    ),
    (
        "max_length max_seq_length packing",
        (
            "It is `max_completion_length` for the completion; a prompt too long for the context is refused, "
            "or cut with `truncate_prompts`.",
            "Rows are neither cut nor packed: one longer than the context is refused, and `batch_size` rows "
            "make an update.",
        ),
    ),
    (
        "completion_only_loss assistant_only_loss",
        ("There is no choice: the loss is that of the completion (`completion_column`) alone.",),
    ),
    (
        "top_p top_k min_p repetition_penalty generation_kwargs",
        (
            "There is none: completions are drawn from the policy itself, as the gradient requires; only "
            "`temperature` changes them, and `stop` ends them.",
        ),
    ),
    (
        "stop_strings stop_sequences stop_words stop_token until",
        ("It is `stop`: strings that end a completion.",),
    ),
    ("system_message", ("It is `system_prompt`.",)),
    ("apply_chat_template", ("It is `chat`: text is sent as a message of the user.",)),
    ("chat_template enable_thinking", ("Variables of the chat template are `chat_template_kwargs`.",)),
    ("use_vllm", ("vLLM is not used: transformers samples the completions, in the training process.",)),
    # precision, records, machines
    (
        "bf16",
        (
            "It is `mixed_precision` bf16 (the weights stay float32), or `dtype` bfloat16 (they do not).",
            "It is `dtype` bfloat16.",
        ),
    ),
    ("fp16", ("There is no training in float16; `dtype` may be bfloat16.",)),
    ("training_threads sampling_threads", ("It is `threads`, for sampling and updates alike.",)),
    ("torch_dtype", ("It is `dtype`.",)),
    ("no_cuda use_cpu", ("It is `cpu`.",)),
    (
        "eval_strategy evaluation_strategy eval_steps test_freq",
        ("It is `eval_every`, a number of steps.",),
    ),
    ("save_strategy save_steps save_freq", ("It is `save_every`, a number of steps.",)),
    ("save_total_limit", ("It is `keep_checkpoints`.",)),
    (
        "resume_from_checkpoint",
        ("A run cannot be continued yet; a checkpoint given as `model` starts a new one from its weights.",),
    ),
    ("save_path logging_dir", ("It is `output_dir`, which holds all that a run writes.",)),
    ("overwrite_output_dir", ("It is `overwrite`.",)),
    ("disable_tqdm", ("It is `quiet`.",)),
    ("use_wandb logger", ("Trackers such as wandb are named in `report_to`.",)),
    ("project project_name wandb_project", ("It is `tracker_project`.",)),
    ("experiment_name wandb_run_name", ("It is `run_name`.",)),
    ("push_to_hub", ("Nothing is uploaded; model/ in `output_dir` can be, as it is.",)),
    ("callbacks", ("There are none: metrics.jsonl in `output_dir` has what each step measured.",)),
    (
        "deepspeed fsdp zero_stage n_gpus_per_node",
        ("Start processes with accelerate launch; `prompts_per_step` counts over all of them.",),
    ),
)

MEANINGS: Mapping[str, tuple[str, ...]] = {
    name: texts for names, texts in _MEANINGS for name in names.split()
}


def settings_of(hints: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings of a command, and `estimator.AXIS` for each axis of its estimator."""
    axes = hints.get("estimator")
    if not is_dataclass(axes):
        return list(hints)
    return [*hints, *(f"estimator.{axis.name}" for axis in fields(axes))]


def meaning(name: str, known: Iterable[str], *, flags: bool = False) -> str:
    """Say what a setting of another toolkit is called here.

    Args:
        name: the name that was given, with underscores.
        known: the settings that the command has, from `settings_of`.
        flags: write our names as flags of the command line, else as keywords.

    Returns:
        A sentence, or an empty text: the name is our own, or not known, or has no meaning for this command.
    """
    known = set(known)
    if name in known:
        return ""
    found = MEANINGS.get(name, ())
    if name.startswith("vllm_"):
        found = MEANINGS["use_vllm"]
    if f"estimator.{name}" in known:
        found = (f"It is an axis of the estimator: `estimator.{name}`.",)
    for text in found:
        if set(named(text)) <= known:
            return re.sub(r"`([\w.]+)`", lambda match: _shown(match[1], flags), text)
    return ""


def named(text: str) -> list[str]:
    """Return our settings that a meaning names in backticks."""
    return re.findall(r"`([\w.]+)`", text)


def _shown(name: str, flags: bool) -> str:
    if flags:
        return "--" + name.replace("_", "-")
    owner, _, axis = name.rpartition(".")
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
            raise Refused(f"There is no setting {name!r}." + (f" {hint}" if hint else suggest(name, hints)))


def check_flags(argv: list[str], hints: Mapping[str, Any]) -> list[str]:
    """Return a command line; refuse flags of other toolkits. Other unknown flags are left to the parser.

    Raises:
        Refused: a flag has another name here.
    """
    for word in argv:
        flag = word.partition("=")[0]
        hint = meaning(flag[2:].replace("-", "_"), settings_of(hints), flags=True) if flag[:2] == "--" else ""
        if hint:
            raise Refused(f"There is no flag {flag}. {hint}")
    return argv
