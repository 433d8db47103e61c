"""Names from TRL, OpenRLHF and verl are refused with ours: every name that is told exists, everywhere."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from pages import commands, write_files
from test_recipes import make_chat_model_and_data

import tokenrl
from tokenrl.cli import COMMANDS, main
from tokenrl.core import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused, nearest
from tokenrl.flags import parse
from tokenrl.foreign import OF_DATA, check_flags, meaning, settings_of, table
from tokenrl.language.supervised.defaults import SFT_ANY
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import ANY
from tokenrl.settings import arguments, field_types

KNOWN = {
    name: set(settings_of(field_types(command.arguments))) for name, command in COMMANDS.items()
}
PAGE = Path(__file__).parents[1] / "recipes" / "pages" / "coming_from_trl.md"

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
reward_model_name_or_path model_name_or_path model_revision torch_dtype attn_implementation use_peft
lora_dropout load_in_4bit max_prompt_length kl_coef rloo_k num_ppo_epochs num_mini_batches response_length lr
"""


def test_every_name_of_ours_that_is_told_exists_and_no_row_is_hidden_by_another():
    for row in table():
        commands = [name for name, known in KNOWN.items() if row.needs <= known]
        assert commands, row
        for name in row.names:
            assert any(meaning(name, KNOWN[command]) for command in commands), (
                f"{name} is never told"
            )
    rows = [
        (name, value, row.needs)
        for row in table()
        for name in row.names
        for value in row.values or [""]
    ]
    assert len(rows) == len({(name, value, tuple(sorted(needs))) for name, value, needs in rows})
    for known in KNOWN.values():
        assert [name for name in known if meaning(name, known)] == []


def test_what_hints_name_is_taken_as_flags_and_as_keywords_and_is_the_same():
    settings, changed = KNOWN["train"], 0
    translated = [row for row in table() if row.ours]
    rows = [
        (name, value, row.remark)
        for row in translated
        for name in row.names
        for value in row.values
    ]
    numbers = {
        "lr": 1e-5,
        "beta": 0.04,
        "epsilon_high": 0.28,
        "delta": 2.0,
        "kl_coef": 0.1,
        "eval_steps": 5,
    }
    numbers |= {"use_cpu": True, "rloo_k": 4, "response_length": 9, "model_name_or_path": "a/b c"}
    for name, value, remark in [*rows, *((name, value, "") for name, value in numbers.items())]:
        hints = (
            meaning(name, settings, {name: value}, flags=flags)[:-1] for flags in (True, False)
        )
        hints = (re.sub("^It is (an axis of the estimator: )?", "", hint) for hint in hints)
        flags, keywords = (hint.removesuffix(remark) for hint in hints)
        made = arguments(TrainArguments, eval(f"dict({keywords})", {"Estimator": Estimator}))
        assert made == parse("train", COMMANDS["train"], shlex.split(flags)), (name, value)
        changed += made != TrainArguments()
    assert changed > 35
    hint = meaning("beta", settings, {"beta": 0.1, "estimator": "grpo"})
    assert "estimator=Estimator.preset('grpo', beta=0.1)" in hint
    assert "estimator=dict(beta=0.1)" in meaning("beta", settings | {"arms"}, {"beta": 0.1})


