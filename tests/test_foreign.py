"""Names from TRL, OpenRLHF and verl are refused with ours: every name that is told exists, everywhere."""

from __future__ import annotations

import pytest

import tokenrl
from tokenrl.cli import COMMANDS, main
from tokenrl.errors import Refused
from tokenrl.foreign import _MEANINGS, MEANINGS, check_names, meaning, named, settings_of
from tokenrl.settings import field_types

KNOWN = {name: set(settings_of(field_types(command.arguments))) for name, command in COMMANDS.items()}
SHARED = {"batch_size", "warmup_steps", "lr_scheduler_type"}
"""Names that some commands of ours have too, and others have not."""

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


def test_every_setting_that_is_told_exists_in_the_commands_it_is_told_to():
    for name, texts in MEANINGS.items():
        for text in texts:
            commands = [command for command, known in KNOWN.items() if set(named(text)) <= known]
            assert commands, f"{name}: no command has all of {named(text)}"


def test_every_alternative_is_shown_to_some_command():
    for name, texts in MEANINGS.items():
        shown = {
            next((text for text in texts if set(named(text)) <= known), "")
            for known in KNOWN.values()
            if name not in known
        }
        assert set(texts) <= shown | {t for t in texts if name in SHARED}, name
        assert any(meaning(name, known) for known in KNOWN.values()), name


def test_no_name_stands_twice_and_none_hides_a_setting_of_ours():
    names = [name for names, _ in _MEANINGS for name in names.split()]
    assert len(names) == len(set(names)) == len(MEANINGS)
    for command, known in KNOWN.items():
        assert [name for name in known if meaning(name, known)] == [], command
        check_names(field_types(COMMANDS[command].arguments), field_types(COMMANDS[command].arguments))
    assert {name for known in KNOWN.values() for name in known & MEANINGS.keys()} == SHARED


@pytest.mark.parametrize("name", OF_TRL.split())
def test_the_words_of_trl_are_refused_from_python_and_on_the_command_line(name, capsys):
    with pytest.raises(Refused, match=f"^There is no setting '{name}'") as caught:
        tokenrl.train(**{name: 8})
    said = str(caught.value)
    assert "Available" not in said and "`" not in said and "\n" not in said
    for flag in ("--" + name.replace("_", "-"), "--" + name):
        assert main(["train", flag, "8"]) == main(["train", f"{flag}=8"]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"tokenrl: There is no flag {flag}. ") and "`" not in printed


def test_ours_is_written_as_keyword_or_as_flag():
    with pytest.raises(Refused, match="prompts_per_step x num_generations completions, over all processes"):
        tokenrl.train(per_device_train_batch_size=8)
    with pytest.raises(Refused, match=r"axis of the estimator: estimator=Estimator\(beta=...\)"):
        tokenrl.train(beta=0.04)
    known = KNOWN["train"]
    assert "--prompts-per-step x --num-generations" in meaning("batch_size", known, flags=True)
    assert meaning("beta", known, flags=True) == "It is an axis of the estimator: --estimator.beta."
    assert "--estimator.kl-placement" in meaning("kl_coef", known, flags=True)


def test_the_hint_is_that_of_the_command(capsys):
    assert "batch_size, the rows of one update" in meaning("per_device_train_batch_size", KNOWN["sft"])
    assert "no warm-up" in meaning("warmup_steps", KNOWN["sft"])
    assert meaning("train_dataset", KNOWN["reward-model"]).startswith("It is data:")
    assert meaning("loss_type", KNOWN["sft"]) == "" == meaning("made_up", KNOWN["train"])
    with pytest.raises(Refused, match=r"no setting 'loss_type'\. Available: "):
        tokenrl.sft(loss_type="grpo")
    assert main(["control", "--lr=0.1"]) == 2
    assert "no flag --lr. It is --learning-rate." in capsys.readouterr().err
    assert meaning("per_device_train_batch_size", KNOWN["control"]) == ""


def test_misspelt_and_made_up_flags_are_left_to_the_parser(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--learning-rat", "0.1"])
    assert "learning-rate" in capsys.readouterr().err
    with pytest.raises(Refused, match="Did you mean 'learning_rate'"):
        tokenrl.train(learning_rat=0.1)


def test_a_configuration_in_the_words_of_trl_is_refused_with_ours(tmp_path, capsys):
    (tmp_path / "trl.yaml").write_text("learning_rate: 1e-6\nnum_train_epochs: 1\nbeta: 0.04\n")
    assert main(["train", "--config", str(tmp_path / "trl.yaml")]) == 2
    said = capsys.readouterr().err
    assert (
        "trl.yaml cannot be used" in said
        and "no setting 'num_train_epochs'. It is max_steps; an epoch" in said
    )


@pytest.mark.parametrize("function", [tokenrl.train, tokenrl.sft, tokenrl.evaluate, tokenrl.sample])
def test_another_toolkits_object_of_settings_is_refused(function):
    class GRPOConfig:
        output_dir = "x"

    with pytest.raises(Refused, match=r"\(GRPOConfig\); it must be \w+Arguments. Give settings as keywords"):
        function(args=GRPOConfig(), model="m")
    with pytest.raises(Refused, match=r"args is 'sort_digits' \(str\)"):
        function("sort_digits")


def test_settings_given_twice_are_refused_instead_of_lost():
    with pytest.raises(Refused, match="the keywords seed, quiet would be lost"):
        tokenrl.train(COMMANDS["train"].arguments(), seed=1, quiet=True)
