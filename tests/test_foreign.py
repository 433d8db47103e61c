"""Names from TRL, OpenRLHF and verl are refused with ours: every name that is told exists, everywhere."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from folders import RECIPES
from pages import commands, make_chat_model_and_data, write_files
from refusals import refused

import tokenrl
from tokenrl.cli import COMMANDS
from tokenrl.core import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import nearest
from tokenrl.flags import parse
from tokenrl.foreign import check_flags, meaning, settings_of, table
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import arguments, field_types

KNOWN = {
    name: set(settings_of(field_types(command.arguments))) for name, command in COMMANDS.items()
}
KNOWN["estimator"] = set(field_types(Estimator))  # a recorded one is read by itself
PAGE = RECIPES / "pages" / "guides" / "from_trl.md"

# All of GRPOConfig, RLOOConfig and the trainers of TRL 1.16 that has another name here or none, and the
# fields of transformers' TrainingArguments that people set.
OF_TRL = """
reward_funcs train_dataset eval_dataset processing_class reward_processing_classes callbacks optimizers
quantization_config peft_config tools rollout_func environment_factory
model_init_kwargs router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 remove_unused_columns
num_generations_eval ds3_gather_for_generation shuffle_dataset pad_to_multiple_of generation_batch_size
steps_per_generation generation_kwargs repetition_penalty cache_implementation use_vllm
vllm_mode vllm_gpu_memory_utilization vllm_importance_sampling_correction beta epsilon delta epsilon_high
sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
importance_sampling_level multi_objective_aggregation scale_rewards loss_type mask_truncated_completions
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef
use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
max_tool_calling_iterations off_policy_mask_threshold use_bias_correction_kl log_multimodal
num_completions_to_print log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching
transformers_continuous_batching_config use_transformers_paged normalize_advantages reward_clip_range
per_device_train_batch_size gradient_accumulation_steps num_train_epochs warmup_ratio lr_scheduler_kwargs
optim adam_beta1 adam_beta2 adam_epsilon bf16 fp16 torch_compile use_liger_kernel use_cpu fsdp deepspeed
gradient_checkpointing_kwargs torch_empty_cache_steps dataloader_num_workers disable_tqdm project
logging_strategy logging_first_step logging_dir eval_strategy eval_steps eval_on_start
per_device_eval_batch_size save_strategy save_steps save_total_limit save_only_model save_model push_to_hub
resume_from_checkpoint overwrite_output_dir data_seed
dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
lmbda seq_kd iw_opd_gamma iw_opd_epsilon loss_top_k loss_add_tail reverse_kl_top_1_mode
use_teacher_server teacher_model_server_url vllm_sync_frequency
reward_model_name_or_path model_name_or_path model_revision torch_dtype attn_implementation use_peft
lora_dropout load_in_4bit max_prompt_length kl_coef rloo_k num_ppo_epochs num_mini_batches response_length lr
"""


def test_every_name_of_ours_that_is_told_exists_and_no_row_is_hidden_by_another():
    for row in table():
        commands = [name for name, settings in KNOWN.items() if row.needs <= settings]
        assert commands, row
        for name in row.names:
            value = "".join(row.values[:1])
            assert any(meaning(name, KNOWN[command], value) for command in commands), (
                f"{name} is never told"
            )
    rows = [
        (name, value, row.needs)
        for row in table()
        for name in row.names
        for value in row.values or [""]
    ]
    assert len(rows) == len({(name, value, tuple(sorted(needs))) for name, value, needs in rows})
    for settings in KNOWN.values():
        assert [name for name in settings if meaning(name, settings)] == []


def test_what_hints_name_is_taken_as_flags_and_as_keywords_and_is_the_same():
    settings, changed = KNOWN["train"], 0
    numbers = {"lr": 1e-5, "beta": 0.04, "epsilon_high": 0.28, "delta": 2.0, "kl_coef": 0.1}
    numbers |= {"eval_steps": 5, "use_cpu": True, "rloo_k": 4, "model_name_or_path": "a/b c"}
    cases = [(name, value, "") for name, value in numbers.items()]
    for row in table():
        if row.ours and row.needs <= settings and "estimator" not in row.ours:
            cases += [
                (row.names[0], value, row.remark)
                for value in row.values
                if None not in row.ours.values()
            ]
    for name, value, remark in cases:
        keywords, flags = (
            re.sub("^It is (.*: )?", "", meaning(name, settings, value, flags=as_flags))
            .removesuffix(".")
            .removesuffix(remark)
            for as_flags in (False, True)
        )
        call = eval(f"dict({keywords})", {"Estimator": dict})
        train_arguments = arguments(TrainArguments, call)
        changed += train_arguments != TrainArguments()
        assert parse("train", COMMANDS["train"], shlex.split(flags)) == train_arguments, name
    assert changed > 35
    assert "is --estimator grpo." in meaning("adv_estimator", settings, "grpo", flags=True)


def test_the_words_of_trl_are_refused_from_python_and_on_the_command_line(refusal):
    for name in OF_TRL.split():
        with refused(f"^There is no setting '{name}'") as caught:
            tokenrl.train(**{name: 8})
        assert "Available" not in str(caught.value)
        with refused(f"^There is no flag --{name}. (?!See)"):
            check_flags([f"--{name}", "8"], field_types(TrainArguments), "tokenrl train")
    for flag in ("--gradient-accumulation-steps", "--num_train_epochs"):
        for words in ([flag, "8"], [f"{flag}=8"]):
            assert refusal("train", *words).startswith(f"tokenrl: There is no flag {flag}. ")


TYPED = """
--group-size 4 | train evaluate sample compare lab_measure | It is --num-generations 4.
--num-samples=4 | train evaluate sample compare lab_measure | It is --num-generations 4.
--n_samples 4 | train evaluate sample compare lab_measure | It is --num-generations 4.
--n-generations 4 | train evaluate sample compare lab_measure | It is --num-generations 4.
--rollout-n 4 | train evaluate sample compare lab_measure | It is --num-generations 4.
actor_rollout_ref.rollout.n=4 | train compare | It is --num-generations 4.
--max-tokens 4 | train reward-model evaluate sample compare lab_measure | It is --max-completion-length 4.
--max-new-tokens 4 | train reward-model evaluate sample compare lab_measure | It is --max-completion-length 4.
--max-length 4 | train reward-model evaluate sample compare lab_measure | It is --max-completion-length,
--max-length 4 | sft | Rows are not cut or packed
--device cpu | train sft compare lab_measure | It is --cpu, a switch
--device cuda | train sft compare lab_measure | A GPU is used where there is one
--device cuda | evaluate sample reward-model | A GPU is used where there is one
--device cpu | control | Agents are trained on the CPU
--wandb | train sft reward-model control compare | It is --report-to wandb.
--wandb me | evaluate lab_exact | Trackers follow trainings
--lr 1e-3 | train sft reward-model control compare | It is --learning-rate 1e-3.
--steps 3 | train sft reward-model control compare | It is --max-steps 3.
--lr 1e-3 --steps 2 | evaluate sample judge advise lab_measure | This command trains nothing
--run x | evaluate sample lab_measure | It is --model x.
--checkpoint x | evaluate sample lab_measure | It is --model x.
--checkpoint x | advise | It is --run x.
--checkpoint x | train sft control | It is --resume, a checkpoint's directory
--run x | judge | those to judge as candidate
--run x | report | Directories of runs are given as plain words
--trainer.total_epochs 3 | train | It is --max-steps, which is epochs x rows
algorithm.adv_estimator=grpo data.seed=3 | train | It is --estimator grpo.
--per_device_train_batch_size 8 | train | It is --prompts-per-step, which is per_device_train_batch_size x
--per_device_train_batch_size 8 | control | A step samples num_steps x num_envs steps of environments, which
--rollout_batch_size 8 | train | It is --prompts-per-step, in prompts over all processes, not in completions.
--num_train_epochs 3 | control | The length of a run is max_steps, in steps.
--scale_rewards 3 | train | Of its values true and group is --estimator.scale group_std; batch is --estimator.scale
--train_dataset x | train | It is --task x.
--train_dataset x | reward-model | It is --data x.
--beta 3 | train | It is an axis of the estimator: --estimator.beta 3.
--estimator.trust_sides 1 | train | Tokens are dropped where they moved in the direction of their advantage, which
--use_vllm true | sample | This command samples with transformers; the setting generator of tokenrl train takes vllm.
--greedy | sample | It is --num-generations 0.
--warmup_steps 3 | control | There is no flag --warmup_steps. Did you mean '--num-steps'? See
--made_up 3 | train | There is no flag --made_up. Did you mean '--model'? See
--overwrite True | train | no flag True. No flag takes this word
--overwrite=True | train | no flag True. No flag takes this word
--prompt-template a b c | train | no flag b. No flag takes this word
--max-steps 5 6 | compare | no flag 6. No flag takes this word
runs/a | train | There is no flag runs/a. No flag takes this word
"""


@pytest.mark.parametrize("row", TYPED.strip().splitlines())
def test_words_that_people_type_lead_to_the_flag_of_each_command(row, refusal):
    words, commands, sentence = row.split(" | ")
    for command in commands.split():
        assert sentence in refusal(f"{command.replace('_', ' ')} {words}")


def test_where_a_command_has_a_run_or_a_model_it_may_be_the_first_word():
    for name, first in {"evaluate": "model", "sample": "model", "advise": "run"}.items():
        parsed = parse(name, COMMANDS[name], ["runs/a", "--seed", "3"])
        assert (getattr(parsed, first), parsed.seed) == ("runs/a", 3)
    words = ["runs/a", "runs/b", "--task", "vowels"]
    assert parse("evaluate", COMMANDS["evaluate"], words).model == ("runs/a", "runs/b")


def test_python_and_files_are_told_keywords_and_a_misspelling_the_nearest(tmp_path, refusal):
    for wrong, sentence in {
        "beta": r"axis of the estimator: estimator=Estimator\(beta=1\)",
        "num_train_epochs": "It is max_steps, which is epochs x rows / prompts_per_step",
        "learning_rat": "Did you mean 'learning_rate'",
    }.items():
        with refused(sentence) as caught:
            tokenrl.train(**{wrong: 1})
        assert len(str(caught.value)) < 200
    (tmp_path / "trl.yaml").write_text("learning_rate: 1e-6\nnum_train_epochs: 1\nbeta: 0.04\n")
    sentence = refusal("train --config", str(tmp_path / "trl.yaml"))
    assert "trl.yaml cannot be used" in sentence
    assert "no setting 'num_train_epochs'. It is max_steps, which is epochs x rows" in sentence
    axis = "estimator=Estimator(beta=0.04)"
    assert sentence.endswith(f"no setting 'beta'. It is an axis of the estimator: {axis}.\n")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("dppo", "dr_grpo,ratio=trust"),
        ("otb_loo", "otb,leave_one_out=True"),
        ("optimal_per_timestep", "otb,leave_one_out=True"),
        ("optimal_form=per_timestep", "otb,leave_one_out=True"),
        ("scale=other_groups_std", "loo_std"),
    ],
)
def test_choices_of_earlier_versions_are_refused_with_what_is_the_same_or_nearest(name, other):
    assert Estimator.preset(other)
    with refused(rf"'\. Take {other}, which "):
        Estimator.preset(name)


@pytest.mark.parametrize(
    ("name", "names", "meant"),
    [
        ("gpro", PRESETS, "grpo"),
        ("dr_gpro", PRESETS, "dr_grpo"),
        ("rlo", PRESETS, "rloo"),
        ("solution", ["answer", "completions"], "answer"),
        ("prompt", ["question", "prompt_id"], "question"),
        ("max_stpes", ["max_steps"], "max_steps"),
    ],
)
def test_names_are_suggested_by_meaning_and_by_distance(name, names, meant):
    assert nearest(name, names) == f" Did you mean '{meant}'?"


SHOWN = re.findall(r"^\$ tokenrl (.*)\n(tokenrl: (?:(?![$`]).*\n)*)", PAGE.read_text(), re.M)


@pytest.mark.parametrize(("typed", "printed"), SHOWN)
def test_the_page_shows_what_is_printed(typed, printed, refusal):
    assert refusal(*shlex.split(typed)) == printed


def test_the_script_of_the_page_runs_and_its_command_has_the_same_settings(workplace, monkeypatch):
    monkeypatch.syspath_prepend(workplace)
    make_chat_model_and_data(workplace)
    write_files(PAGE)
    train, calls = tokenrl.train, []
    brief = {"model": "model", "max_steps": 1, "quiet": True, "eval_generations": 0}
    brief |= {"prompts_per_step": 1, "max_completion_length": 4}
    monkeypatch.setattr(
        tokenrl, "train", lambda **call: (calls.append(call), train(**call | brief))[1]
    )
    runpy.run_path("sums.py", run_name="__main__")
    runpy.run_path("with_tokenrl.py")
    (words,) = (words for name, *words in commands(PAGE) if "sums.py:exact" in words)
    typed, scripted = parse("train", COMMANDS["train"], words), arguments(TrainArguments, calls[0])
    assert Path("runs/sums/model").is_dir() and Path("sums/test.jsonl").is_file()
    differ = {name for name, value in vars(typed).items() if value != getattr(scripted, name)}
    assert differ == {"task", "reward"}


def test_another_toolkits_object_of_settings_and_settings_given_twice_are_refused():
    class GRPOConfig:
        output_dir = "x"

    for function in (tokenrl.train, tokenrl.sft, tokenrl.evaluate, tokenrl.sample):
        with refused(r"\(GRPOConfig\); it must be \w+Arguments. Give settings as"):
            function(args=GRPOConfig(), model="m")
    with refused("the keywords seed, quiet would be lost"):
        tokenrl.train(COMMANDS["train"].arguments(), seed=1, quiet=True)
