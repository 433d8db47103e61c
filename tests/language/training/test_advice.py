"""What a task recommends holds for every setting that a user did not give, in each way to give one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import completes
from folders import read_json
from refusals import refused
from tiny_models import letter_task, letters, letters_trained

from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.loop import train

ADVICE = {"temperature": 0.5, "warmup_steps": 2, "max_steps": 1, "estimator": "grpo,scale=none"}
FILE = f"""
from tokenrl import PromptTask

rows = [{{"prompt": f"{{letter}}>"}} for letter in "abcdefgh"]
task = PromptTask("mine", rows[:5], rows[5:], lambda completions: [1.0 * len(t) for t in completions], 3)
task.train = {ADVICE}
"""
QUICK = "train --task mine.py:task --model tiny --cpu --quiet --prompts-per-step 2 --num-generations 2"


def count_of_a(completions, **_):
    return [float(text.count("a")) for text in completions]


class Counting:
    """A reward that counts its completions."""

    count = 0

    def __call__(self, completions, **_):
        self.count += len(completions)
        return count_of_a(completions)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def settings_of(folder):
    config = read_json(folder / "config.json")
    return config["temperature"], config["warmup_steps"], config["estimator"]["scale"]


def test_a_recommendation_holds_and_the_header_says_so(tmp_path, said):
    task = letter_task(count_of_a, train=ADVICE)
    run = letters_trained(tmp_path / "run", task, max_steps=None, quiet=False)
    assert (run.steps, *settings_of(tmp_path / "run")) == (1, 0.5, 2, "none")
    output = said()
    assert "settings temperature 0.5, warmup_steps 2 (recommended by the task)" in output
    assert "1 steps (recommended by the task)" in output and "scale none" in output
    letters_trained(tmp_path / "run", task, max_steps=2, resume="auto")
    assert settings_of(tmp_path / "run")[0] == 0.5


def test_what_a_user_gives_holds_also_where_it_is_the_default(tmp_path):
    task = letter_task(count_of_a, train=ADVICE)
    letters_trained(tmp_path / "keyword", task, temperature=1.0, estimator="rloo")
    assert settings_of(tmp_path / "keyword") == (1.0, 2, "none")
    args = TrainArguments(task=task, model=letters(), warmup_steps=1, quiet=True, cpu=True)
    train(replace(args, output_dir=str(tmp_path / "object")))
    assert settings_of(tmp_path / "object") == (0.5, 1, "none")


def test_so_do_flags_and_a_file_of_settings(workplace):
    Path("mine.py").write_text(FILE)
    Path("settings.yaml").write_text("temperature: 1.0\n")
    for words, temperature in (("", 0.5), ("--temperature 1.0", 1.0), ("--config settings.yaml", 1)):
        completes(f"{QUICK} {words} --overwrite --output-dir run")
        assert settings_of(Path("run"))[:2] == (temperature, 2)
    completes("train --config run --overwrite --output-dir again")
    assert settings_of(Path("again"))[:2] == (1.0, 2)  # the run's own


def test_evaluations_that_a_task_recommends_spend_nothing_of_what_a_reward_counts(tmp_path, said):
    reward = Counting()
    task = letter_task(reward, train={"eval_every": 1})
    letters_trained(tmp_path, task, eval_every=None, quiet=False)
    assert "training steps alone, as evaluations would spend what the reward counts" in said()
    assert reward.count == 3 * 16 and read_json(tmp_path / "config.json")["eval_every"] == 0


@pytest.mark.parametrize(
    ("advice", "fields", "words"),
    [
        ({"temprature": 0.5}, {}, "recommends settings by `train`.*'temprature'.*temperature"),
        ({"temperature": -1}, {}, "cannot be used: temperature was given as -1"),
        ({"trust_run": True, "task": "vowels"}, {}, "cannot be used: task, trust_run. Give them"),
        ({"sync_every": 2, "estimator": "remax"}, {}, "sync_every was given as 2"),
        ({"temperature": 0.5}, {"build": lambda seed: letters(), "fingerprint": ""}, "temperature"),
        ({"learning_rate": 0.1}, {"optimizer": "sgd"}, "without a learning_rate"),
    ],
)
def test_what_cannot_be_recommended_is_refused(tmp_path, advice, fields, words):
    """A task that makes its own model recommends open settings, and no rate of AdamW is one of SGD."""
    options = {"optimizer": fields.pop("optimizer", "adamw"), "learning_rate": None}
    with refused(words):
        letters_trained(tmp_path, letter_task(count_of_a, train=advice, **fields), **options)
