"""What a task recommends holds for every setting that a user did not give, in each way to give one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import completes
from folders import read_json
from refusals import refused
from test_finished import Counting
from tiny_models import letter_task, letters, letters_trained, vowel_reward

from tokenrl.language.commands.planned import plan_training
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.loop import train

ADVICE = {"temperature": 0.5, "warmup_steps": 2, "max_steps": 1}
FILE = f"""
from tokenrl import PromptTask

rows = [{{"prompt": f"{{letter}}>"}} for letter in "abcdefgh"]
task = PromptTask("mine", rows[:5], rows[5:], lambda completions: [1.0 * len(t) for t in completions], 3)
task.train = {ADVICE}
"""
FLAGS = "--task mine.py:task --model tiny --cpu --quiet --prompts-per-step 2 --num-generations 2"


def settings_of(run):
    config = read_json(Path(run, "config.json"))
    return config["temperature"], config["warmup_steps"]


def test_a_recommendation_holds_where_nothing_was_given_and_the_header_says_so(tmp_path, said):
    task = letter_task(vowel_reward, train=ADVICE)
    run = letters_trained(tmp_path / "run", task, max_steps=None, quiet=False)
    assert (run.steps, *settings_of(tmp_path / "run")) == (1, 0.5, 2)
    words = "settings temperature 0.5, warmup_steps 2, max_steps 1 (recommended by the task)"
    assert words in (output := said()) and "1 steps (recommended by the task)" in output
    letters_trained(tmp_path / "run", task, max_steps=2, resume="auto")
    letters_trained(tmp_path / "given", task, temperature=1.0)  # its default
    assert [settings_of(tmp_path / run) for run in ("run", "given")] == [(0.5, 2), (1.0, 2)]
    options = {"output_dir": str(tmp_path / "object"), "cpu": True, "quiet": True}
    train(TrainArguments(task=task, model=letters(), warmup_steps=1, **options))
    assert settings_of(tmp_path / "object") == (0.5, 1)


def test_what_equals_a_recommendation_is_shown_as_given_where_it_was_given(tmp_path, said):
    task = letter_task(vowel_reward, train=ADVICE)
    options = {"max_steps": 1, "temperature": 0.5, "quiet": False}
    letters_trained(tmp_path, task, **options)
    output = said()
    assert "1 steps x 4 prompts x 4 completions (given)" in output
    assert "settings warmup_steps 2 (recommended by the task)" in output


def test_a_plan_of_several_trainings_has_what_the_task_recommends():
    task = letter_task(vowel_reward, train=ADVICE)
    for given, temperature in (([], 0.5), (["temperature"], 1.0)):
        args = TrainArguments(task=task, model=letters())
        assert plan_training(args, print, given).args.temperature == temperature


def test_so_it_does_beside_flags_and_files_of_settings(workplace):
    Path("mine.py").write_text(FILE)
    Path("settings.yaml").write_text("temperature: 1.0\n")
    for words in ("--temperature 1.0", "--config settings.yaml", "--config run", ""):
        completes(f"train {FLAGS} {words} --overwrite --output-dir run")
        assert settings_of("run") == (1.0 if words else 0.5, 2)


def test_evaluations_that_a_task_recommends_spend_nothing_of_what_a_reward_counts(tmp_path, said):
    reward = Counting()
    task = letter_task(reward, train={"eval_every": 1})
    letters_trained(tmp_path, task, eval_every=None, quiet=False)
    assert "training steps alone, as evaluations would spend what the reward counts" in said()
    assert reward.count == 3 * 16


OWN_MODEL = {"base": SimpleNamespace(build=lambda seed: letters(), warm_start=None)}


@pytest.mark.parametrize(
    ("advice", "fields", "words"),
    [
        ({"temprature": 0.5}, {}, "by `train` what it cannot: temprature.*'temperature'"),
        ({"trust_run": True, "task": "vowels"}, {}, "what it cannot: task, trust_run"),
        ({"temperature": 0.5}, OWN_MODEL, "what it cannot: temperature"),
        ({"sync_every": 2, "estimator": "remax"}, {}, "sync_every was given as 2"),
        ({"learning_rate": 0.1}, {"optimizer": "sgd"}, "without a learning_rate"),
    ],
)
def test_what_cannot_be_recommended_is_refused(tmp_path, advice, fields, words):
    """A task with a model of its own recommends open settings; a rate that is one of AdamW is none of SGD."""
    task = letter_task(vowel_reward, train=advice, **fields)
    options = {"optimizer": fields.get("optimizer", "adamw"), "learning_rate": None}
    with refused(words):
        letters_trained(tmp_path, task, **options)
