"""Names from TRL, OpenRLHF and verl are refused with ours: every name that is told exists, everywhere."""

from __future__ import annotations

import pytest

import tokenrl
from tokenrl.cli import COMMANDS, main
from tokenrl.errors import Refused
from tokenrl.foreign import OURS, WITHOUT, check_flags, meaning, settings_of
from tokenrl.settings import field_types

KNOWN = {name: set(settings_of(field_types(command.arguments))) for name, command in COMMANDS.items()}

OF_TRL = """
reward_funcs per_device_train_batch_size gradient_accumulation_steps dataset_name train_dataset
eval_dataset num_train_epochs lr kl_coef scale_rewards loss_type max_prompt_length model_name_or_path
use_peft lora_rank bf16 fp16 warmup_ratio use_vllm vllm_mode vllm_gpu_memory_utilization beta epsilon
epsilon_high delta importance_sampling_level mask_truncated_completions steps_per_generation
generation_batch_size top_p top_k min_p repetition_penalty save_steps eval_steps eval_strategy
save_total_limit processing_class peft_config callbacks torch_dtype rloo_k num_ppo_epochs
num_mini_batches response_length normalize_advantages overwrite_output_dir resume_from_checkpoint
per_device_eval_batch_size num_generations_eval optim
"""


def test_every_name_of_ours_that_is_told_exists_and_no_foreign_name_stands_twice():
    rows = [(ours.partition(",")[0].split(), theirs.split()) for ours, theirs in OURS.items()]
    rows += [([needed], theirs.split()) for needed, theirs in (key.split(": ") for key in WITHOUT)]
    for ours, theirs in rows:
        assert all(any(name in known for known in KNOWN.values()) for name in ours), ours
        for name in theirs:
            assert any(meaning(name, known) for known in KNOWN.values()), f"{name} is never told"
    for command, known in KNOWN.items():
        told = [name for ours, theirs in rows if known & set(ours) for name in theirs]
        assert {name for name in told if told.count(name) > 1} == set(), command
        assert [name for name in known if meaning(name, known)] == [], command


def test_the_words_of_trl_are_refused_from_python_and_on_the_command_line(capsys):
    for name in OF_TRL.split():
        with pytest.raises(Refused, match=f"^There is no setting '{name}'") as caught:
            tokenrl.train(**{name: 8})
        assert "Available" not in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(Refused, match=f"^There is no flag --{name}. (?!See)"):
            check_flags([f"--{name}", "8"], field_types(COMMANDS["train"].arguments), "tokenrl train")
    for flag in ("--gradient-accumulation-steps", "--num_train_epochs"):
        assert main(["train", flag, "8"]) == main(["train", f"{flag}=8"]) == 2
        assert capsys.readouterr().err.startswith(f"tokenrl: There is no flag {flag}. ")


@pytest.mark.parametrize(
    ("command", "name", "said"),
    [
        (
            *("train", "per_device_train_batch_size"),
            "It is --prompts-per-step, in prompts over all processes, not in completions.",
        ),
        ("sft", "per_device_train_batch_size", "It is --batch-size, of a whole update."),
        ("train", "gradient_accumulation_steps", "prompts_per_step is a whole step, in one pass or many."),
        ("sft", "gradient_accumulation_steps", "batch_size is that of a whole update."),
        ("train", "num_train_epochs", "The length of a run is max_steps, in steps."),
        (
            *("train", "loss_type"),
            "The estimator's aggregation is token_mean for dapo, sequence_mean for grpo, fixed_length for "
            "dr_grpo; cispo is a ratio.",
        ),
        ("train", "per_device_eval_batch_size", "Held-out prompts are sampled 256 completions at a time."),
        ("reward-model", "train_dataset", "It is --data."),
        ("train", "train_dataset", "It is --task."),
        ("train", "resume_from_checkpoint", "It is --resume, with auto or a checkpoint."),
        ("train", "compile", "Nothing is compiled, which gained next to nothing."),
        ("train", "beta", "It is an axis of the estimator: --estimator.beta."),
        ("sft", "warmup_steps", "The learning rate falls linearly to 0, without a warm-up."),
        ("control", "warmup_steps", ""),
        ("control", "lr_scheduler_type", "It is --learning-rate-schedule."),
        ("sft", "loss_type", ""),
        ("control", "per_device_train_batch_size", ""),
        ("train", "made_up", ""),
    ],
)
def test_the_hint_is_that_of_the_command(command, name, said):
    assert meaning(name, KNOWN[command], flags=True) == said


def test_python_and_files_are_told_keywords_and_a_misspelling_the_nearest(tmp_path, capsys):
    for wrong, said in {
        "beta": r"axis of the estimator: estimator=Estimator\(beta=...\)",
        "num_train_epochs": "The length of a run is max_steps",
        "learning_rat": "Did you mean 'learning_rate'",
    }.items():
        with pytest.raises(Refused, match=said) as caught:
            tokenrl.train(**{wrong: 1})
        assert len(str(caught.value)) < 200
    (tmp_path / "trl.yaml").write_text("learning_rate: 1e-6\nnum_train_epochs: 1\nbeta: 0.04\n")
    assert main(["train", "--config", str(tmp_path / "trl.yaml")]) == 2
    said = capsys.readouterr().err
    assert "trl.yaml cannot be used" in said
    assert "no setting 'num_train_epochs'. The length of a run is max_steps" in said


def test_another_toolkits_object_of_settings_and_settings_given_twice_are_refused():
    class GRPOConfig:
        output_dir = "x"

    for function in (tokenrl.train, tokenrl.sft, tokenrl.evaluate, tokenrl.sample):
        with pytest.raises(Refused, match=r"\(GRPOConfig\); it must be \w+Arguments. Give settings as"):
            function(args=GRPOConfig(), model="m")
    with pytest.raises(Refused, match="the keywords seed, quiet would be lost"):
        tokenrl.train(COMMANDS["train"].arguments(), seed=1, quiet=True)
