"""The two controls of a comparison: rewards that change places, and a search that learns nothing."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

import pytest
from refusals import refused
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
    runs = [
        letters_trained(tmp_path / str(number), task, seed=seed, control_arm="random", **SHAPE)
        for number, seed in enumerate((5, 5, 6))
    ]
    moved = []
    for rows in tables(runs[0]):
        own = [row["reward"] for row in rows]
        credited = [row["advantage"] for row in rows]
        missing = [reward is None for reward in own]
        assert any(missing) and [
            credit for credit, no in zip(credited, missing, strict=True) if no
        ] == [0.0] * sum(missing)
        pairs = [
            pair
            for pair, no in zip(zip(own, credited, strict=True), missing, strict=True)
            if not no
        ]
        assert Counter(a for a, _ in pairs) == Counter(b for _, b in pairs)
        moved += [a != b for a, b in pairs]
    assert fmean(moved) > 0.5
    assert runs[0].metrics == runs[1].metrics != runs[2].metrics
    usual = letters_trained(tmp_path / "usual", task, seed=5, **SHAPE)
    assert usual.metrics[0] == runs[0].metrics[0], "evaluations have the true rewards"
    assert usual.metrics[1]["reward"] == pytest.approx(runs[0].metrics[1]["reward"])


def test_a_search_has_the_best_reward_of_each_held_out_prompt(tmp_path):
    """After two steps 8 of 10 held-out prompts have four samples, and after four steps all have some."""
    held_out = [{"prompt": f"{x}{y}{x}>"} for x in "abcd" for y in "abcd"][:10]
    task = letter_task(count_a, eval_prompts=held_out)
    run = letters_trained(tmp_path, task, control_arm="best_of_n", **SHAPE)
    before = run.metrics[0]["eval_reward"]
    assert apart(weights(run.policy.model), weights(letters()[0])) == 0
    best = {}
    for step, rows in enumerate(tables(run), 1):
        for row in rows:
            best.setdefault(row["prompt"], []).append(row["reward"] or -1)
        if step % 2 == 0:
            found = [max(best[prompt]) for prompt in best]
            others = len(held_out) - len(found)
            value = run.metrics[step]["eval_reward"] * len(held_out)
            rest = (value - sum(found)) / max(1, others)
            assert rest == pytest.approx(0) if not others else 0 < rest < fmean(found)
    assert {*best} == {row["prompt"] for row in held_out}
    assert run.metrics[4]["eval_reward"] > before + 0.5
    assert [row["num_samples"] for row in run.metrics[1:]] == [16, 32, 48, 64]


@pytest.mark.parametrize(
    "options", [{"estimator": "dapo"}, {"prompt_weights": "variance"}, {"reward": "none"}]
)
@pytest.mark.parametrize("control", ["random", "best_of_n"])
def test_a_control_needs_rewards_of_prompts_that_are_drawn_equally_often(
    tmp_path, options, control
):
    with refused("is for rewards of completions of one turn|With reward none"):
        letters_trained(tmp_path, letter_task(count_a), control_arm=control, **options)
