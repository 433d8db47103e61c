"""Settings that contradict each other are refused; those that do nothing are warned of."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from refusals import refused
from tiny_models import make_policy, make_task

from tokenrl import train
from tokenrl.core.estimator import Estimator
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import settle

QUICK = {
    "max_steps": 2,
    "prompts_per_step": 2,
    "num_generations": 2,
    "eval_generations": 0,
    "cpu": True,
}


def run(folder, **settings):
    return train(model=make_policy(), task=make_task(), output_dir=folder, **QUICK | settings)


def test_settings_without_effect_are_named_and_the_run_goes_on(tmp_path, capsys, said):
    idle = {"kl_gain": 0.2, "value_iterations": 2, "warm_start_steps": 9, "max_refills": 1}
    result = run(tmp_path / "run", **idle, warmup_steps=2, prompt_weights="variance")
    out = said()
    assert all(f"{name}={value} has no effect" in out for name, value in idle.items())
    assert "warmup_steps=2 is not less than max_steps=2" in out
    assert "this run draws 4 of 4: its rewards never change a chance" in out
    assert result.exit_code == 0 and out.count("has no effect") == len(idle)
    run(tmp_path / "run", estimator=Estimator(beta=0.1), target_kl=0.1, kl_gain=0.2, overwrite=True)
    assert "has no effect" not in capsys.readouterr().out


def test_variables_of_accelerate_that_change_numbers_are_overruled(tmp_path, monkeypatch, said):
    run(tmp_path / "usual", quiet=True)
    # Others are as `accelerate launch` sets them, or say where a run computes.
    variables = {"USE_FSDP": "true", "GRADIENT_ACCUMULATION_STEPS": "1", "DYNAMO_BACKEND": "no"}
    variables = {f"ACCELERATE_{name}": x for name, x in variables.items()} | {
        "ACCELERATE_USE_CPU": "true"
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run(tmp_path / "run")
    out = said()
    assert "ACCELERATE_USE_FSDP=true has no effect" in out and out.count("no effect") == 1
    usual, other = (tmp_path / name / "metrics.jsonl" for name in ("usual", "run"))
    assert usual.read_text() == other.read_text() and os.environ.items() >= variables.items()


@pytest.mark.parametrize(("prompts", "valid"), [(8, "6 or 9"), (2, "3")])
def test_a_step_that_processes_cannot_share_is_refused_with_the_valid_sizes(prompts, valid):
    choices = TrainArguments(model="x", prompts_per_step=prompts)
    with refused(rf"cannot be shared equally by 3 processes.* Give {valid}\."):
        settle(choices, make_task(), make_policy(), processes=3)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_a_run_that_asks_for_it_says_what_to_install(tmp_path):
    with refused(r"needs the package vllm.*tokenrl-lm\[vllm\]"):
        run(tmp_path / "run", generator="vllm")