def test_arithmetic_is_done_where_its_numbers_are_known(tmp_path, monkeypatch):
    batch = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": "4",
        "num_generations": 4,
    }
    rows, train = [{"prompt": "1"}] * 1_000, KNOWN["train"]
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "1"}\n' * 3 + "\n")
    for name, options, hint in (
        (
            "num_train_epochs",
            {"task": rows},
            "max_steps=188 (epochs 3 x rows 1,000 / prompts_per_step 16)",
        ),
        ("epochs", {"task": {"train": rows}, "prompts_per_step": 1}, "max_steps=3000 ("),
        (
            "epochs",
            {"task": rows, **batch},
            "max_steps=375 (epochs 3 x rows 1,000 / prompts_per_step 8)",
        ),
        (
            "epochs",
            {"task": rows, "per_device_train_batch_size": "x"},
            "max_steps (epochs 3 x rows 1,000 / p",
        ),
        ("epochs", {"task": "a.jsonl"}, "max_steps (epochs 3 x rows / prompts_per_step), less if"),
        ("warmup_ratio", {"warmup_ratio": 0.07, "max_steps": 100}, "warmup_steps=7 (ratio 0.07 x"),
        (
            "gradient_accumulation_steps",
            batch,
            "prompts_per_step=8 (per_device_train_batch_size 8 x",
        ),
        ("generation_batch_size", {"generation_batch_size": 64}, "prompts_per_step=8 ("),
        ("steps_per_generation", {"steps_per_generation": 2}, "num_minibatches=2 ("),
        (
            "epochs",
            {"task": "rows.jsonl", "prompts_per_step": 2},
            "max_steps=5 (epochs 3 x rows 3 / prompts_",
        ),
    ):
        assert meaning(name, train, {name: 3} | options).startswith(f"It is {hint}"), name
    assert "batch_size=32 (" in meaning("per_device_train_batch_size", KNOWN["sft"], batch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--prompts-per-step 16 (" in meaning(
        "gradient_accumulation_steps", train, batch, flags=True
    )
    assert {name: (ANY | SFT_ANY)[name] for name in OF_DATA} == OF_DATA


def test_the_words_of_trl_are_refused_from_python_and_on_the_command_line(capsys):
    for name in OF_TRL.split():
        with pytest.raises(Refused, match=f"^There is no setting '{name}'") as caught:
            tokenrl.train(**{name: 8})
        hint, *whole = str(caught.value).split("\n")
        assert "Available" not in hint and all(line.startswith("All together: ") for line in whole)
        with pytest.raises(Refused, match=f"^There is no flag --{name}. (?!See)"):
            check_flags(
                [f"--{name}", "8"], field_types(COMMANDS["train"].arguments), "tokenrl train", {}
            )
    for flag in ("--gradient-accumulation-steps", "--num_train_epochs"):
        assert main(["train", flag, "8"]) == main(["train", f"{flag}=8"]) == 2
        assert capsys.readouterr().err.startswith(f"tokenrl: There is no flag {flag}. ")


@pytest.mark.parametrize(
    ("command", "name", "said"),
    [
        (
            *("train", "per_device_train_batch_size"),
            "It is --prompts-per-step 1 (per_device_train_batch_size 8 x gradient_accumulation_steps 1 x "
            "processes 1 / num_generations 8), as TRL counts completions; micro_batch_size and "
            "tokens_per_pass change memory only.",
        ),
        (
            "train",
            "rollout_batch_size",
            "It is --prompts-per-step, in prompts over all processes, not in completions.",
        ),
        ("sft", "train_batch_size", "It is --batch-size, of a whole update."),
        ("control", "num_train_epochs", "The length of a run is max_steps, in steps."),
        (
            *("train", "scale_rewards"),
            "Of its values true and group is --estimator.scale group_std; batch is --estimator.scale "
            "batch_std; false and none is --estimator.scale none.",
        ),
        (
            "train",
            "per_device_eval_batch_size",
            "Held-out prompts are sampled 256 completions at a time.",
        ),
        ("reward-model", "train_dataset", "It is --data."),
        ("train", "train_dataset", "It is --task."),
        ("train", "resume_from_checkpoint", "It is --resume."),
        ("train", "torch_compile", "Nothing is compiled, which gained next to nothing."),
        ("train", "beta", "It is an axis of the estimator: --estimator.beta."),
        ("sft", "warmup_steps", "The learning rate falls linearly to 0, without a warm-up."),
        ("control", "warmup_steps", ""),
        ("control", "lr_scheduler_type", "It is --learning-rate-schedule."),
        ("train", "use_vllm", "It is --generator vllm, one engine, in the process of the run."),
        (
            "sample",
            "use_vllm",
            "This command samples with transformers; the setting generator of tokenrl train takes vllm.",
        ),
        ("sft", "loss_type", ""),
        ("control", "per_device_train_batch_size", ""),
        ("train", "made_up", ""),
    ],
)
def test_the_hint_is_that_of_the_command(command, name, said):
    assert meaning(name, KNOWN[command], flags=True) == said


def test_python_and_files_are_told_keywords_and_a_misspelling_the_nearest(tmp_path, capsys):
    for wrong, said in {
        "beta": r"axis of the estimator: estimator=Estimator\(beta=1\)",
        "num_train_epochs": r"It is max_steps \(epochs 1 x rows / prompts_per_step\)",
        "learning_rat": "Did you mean 'learning_rate'",
    }.items():
        with pytest.raises(Refused, match=said) as caught:
            tokenrl.train(**{wrong: 1})
        assert len(str(caught.value)) < 200
    (tmp_path / "trl.yaml").write_text("learning_rate: 1e-6\nnum_train_epochs: 1\nbeta: 0.04\n")
    assert main(["train", "--config", str(tmp_path / "trl.yaml")]) == 2
    said = capsys.readouterr().err
    assert "trl.yaml cannot be used" in said
    assert "no setting 'num_train_epochs'. It is max_steps (epochs 1 x rows" in said
    preset = "estimator=Estimator.preset('trl_grpo', beta=0.04)"
    assert f"no setting 'beta'. It is an axis of the estimator: {preset}." in said
    assert said.endswith(f"\nAll together: {preset}, learning_rate=1e-06\n")


TOGETHER = [
    (
        "train --seed 8 --loss_type dr_grpo --scale_rewards False --num_train_epochs 3 --bf16 --epochs=8 "
        "--per_device_train_batch_size 8 --beta 0.04 --task rows.jsonl --max_prompt_length 9 --ds 8",
        "train --seed 8 --task rows.jsonl --estimator trl_grpo,aggregation=fixed_length,scale=none,beta=.04 "
        "--prompts-per-step 1 --max-steps 24 --mixed-precision bf16",
    ),
    (
        "train --rloo_k 4 --lr 1e-5",
        "train --estimator trl_rloo --num-generations 4 --learning-rate 1e-5",
    ),
    (
        "train --estimator rloo --lr 1 --loss_type grpo",
        "train --estimator rloo,aggregation=sequence_mean --learning-rate 1",
    ),
    ("train --adv_estimator remax --clip_ratio .3", "train --estimator remax,epsilon=.3"),
    (
        "train --use_kl_loss True --max_response_length 9",
        "train --estimator verl_grpo --max-completion-length 9",
    ),
    ("train --init_kl_coef .1", "train --estimator openrlhf_default,beta=.1"),
    (
        "compare --arms rloo --lr 1e-5 --loss_type grpo --seeds 2",
        "compare --arms rloo --seeds 2 --learning-rate 1e-5 --estimator.aggregation sequence_mean",
    ),
    (
        "control --total_timesteps 10000 --gae_lambda .9 --clip_range .1 --ent_coef .01 --n_steps 128 "
        "--n_envs 4 --n_epochs 3 --batch_size 64 --vf_coef .4",
        "control --estimator ppo,lam=.9,epsilon=.1,entropy_coef=.01 --num-steps 128 --num-envs 4 "
        "--max-steps 20 --num-iterations 3 --num-minibatches 8 --value-coef .4",
    ),
]


@pytest.mark.parametrize(("foreign", "ours"), TOGETHER, ids=[case[0][:30] for case in TOGETHER])
def test_the_last_line_is_the_whole_command(foreign, ours, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "1"}\n' * 3)
    assert main(foreign.split()) == 2
    *hints, whole = capsys.readouterr().err.removeprefix("tokenrl: ").splitlines()
    assert len(hints) > 0 and all(line.startswith("There is no flag --") for line in hints)
    name, *words = shlex.split(whole.removeprefix("All together: tokenrl "))
    parsed = (parse(name, COMMANDS[name], given) for given in (words, ours.split()[1:]))
    assert next(parsed) == next(parsed)


def test_the_last_line_is_the_whole_call_with_objects_left_out():
    rows = [{"prompt": "1"}] * 32
    with pytest.raises(Refused) as caught:
        tokenrl.train(task=rows, reward=len, num_train_epochs=2, scale_rewards=False, quiet=True)
    assert str(caught.value).splitlines()[-1] == (
        "All together: task=..., reward=..., estimator=Estimator.preset('trl_grpo', scale='none'), "
        "quiet=True, max_steps=4"
    )


@pytest.mark.parametrize(
    ("name", "names", "meant"),
    [
        ("gpro", PRESETS, "grpo"),
        ("grop", PRESETS, "grpo"),
        ("dr_gpro", PRESETS, "dr_grpo"),
        ("trl_gpro", PRESETS, "trl_grpo"),
        ("gsop", PRESETS, "gspo"),
        ("rlo", PRESETS, "rloo"),
        ("solution", ["answer", "completions"], "answer"),
        ("ground_truth", ["completions", "solution"], "solution"),
        ("prompt", ["question", "prompt_id"], "question"),
        ("answr", ["answer", "question"], "answer"),
        ("max_stpes", ["max_steps", "max_samples"], "max_steps"),
    ],
)
def test_names_are_suggested_by_meaning_and_by_distance(name, names, meant):
    assert nearest(name, names) == f" Did you mean '{meant}'?"


def test_the_page_has_the_names_and_the_values_that_hints_have():
    settings, shown = KNOWN["train"], dict[str, str]()
    section = PAGE.read_text().partition("## Settings")[2].partition("## ")[0]
    for line in re.findall("^[|] .*$", section, re.MULTILINE):
        for name in re.findall(r"`(\w+)[`=]", line.partition(" | ")[0]):
            shown[name] = shown.get(name, "") + line.partition(" | ")[2]
    assert len(shown) > 50
    for name, ours in shown.items():
        assert name in settings or meaning(name, settings), name
        assert (
            name not in settings or "the same" in ours or re.search(rf"`(estimator.)?{name}`", ours)
        ), name
        assert f"estimator.{name}" not in settings or f"`estimator.{name}`" in ours, name
        for row in (row for row in table() if name in row.names and row.needs <= settings):
            for word in (word for pair in row.ours.items() for word in pair if word):
                assert word in ours, (name, word)
            assert row.formula in ours, name


SHOWN = re.findall(r"^\$ tokenrl (.*)\n(tokenrl: (?:(?![$`]).*\n)*)", PAGE.read_text(), re.M)


@pytest.mark.parametrize(("typed", "printed"), SHOWN)
def test_the_page_shows_what_is_printed(typed, printed, capsys):
    assert main(shlex.split(typed)) == 2
    assert capsys.readouterr().err == printed


def test_the_script_of_the_page_runs_and_its_command_makes_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    make_chat_model_and_data(tmp_path)
    write_files(PAGE)
    train, brief = (
        tokenrl.train,
        {"model": "model", "max_steps": 2, "quiet": True, "eval_generations": 0},
    )
    monkeypatch.setattr(tokenrl, "train", lambda **options: train(**options | brief))
    runpy.run_path("sums.py", run_name="__main__")
    runpy.run_path("with_tokenrl.py")
    (words,) = (words for name, *words in commands(PAGE) if "sums.py:exact" in words)
    words = ["model" if "HuggingFaceTB" in word else word for word in words]
    brief_flags = "--max-steps 2 --quiet --eval-generations 0 --output-dir runs/command"
    assert main(["train", *words, *brief_flags.split()]) == 0
    scripted, typed = (
        json.loads(Path(f"runs/{run}/config.json").read_text()) for run in ("sums", "command")
    )
    differ = {name for name in scripted | typed if scripted.get(name) != typed.get(name)}
    assert differ == {"code", "command", "output_dir", "task", "task_rows", "title", "reward"}
    assert (
        Path("runs/sums/metrics.jsonl").read_bytes()
        == Path("runs/command/metrics.jsonl").read_bytes()
    )


def test_another_toolkits_object_of_settings_and_settings_given_twice_are_refused():
    class GRPOConfig:
        output_dir = "x"

    for function in (tokenrl.train, tokenrl.sft, tokenrl.evaluate, tokenrl.sample):
        with pytest.raises(
            Refused, match=r"\(GRPOConfig\); it must be \w+Arguments. Give settings as"
        ):
            function(args=GRPOConfig(), model="m")
    with pytest.raises(Refused, match="the keywords seed, quiet would be lost"):
        tokenrl.train(COMMANDS["train"].arguments(), seed=1, quiet=True)
