"""A run that may generate so many completions: what counts, when it ends, and what follows the samples."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tiny_models import PROMPTS, make_policy, make_task, vowel_reward

import tokenrl
from tokenrl.core import Estimator
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.run import TrainingRun
from tokenrl.language.training.settings import plain_steps, train_settings

PLAIN = 4 * 2  # prompts x completions of a step
REFILLING = Estimator.preset(
    "dapo", baseline="remax", overlong_buffer=0
)  # greedy completions and refills
QUICK = {
    **{
        "prompts_per_step": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "learning_rate": 0.01,
    },
    **{"lr_scheduler_type": "linear", "eval_every": 3, "eval_generations": 0},
    **{"cpu": True, "threads": 1, "quiet": True},
}


class Counted:
    """A reward that counts the completions it sees; coarse, so that some groups have equal rewards."""

    __name__ = "counted"

    def __init__(self):
        self.seen = 0

    def __call__(self, completion_ids, **_):
        self.seen += len(completion_ids)
        return [float(sum(i % 3 == 0 for i in ids) > 1) for ids in completion_ids]


def run(folder, reward=vowel_reward, **options):
    task = make_task([f"{word} {n}" for word in PROMPTS for n in ("one", "two", "ten")], reward)
    return tokenrl.train(
        **{"model": make_policy(), "task": task, "output_dir": folder, **QUICK, **options}
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_further_completions_it_is_the_run_of_that_many_steps(
    tmp_path, capsys, monkeypatch
):
    how = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    run(tmp_path / "steps", max_steps=5, **how)
    monkeypatch.setattr(TrainingRun, "seconds_left", lambda run, step, seconds: 3600.0 * step)
    result = run(
        tmp_path / "samples", max_steps=9, max_samples=5 * PLAIN - 3, **how | {"quiet": False}
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "max_steps=9 has no effect, because max_samples=37 says" in said
    assert "5 steps (max_samples 37) x 4 prompts" in said and "ETA 2:00:00" in said
    assert result.exit_reason == "finished" and result.steps == 5
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("steps", "samples")]
    assert texts[0] == texts[1]
    rates = [0.0, 0.005, 0.01, 0.0075, 0.0025]  # of a warm-up of two steps and a cosine of three
    assert [row["learning_rate"] for row in rows(tmp_path / "steps")[1:]] == pytest.approx(rates)
    assert [row["num_samples"] for row in rows(tmp_path / "samples")[1:]] == [
        PLAIN * n for n in range(1, 6)
    ]
    config = json.loads((tmp_path / "samples" / "config.json").read_text())
    assert (config["max_steps"], config["max_samples"]) == (5, 5 * PLAIN - 3)
    how = {
        "estimator": "remax",
        "max_samples": 960,
        "eval_every": 12,
        "check": True,
        "quiet": False,
    }
    run(tmp_path / "check", **how)  # which estimates the time of the budget
    said = " ".join(capsys.readouterr().out.split())
    assert "80 steps of" in said and "11 evaluations of" in said


@pytest.mark.parametrize(("estimator", "budget"), [("remax", 70), (REFILLING, 120)])
def test_every_completion_counts_and_rate_and_evaluations_follow_them(
    tmp_path, estimator, budget, capsys
):
    reward = Counted()
    options = {"max_grad_norm": 0.0, "stop_after_zero_spread": 0, "max_refills": 2, "save_every": 9}
    how = {"estimator": estimator, "max_samples": budget, **options}
    result = run(tmp_path / "run", reward, **how)
    found = rows(tmp_path / "run")
    used = [0] + [row["num_samples"] for row in found[1:]]
    evaluated = [row["step"] for row in found if "eval_reward_greedy" in row]
    assert reward.seen - 2 * len(evaluated) == used[-1]  # two held-out prompts, greedy
    least, refilled = PLAIN + 4, sum(row.get("refilled", 0) for row in found)
    assert (refilled > 0) == (estimator != "remax") and used[
        -1
    ] >= least * result.steps + refilled * 2
    assert used[-2] < budget <= used[-1] and result.exit_reason == "finished"
    length = -(-budget // least)
    assert result.steps < length or not refilled
    for row, before in zip(found[1:], used, strict=False):
        assert row["learning_rate"] == pytest.approx(
            0.01 * max(0, 1 - before / least / length), rel=1e-9
        )
    passed = [n for n in range(1, len(used)) if used[n] // (3 * PLAIN) > used[n - 1] // (3 * PLAIN)]
    assert evaluated == sorted({0, *passed, result.steps})
    same = run(tmp_path / "run", reward, **how, resume="auto")  # the budget is used
    assert same.steps == result.steps and rows(tmp_path / "run") == found


@pytest.mark.parametrize(
    ("budget", "done", "every", "step", "seconds"),
    [
        ({"max_steps": 30}, 0, 10, 2, 28 * 2 + 3 * 7),
        ({"max_steps": 30}, 0, 10, 20, 10 * 2 + 7),
        ({"max_steps": 35}, 0, 10, 20, 15 * 2 + 2 * 7),
        ({"max_steps": 30}, 0, 0, 29, 2 + 7),  # the last step is evaluated anyhow
        (
            {"max_samples": 30 * PLAIN},
            10 * PLAIN,
            10,
            5,
            10 * 2 + 2 * 7,
        ),  # steps of twice as many samples
        ({"max_samples": 30 * PLAIN}, 31 * PLAIN, 10, 29, 0),
    ],
)
def test_the_time_left_is_that_of_the_steps_and_evaluations_to_come(
    budget, done, every, step, seconds
):
    args = train_settings(TrainArguments(**QUICK | {"eval_every": every} | budget), make_task())
    run = TrainingRun(
        args, *[None] * 5, "", None, {}, eval_seconds=7.0, totals=Counter(num_samples=done)
    )
    assert run.seconds_left(step, 2.0) == seconds


def test_estimators_are_evaluated_after_the_same_numbers_of_samples():
    def settings(estimator, **options):
        given = (
            {k: v for k, v in QUICK.items() if k != "eval_every"} | {"max_samples": 960} | options
        )
        return train_settings(
            TrainArguments(**given, estimator=Estimator.preset(estimator)), make_task()
        )

    rloo, remax = settings("rloo"), settings("remax")
    assert (rloo.max_steps, remax.max_steps) == (120, 80) and plain_steps(remax) == 120
    assert rloo.eval_every == remax.eval_every == rloo.log_completions == 12
    assert settings("remax", max_samples=None, max_steps=50).eval_every == 5
