"""Whole runs of a tiny model: what they leave behind, what they refuse, what they survive."""

from __future__ import annotations

import random
import re
from functools import partial

import pyarrow.parquet as parquet
import pytest
import torch
from refusals import refused
from tiny_models import LETTERS, letter_task, letters, letters_trained

import tokenrl
from tokenrl.core import Estimator
from tokenrl.language.policy.model import load_policy
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import find_task
from tokenrl.runs.checkpoint import read_state
from tokenrl.runs.metrics import read_metrics
from tokenrl.runs.reader import read_run


def share_of_a(completions, **columns):
    return [text.count("a") / max(1, len(text)) for text in completions]


def make_task(reward=share_of_a, **changes):
    rows = [{"prompt": prompt, "target": prompt[0]} for prompt in LETTERS]
    return letter_task(reward, **{"train_prompts": rows[:12], "eval_prompts": rows[12:]} | changes)


@pytest.fixture
def run(tmp_path):
    def start(task=None, output_dir=tmp_path / "run", **options):
        return letters_trained(output_dir, task or make_task(), **options)

    return start


def starts_right(completions, target):
    return [float(text.startswith(x)) for text, x in zip(completions, target, strict=True)]


def test_a_run_leaves_the_whole_directory(run, tmp_path):
    settings = {"save_every": 2, "log_completions": 1, "eval_every": 1, "reward_weights": [2, 0.5]}
    settings["reward"] = [share_of_a, starts_right]
    settings["estimator"] = Estimator.preset("reinforce_running_mean", running_mean_decay=None)
    result = run(**settings)
    directory = tmp_path / "run"
    assert (result.exit_reason, result.exit_code, result.steps) == ("finished", 0, 3)
    start, *rows = read_metrics(directory / "metrics.jsonl")
    means = {"eval_reward", "eval_reward_greedy", "eval_best@4"}
    assert {*means, *(f"{name}_stderr" for name in means)} < start.keys()
    for row in rows:
        parts = [row[f"rewards/{name}/mean"] for name in ("share_of_a", "starts_right")]
        assert row["reward"] == pytest.approx(2 * parts[0] + 0.5 * parts[1])
    rewards = [row["reward"] for row in rows]  # the mean of those before a step is its baseline
    expected = [0.0, rewards[0], (rewards[0] + rewards[1]) / 2]
    assert [row["baseline"] for row in rows] == pytest.approx(expected, rel=1e-6)
    timings = read_metrics(directory / "timings.jsonl")
    assert [row["step"] for row in timings] == [row["step"] for row in rows] == [1, 2, 3]
    for row in timings:
        assert row["step_seconds"] >= row["collect"] + row["update"]
        assert row["collect"] > row["rewards/share_of_a/seconds"] > 0 < row["tokens_per_second"]
    table = parquet.read_table(directory / "completions" / "step_000003.parquet")
    assert table["target"].to_pylist() == [prompt[0] for prompt in table["prompt"].to_pylist()]
    spread = table["rewards/starts_right"].to_numpy().std(ddof=1)
    assert rows[-1]["rewards/starts_right/std"] == pytest.approx(spread)
    assert read_state(directory / "checkpoints" / "step_000002")["stream"]["position"] == 8


class Away:
    """An environment whose service is away, at some seeds or always."""

    def __init__(self, share=1.0):
        self.share = share

    def reset(self, seed=None):
        if random.random() < self.share:
            raise OSError("no connection")
        return "b>", {}

    def step(self, text):
        return "", float(text.count("a")), True, False, {}


def test_failures_of_environments_are_named_by_a_warning_or_by_the_error_that_stops_the_run(
    run, capsys
):
    with refused(r"step: There .* 20 of 20 episodes failed\. Away\.reset raised OSError: no"):
        run(make_task([], environment=Away))
    often = make_task([], environment=partial(Away, 0.5))
    result = run(often, share_seed=False, log_completions=1, quiet=False, overwrite=True)
    output = " ".join("".join(capsys.readouterr()).split())
    failed = "of 16 episodes failed. Away.reset raised OSError: no connection"
    assert output.count(failed) == 1
    for words in ("evaluation after step 0:", "environment-fails: in the last evaluation"):
        assert re.search(rf"warning: {words} \d+ of \d+ episodes failed. Away", output)
    assert "environment-fails" in result.flags
    for row in read_run(result.output_dir).completions():  # no reward of 0 stands for a failure
        assert (row["reward"] is None) == bool(row["failure"])


def frozen():
    model, tokenizer = letters()
    return model.requires_grad_(False), tokenizer


