"""Whole runs of a tiny model: what they leave behind, what they refuse, what they survive."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow.parquet as parquet
import pytest
import torch

import tokenrl
from tokenrl.core import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused, Stopped
from tokenrl.runs.checkpoint import read_state
from tokenrl.runs.folders import verify
from toy_tasks.models import TinyModel

LETTERS = "abcd>"
DIFFERENT = ("ppo", "remax", "dapo", "optimal")
"""Presets with parts of their own: a critic, greedy completions, refills, norms of scores."""
WITHIN = Estimator(baseline="none", returns="episode_normalized")
STANDARDISED = Estimator(baseline="none", returns="reward_to_go", scale="episode_std")


def share_of_a(completions, **columns):
    return [text.count("a") / max(1, len(text)) for text in completions]


def make_task(reward=share_of_a, **changes):
    rows = [{"prompt": f"{x}{y}>", "target": x} for x in "abcd" for y in "abcd"]
    task = SimpleNamespace(
        name="letters",
        train_prompts=rows[:12],
        eval_prompts=rows[12:],
        reward=reward,
        max_completion_length=4,
        demonstrations=[],
        solved=None,
    )
    vars(task).update(changes)
    return task


@pytest.fixture
def run(tmp_path):
    def start(task=None, **options):
        defaults = {
            "model": TinyModel(tuple(LETTERS), layers=1, hidden=16, heads=2, context=16)(0),
            "task": task or make_task(),
            "output_dir": tmp_path / "run",
            "max_steps": 3,
            "prompts_per_step": 4,
            "num_generations": 4,
            "learning_rate": 1e-2,
            "quiet": True,
        }
        return tokenrl.train(**(defaults | options))

    return start


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.drawn
def test_a_run_leaves_the_whole_directory(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(save_every=2, log_completions=1, eval_every=1)
    directory = tmp_path / "run"
    assert result.exit_reason == "finished" and result.exit_code == 0 and result.steps == 3
    rows = metrics_of(directory)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0].keys() == {
        "step",
        "eval_reward",
        "eval_reward_greedy",
        "eval_reward_stderr",
        "eval_completions/mean_length",
        "eval_completions/clipped_ratio",
        "eval_reward_greedy_stderr",
        "eval_rewards/share_of_a/mean",
        "eval_entropy",
        "eval_best@4",
        "eval_best@4_stderr",
        "eval_distinct_1",
        "eval_distinct_2",
    }
    timings = [json.loads(line) for line in (directory / "timings.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timings] == [1, 2, 3]
    assert all(row["step_seconds"] >= row["collect"] + row["update"] for row in timings)
    assert all(row["peak_memory_gib"] > 0.1 and row["tokens_per_second"] > 0 for row in timings)
    for name in (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/share_of_a/mean",
        "loss",
        "grad_norm",
    ):
        assert isinstance(rows[1][name], float)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["exit_reason"] == "finished" and summary["steps"] == 3
    assert summary["eval_after"]["reward_greedy"] == result.eval_after["reward_greedy"]
    assert summary["eval_before"] == {k.removeprefix("eval_"): v for k, v in rows[0].items() if k != "step"}
    config = json.loads((directory / "config.json").read_text())
    assert (
        config["estimator"]["baseline"] == "rloo"
        and config["prompts_per_step"] == 4
        and config["versions"]["torch"]
    )
    table = parquet.read_table(directory / "completions" / "step_000003.parquet")
    assert table.num_rows == 16 and {"prompt", "completion", "reward", "advantage"} <= set(table.column_names)
    assert (directory / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (directory / "report.html").read_text().count("<script") == 1  # that of the page itself
    checkpoint = directory / "checkpoints" / "step_000002"
    verify(checkpoint)
    assert read_state(checkpoint)["stream"]["position"] == 8
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    ids = tokenizer("ab>", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    trained = dict(result.policy.model.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in model.named_parameters())


def test_the_same_seed_gives_the_same_metrics_and_another_gives_others(run, tmp_path):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(output_dir=tmp_path / name, seed=seed)
        texts.append((tmp_path / name / "metrics.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_it_learns(run):
    result = run(max_steps=40, learning_rate=3e-3, num_generations=8)
    assert result.eval_before["reward"] < 0.5
    assert result.eval_after["reward"] > result.eval_before["reward"] + 0.3


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DIFFERENT)) for name in PRESETS]
)
def test_every_preset_trains(run, preset):
    result = run(estimator=preset)
    assert result.steps == 3 and result.eval_after != result.eval_before


def test_the_running_mean_is_read_before_it_is_updated(run, tmp_path):
    run(estimator=Estimator.preset("reinforce_running_mean", running_mean_decay=None), num_iterations=1)
    rows = metrics_of(tmp_path / "run")[1:]
    assert rows[0]["baseline"] == 0.0
    assert rows[1]["baseline"] == pytest.approx(rows[0]["reward"], rel=1e-6)
    assert rows[2]["baseline"] == pytest.approx((rows[0]["reward"] + rows[1]["reward"]) / 2, rel=1e-6)


def test_columns_reach_the_reward_and_several_rewards_are_weighted(run, tmp_path):
    def starts_right(completions, target):
        return [float(text.startswith(x)) for text, x in zip(completions, target, strict=True)]

    run(reward=[share_of_a, starts_right], reward_weights=[2.0, 0.5])
    row = metrics_of(tmp_path / "run")[1]
    assert row["reward"] == pytest.approx(
        2 * row["rewards/share_of_a/mean"] + 0.5 * row["rewards/starts_right/mean"]
    )


class Later:
    """A reward that goes wrong after some calls; the first ones belong to the evaluation before training."""

    __name__ = "later"

    def __init__(self, good_calls, bad):
        self.calls, self.good_calls, self.bad = 0, good_calls, bad

    def __call__(self, completions, **columns):
        self.calls += 1
        return share_of_a(completions) if self.calls <= self.good_calls else self.bad(completions)


def _raise(completions):
    raise ConnectionError("the server has gone")


@pytest.mark.parametrize(
    "bad, words",
    [
        (_raise, "ConnectionError: the server has gone"),
        (lambda completions: [float("nan")] * len(completions), "nan"),
        (lambda completions: ["good"] * len(completions), "'good'"),
        (lambda completions: [1.0], "1 rewards for 16"),
        (lambda completions: [None] * len(completions), "abstained"),
    ],
)
def test_a_reward_that_fails_stops_the_run_and_keeps_the_checkpoint(run, tmp_path, bad, words):
    with pytest.raises(Stopped, match=words) as caught:
        run(make_task(Later(4, bad)), save_every=1, eval_every=0, max_steps=9)
    directory = tmp_path / "run"
    assert str(directory / "checkpoints" / "step_000002") in str(caught.value)
    verify(directory / "checkpoints" / "step_000002")
    assert json.loads((directory / "summary.json").read_text())["exit_reason"] == "failed"
    assert caught.value.exit_code == 1


def test_a_reward_that_fails_at_once_is_refused_with_nothing_written_or_lost(run, tmp_path, bad=_raise):
    run()
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(Refused, match="Before the first step: Reward function later"):
        run(make_task(Later(0, bad)), overwrite=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept
    with pytest.raises(Refused, match="already holds a run"):
        run()
    with pytest.raises(Refused):
        run(make_task(Later(0, bad)), output_dir=tmp_path / "new")
    assert run(output_dir=tmp_path / "new").steps == 3  # the refused run is not in the way


def test_a_constant_reward_warns_and_stops(run, capsys):
    def constant(completions):
        return [1.0] * len(completions)

    with pytest.raises(Stopped, match="In 3 steps in a row no two rewards that are compared"):
        run(make_task(constant), max_steps=9, stop_after_zero_spread=3, quiet=False)
    assert "nothing to learn from" in " ".join(capsys.readouterr().out.split())


def test_a_task_that_is_learnt_ends_the_run_early_and_well(run, tmp_path):
    all_right = Later(4, lambda completions: [1.0] * len(completions))
    result = run(make_task(all_right), max_steps=9, stop_after_zero_spread=3, eval_every=0)
    assert result.exit_reason == "learnt" and result.exit_code == 0 and result.steps == 5
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA"),
    ],
)
def test_too_little_memory_names_the_settings_that_bound_it(run, monkeypatch, error):
    from tokenrl.language.training import step

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(step, "score", fail)
    with pytest.raises(Stopped, match=r"(?s)At step 1: .*--tokens-per-pass .*--micro-batch-size"):
        run()


@pytest.mark.filterwarnings("error:Detected call of")
def test_a_gradient_that_is_not_finite_is_skipped_and_counted_and_stops_the_run(run, tmp_path):
    model, tokenizer = TinyModel(tuple(LETTERS), layers=1, hidden=16, heads=2, context=16)(0)
    before = [p.detach().clone() for p in model.parameters()]
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(Stopped, match="not finite in 3 updates in a row"):
        run(model=(model, tokenizer), max_steps=9, stop_after_nonfinite=3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [row["skipped_steps"] for row in metrics_of(tmp_path / "run")[1:]] == [1, 2]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_generations": 1}, "num_generations=1"),
        ({"estimator": "loo_std", "num_generations": 2}, "three or more"),
        ({"optimizer": "sgd", "learning_rate": None}, r"'sgd' was given without a learning_rate.*0\.06"),
        ({"num_iterations": 2}, "ratio='none'"),
        ({"estimator": WITHIN}, "returns 'episode_normalized' would compare the tokens of one completion"),
        ({"estimator": STANDARDISED}, "scale 'episode_std'"),
        ({"num_minibatches": 5, "estimator": "grpo"}, "num_minibatches=5"),
        ({"max_steps": 0}, "max_steps was given as 0; it must be a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate was given as 0.0; it must be a finite number above 0"),
        ({"temperature": float("nan")}, "temperature was given as nan"),
        ({"micro_batch_size": 0}, "micro_batch_size was given as 0"),
        ({"seed": -1}, "seed was given as -1; it must be a whole number of at least 0"),
        ({"max_completion_length": 15}, "row 0 has 3 tokens"),
        ({"max_completion_length": 16}, "leaves no room"),
        ({"dtype": "float16"}, "float16"),
        ({"resume": "elsewhere/step_000002"}, "checkpoint of the run in output_dir"),
        ({"estimator": "rlo"}, "Did you mean 'rloo'"),
        ({"reward": "math:nothing"}, "nothing"),
        ({"reward": lambda completions, answer: [0.0]}, "'answer'"),
        ({"report_to": "nosuch"}, "nosuch"),
        ({"no_such_argument": 1}, "There is no setting 'no_such_argument'"),
        ({"task": make_task(train_prompts=[])}, "no prompts"),
        ({"task": make_task(eval_prompts=[])}, "no prompts to evaluate"),
        ({"task": "nosuch"}, "nosuch"),
        ({"model": None}, "no model of its own"),
        ({"output_dir": "../elsewhere"}, r"\.\."),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_paragraph(run, options, words):
    with pytest.raises(Refused, match=words) as caught:
        run(**options)
    assert "\n" not in str(caught.value)


def test_frozen_weights_are_refused(run):
    model, tokenizer = TinyModel(tuple(LETTERS), layers=1, hidden=16, heads=2, context=16)(0)
    with pytest.raises(Refused, match="no trainable parameter"):
        run(model=(model.requires_grad_(False), tokenizer))
