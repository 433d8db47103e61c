"""The two controls of a comparison: rewards that change places, and a search that learns nothing."""

from __future__ import annotations

import pytest
from tiny_models import apart, letter_task, letters, letters_trained, weights

from tokenrl.runs.metrics import read_completions

SHAPE = {"max_steps": 4, "estimator": "reinforce", "log_completions": 1, "eval_every": 2}


def count_a(completions, **_):
    """The letters a, with a part that tells completions apart; none for those that begin with d."""
    return [None if text[:1] == "d" else text.count("a") + len(text) / 8 for text in completions]


def tables(run):
    folder = run.output_dir / "completions"
    return [read_completions(folder / f"step_{step:06d}.parquet") for step in range(1, 5)]


def test_rewards_change_places_among_those_that_are_there(tmp_path):
    """Without a baseline the advantage is the reward that a row is credited with; tables have its own."""
    task = letter_task(count_a)
    controls = ("random", "random", "none")
    runs = [
        letters_trained(tmp_path / str(number), task, seed=5, control_arm=control, **SHAPE)
        for number, control in enumerate(controls)
    ]
    for rows in tables(runs[0]):
        own = [row["reward"] for row in rows if row["reward"] is not None]
        credited = [row["advantage"] for row in rows if row["reward"] is not None]
        assert sorted(own) == sorted(credited) and own != credited
        assert {row["advantage"] for row in rows if row["reward"] is None} == {0}
    first, again, usual = (run.metrics for run in runs)
    assert first == again
    assert usual[0] == first[0], "evaluations have the true rewards"
    assert usual[1]["reward"] == pytest.approx(first[1]["reward"])


def test_a_search_has_the_best_reward_of_each_held_out_prompt(tmp_path):
    """After two steps 8 of 10 held-out prompts have four samples, and two have the mean of the policy."""
    held_out = [{"prompt": f"{x}{y}a>"} for x in "abcd" for y in "abcd"][:10]
    task = letter_task(count_a, eval_prompts=held_out)
    run = letters_trained(tmp_path, task, control_arm="best_of_n", **SHAPE)
    assert apart(weights(run.policy.model), weights(letters()[0])) == 0
    best = {}
    for step, rows in enumerate(tables(run), 1):
        for row in rows:
            best[row["prompt"]] = max(best.get(row["prompt"], -1), row["reward"] or -1)
        left = run.metrics[step].get("eval_reward", 1) * 10 - sum(best.values())
        assert step != 2 or (len(best) == 8 and 0 < left / 2 < max(best.values()))
    assert {*best} == {row["prompt"] for row in held_out} and left == pytest.approx(0)
    assert [row["num_samples"] for row in run.metrics[1:]] == [16, 32, 48, 64]