@pytest.mark.parametrize("options", [{"lora_r": 2}, {"mixed_precision": "bf16"}])
def test_the_best_policy_is_handed_over_and_no_further_evaluation_is_waited_for(
    run, tmp_path, options
):
    """The reward falls with each evaluation, so the weights before training are the best."""
    calls = []

    def falling(completions, **columns):
        calls.append(None)
        return [reward - len(calls) for reward in share_of_a(completions)]

    result = run(reward=falling, max_steps=9, eval_every=1, keep="best", patience=2, **options)
    assert (result.exit_reason, result.steps, result.best["step"]) == ("no-improvement", 2, 0)
    best = result.best["value"]
    assert best == result.eval_before["reward_greedy"] > result.eval_after["reward_greedy"]
    for policy in (result.policy, load_policy(tmp_path / "run")):
        model = policy.model
        if hasattr(model, "disable_adapter"):
            model = model.merge_and_unload()
        for weight, before in zip(model.parameters(), letters()[0].parameters(), strict=True):
            torch.testing.assert_close(weight, before, rtol=0, atol=1e-7)
    for text in (repr(result), (tmp_path / "run" / "model" / "README.md").read_text()):
        assert "holds the weights of step 0" in text


def test_a_callback_sees_each_step_and_may_stop_the_run_which_continues(run, tmp_path):
    rows = []

    def callback(step, metrics):
        rows.append({"step": step, **metrics})
        if step == 2:
            raise tokenrl.Finished("enough")
        return step == 1

    settings = {"save_every": 1, "eval_every": 1}
    for more, reason, steps in (({}, "callback", 1), ({"resume": "auto"}, "finished", 2)):
        ended = run(callback=callback, **settings, **more)
        assert (ended.exit_reason, ended.exit_code, ended.steps) == (reason, 0, steps)
        assert rows == read_metrics(tmp_path / "run" / "metrics.jsonl")[1:] and len(rows) == steps
    assert run(callback=callback, **settings, resume="auto").exit_reason == "finished"
    run(output_dir=tmp_path / "whole", **settings)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    assert lines[0] == lines[1] and rows == lines[0][1:]


STEPS = []


def scheduled(completions, trainer_state, **_):
    """As under TRL: the reward grows from step to step."""
    step = trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch
    STEPS.append(step)
    return [step[0] / step[1] * text.count("a") for text in completions]


def steps_read():
    steps = list(dict.fromkeys(STEPS))
    STEPS.clear()
    return steps


def test_rewards_read_the_step_wherever_they_are_called(run, tmp_path):
    """12 prompts, of which a step draws 4."""
    thirds = [(0, 3, 0.0), (1, 3, 1 / 3), (2, 3, 2 / 3), (3, 3, 1.0)]
    task = make_task(scheduled)
    settings = {"eval_every": 1, "save_every": 1, "keep_checkpoints": 9, "eval_generations": 2}
    steps_read()
    settings |= {"stop_after_zero_spread": 0, "estimator": "remax"}
    run(task, **settings, callback=lambda step, _: step == 2)
    assert steps_read() == thirds[:3]
    run(task, **settings, resume="auto")
    assert steps_read() == thirds[2:]
    for part, step in (("model", 3), ("checkpoints/step_000001", 1)):
        tokenrl.evaluate(model=tmp_path / "run" / part, task=task, reward=scheduled, best_of=2)
        assert steps_read() == [thirds[step]]
    run(task, output_dir=tmp_path / "checked", check=True)
    assert {step[1] for step in steps_read()} == {3}
    outside = find_task(TaskArguments(task=task))[1]
    outside(["p"], ["a"], [[1]], {})
    assert steps_read() == [(0, 1, 0.0)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"optimizer": "sgd", "learning_rate": None},
            r"'sgd' was given without a learning_rate.*0\.06",
        ),
        ({"optimizer": "muon", "learning_rate": None}, r"0\.001 for muon"),
        ({"optimizer": "muon", "lora_r": 2}, "'muon' is for all weights"),
        ({"num_iterations": 2}, "ratio='none'"),
        (
            {"estimator": Estimator(baseline="none", returns="episode_normalized")},
            "returns 'episode_normalized' would compare the tokens of one completion",
        ),
        ({"num_minibatches": 5, "estimator": "grpo"}, "num_minibatches=5"),
        (
            {"max_completion_length": 6, "estimator": Estimator(overlong_buffer=6)},
            "overlong_buffer=6 is not",
        ),
        ({"target_kl": 2.0}, "has beta 0.*--estimator.beta"),
        ({"max_completion_length": 15}, "row 0 has 3 tokens"),
        ({"reward": lambda completions, answer: [0.0]}, "'answer'"),
        ({"model": None}, "no model of its own"),
        ({"model": frozen()}, "no trainable parameter"),
        ({"callback": 5}, "callback was given as 5; it must be a function"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules was given as .*lora_r is 0"),
        ({"lora_alpha": 8}, "lora_alpha was given as .*lora_r is 0"),
        ({"sync_every": 2, "generator": "vllm"}, "sync_every was given as 2; weights of earlier"),
        (
            {"replay": 1, "estimator": Estimator(importance_centre=True)},
            "replay was given as 1; it repeats completions of one turn",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_paragraph(run, tmp_path, options, words):
    with refused(words):
        run(**options)
    assert not (tmp_path / "run" / "config.json").exists()
