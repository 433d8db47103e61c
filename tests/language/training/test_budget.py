"""A run that may generate so many completions: what counts, when it ends, and what follows the samples."""

from __future__ import annotations

import json
import shutil

import pytest
from saved_states import equal
from tiny_models import PROMPTS, make_policy, make_task, vowel_reward

import tokenrl
from tokenrl.core import Estimator
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.defaults import plain_steps
from tokenrl.language.training.setup import resolve
from tokenrl.runs.checkpoint import read_state

PLAIN = 4 * 2  # prompts x completions of a step
REFILLING = Estimator.preset("dapo", baseline="remax", overlong_buffer=0)  # greedy completions and refills
QUICK = {
    "prompts_per_step": 4,
    "num_generations": 2,
    "max_completion_length": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "eval_every": 3,
    "eval_generations": 0,
    "cpu": True,
    "threads": 1,
    "quiet": True,
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
    return tokenrl.train(**{"model": make_policy(), "task": task, "output_dir": folder, **QUICK, **options})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_without_further_completions_it_is_the_run_of_that_many_steps(tmp_path, schedule):
    how = {"lr_scheduler_type": schedule, "warmup_steps": 2, "save_every": 3}
    run(tmp_path / "steps", max_steps=7, **how)
    result = run(tmp_path / "samples", max_samples=7 * PLAIN - 3, **how)
    assert result.exit_reason == "finished" and result.steps == 7
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("steps", "samples")]
    assert texts[0] == texts[1]
    assert [row["num_samples"] for row in rows(tmp_path / "samples")[1:]] == [PLAIN * n for n in range(1, 8)]
    states = [read_state(tmp_path / name / "checkpoints" / "step_000006") for name in ("steps", "samples")]
    assert equal(*(state["learner"] for state in states))
    config = json.loads((tmp_path / "samples" / "config.json").read_text())
    assert (config["max_steps"], config["max_samples"]) == (7, 7 * PLAIN - 3)


@pytest.mark.parametrize(("estimator", "budget"), [("remax", 100), (REFILLING, 170), ("dapo", 120)])
def test_every_completion_counts_and_rate_and_evaluations_follow_them(tmp_path, estimator, budget):
    reward = Counted()
    options = {"max_grad_norm": 0.0, "stop_after_zero_spread": 0, "max_refills": 2}
    result = run(tmp_path / "run", reward, estimator=estimator, max_samples=budget, **options)
    found = rows(tmp_path / "run")
    used = [0] + [row["num_samples"] for row in found[1:]]
    evaluated = [row["step"] for row in found if "eval_reward_greedy" in row]
    assert reward.seen - 2 * len(evaluated) == used[-1]  # two held-out prompts, greedy
    greedy = getattr(estimator, "needs_greedy", estimator == "remax")
    least = PLAIN + 4 * greedy
    refilled = sum(row.get("refilled", 0) for row in found)
    assert (refilled > 0) == (estimator != "remax") and used[-1] >= least * result.steps + refilled * 2
    assert used[-2] < budget <= used[-1] and result.exit_reason == "finished"
    assert result.steps < -(-budget // least) or not refilled
    length = -(-budget // least)
    for row, before in zip(found[1:], used, strict=False):
        assert row["learning_rate"] == pytest.approx(0.01 * max(0, 1 - before / least / length), rel=1e-9)
    passed = [n for n in range(1, len(used)) if used[n] // (3 * PLAIN) > used[n - 1] // (3 * PLAIN)]
    assert evaluated == sorted({0, *passed, result.steps})
    assert result.eval_after and json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] > 2


def test_estimators_are_evaluated_after_the_same_numbers_of_samples():
    def settings(estimator, **options):
        given = {k: v for k, v in QUICK.items() if k != "eval_every"} | {"max_samples": 960} | options
        return resolve(TrainArguments(**given, estimator=Estimator.preset(estimator)), make_task())

    rloo, remax = settings("rloo"), settings("remax")
    assert (rloo.max_steps, remax.max_steps) == (120, 80)
    assert rloo.eval_every == remax.eval_every == rloo.log_completions == 12
    assert plain_steps(remax) == 120
    assert settings("remax", max_samples=None, max_steps=50).eval_every == 5


def interrupted(folder, after, **how):
    """A finished run, as if it had been killed after a checkpoint."""
    run(folder, Counted(), **how)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name[-6:]) > after:
            shutil.rmtree(path)


def test_a_run_with_greedy_completions_and_refills_continues_bit_for_bit(tmp_path):
    how = {"estimator": REFILLING, "max_samples": 170, "save_every": 1, "keep_checkpoints": 99}
    how |= {"stop_after_zero_spread": 0, "warmup_steps": 1, "log_completions": 0}
    whole = run(tmp_path / "whole", Counted(), **how)
    interrupted(tmp_path / "part", 4, **how)
    again = run(tmp_path / "part", Counted(), **how, resume="auto")
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "part")]
    assert texts[0] == texts[1] and whole.steps == again.steps > 5
    last = f"step_{whole.steps:06d}"
    states = [read_state(tmp_path / name / "checkpoints" / last) for name in ("whole", "part")]
    assert equal(*(state["learner"] for state in states))


def test_a_run_that_has_used_its_budget_has_nothing_left_until_it_gets_more(tmp_path, capsys):
    how = {"estimator": REFILLING, "save_every": 1, "stop_after_zero_spread": 0}
    how |= {"lr_scheduler_type": "constant", "eval_every": 0, "log_completions": 0}
    first = run(tmp_path / "run", Counted(), **how, max_samples=90)
    same = run(tmp_path / "run", Counted(), **how, max_samples=90, resume="auto", quiet=False)
    assert "Nothing is left to do" in capsys.readouterr().out
    assert same.steps == first.steps < -(-90 // 12) and same.exit_reason == "finished"
    more = run(tmp_path / "run", Counted(), **how, max_samples=170, resume="auto")
    run(tmp_path / "whole", Counted(), **how, max_samples=170)
    assert more.steps > first.steps
    for row, expected in zip(rows(tmp_path / "run"), rows(tmp_path / "whole"), strict=True):
        evaluated = set(row.keys() ^ expected.keys())
        assert all(name.startswith("eval_") for name in evaluated)  # where the first part had ended
        assert all(row[name] == expected[name] for name in expected.keys() - evaluated)


def test_a_number_of_steps_beside_it_is_named_and_ignored(tmp_path, capsys):
    result = run(tmp_path / "run", max_steps=9, max_samples=2 * PLAIN, quiet=False)
    said = " ".join(capsys.readouterr().out.split())
    assert result.steps == 2 and "max_steps=9 has no effect, because max_samples=16 says" in said
    assert "2 steps (max_samples 16) x 4 prompts" in said
    result = run(tmp_path / "more", max_steps=2, max_samples=2 * PLAIN, quiet=False)
    assert result.steps == 2 and "has no effect" not in capsys.readouterr().out


def test_a_check_estimates_the_time_of_the_budget(tmp_path, capsys):
    run(tmp_path / "run", estimator="remax", max_samples=960, eval_every=12, check=True, quiet=False)
    assert "for 80 steps, 11 evaluations" in " ".join(capsys.readouterr().out.split())
