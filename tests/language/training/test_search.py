"""The best completions of a run, and the end of a run that has reached a reward."""

from __future__ import annotations

import pytest
from folders import read_json
from refusals import refused
from tiny_models import letter_task, letters_trained

from tests.runs.pages import Page
from tokenrl.core import Estimator
from tokenrl.lab.compare.equality import check_equal
from tokenrl.runs.metrics import read_completions
from tokenrl.runs.reader import read_run

PROMPTS = ["ab>", "cd>", "bd>"]


def graded(completions, **_):
    """The more letters differ, the better; texts with two c have none."""
    return [
        None if text.count("c") > 1 else len({*text}) + text.count("a") / 8 for text in completions
    ]


def trained(folder, reward=graded, **options):
    task = letter_task(reward, PROMPTS, eval_prompts=[{"prompt": "ab>"}])
    settings = {"max_steps": 6, "prompts_per_step": 2, "log_completions": 1, "eval_generations": 0}
    return letters_trained(folder, task, **(settings | options))


def sampled(run):
    """The new completions of a run in the order in which they were sampled, from its tables."""
    rows = []
    for step in range(1, run.steps + 1):
        table = read_completions(run.output_dir / "completions" / f"step_{step:06d}.parquet")
        rows += [row | {"step": step} for row in table if not row.get("replayed")]
    return rows


@pytest.mark.parametrize("options", [{}, {"replay": 2}, {"estimator": "remax"}], ids=str)
def test_the_ten_best_distinct_completions_are_kept_with_their_first_step(tmp_path, options):
    run = trained(tmp_path, **options)
    best = {}
    for row in sampled(run):
        text = row["prompt"], row["completion"]
        if row["reward"] is not None and row["reward"] > best.get(text, (-9.0,))[0]:
            best[text] = row["reward"], row["step"]
    ranked = sorted(best.items(), key=lambda item: (-item[1][0], item[1][1]))[:10]
    kept = [
        ((row["prompt"], row["completion"]), (row["reward"], row["step"]))
        for row in run.best_completions
    ]
    assert kept == ranked and len({text for text, _ in kept}) == 10
    assert read_json(tmp_path / "summary.json")["best_completions"] == run.best_completions
    page = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    (prompt, text), (reward, step) = kept[0]
    assert f"rewardsteppromptcompletion {reward:.4g}{step}{prompt}{text}" in page


@pytest.mark.parametrize("options", [{}, {"replay": 2}], ids=str)
def test_a_run_ends_solved_after_the_step_in_which_a_new_completion_has_the_reward(
    tmp_path, options
):
    """Also if it was continued in between: in the order of sampling, those before it and itself are counted."""
    whole = trained(tmp_path / "whole", **options)
    rows = sampled(whole)
    goal = next(row["reward"] for row in whole.best_completions if row["step"] > 2)
    first = next(i for i, row in enumerate(rows) if (row["reward"] or 0) >= goal)
    assert rows[first]["step"] > 2 and whole.completions_until_solved is None
    run = trained(tmp_path / "run", stop_at_reward=goal, **options)
    ended = run.exit_reason, run.exit_code, run.steps, run.completions_until_solved
    assert ended == ("solved", 0, rows[first]["step"], first + 1)
    assert run.reason == f"after {first + 1} completions" and "nothing-learnt" not in run.flags
    trained(tmp_path / "again", stop_at_reward=goal, max_steps=2, **options)
    again = trained(tmp_path / "again", stop_at_reward=goal, resume="auto", **options)
    summary, same = (read_json(tmp_path / name / "summary.json") for name in ("run", "again"))
    for name in ("exit_reason", "steps", "completions_until_solved", "best_completions", "reason"):
        assert summary[name] == same[name]
    more = trained(tmp_path / "again", stop_at_reward=goal, resume="auto", max_steps=9, **options)
    assert (more.steps, more.exit_reason) == (again.steps, "solved")
    with refused("so its held-out rewards are those of that moment"):
        check_equal([("a", read_run(tmp_path / "run"))])


def test_the_reward_that_ends_a_run_is_in_its_header_and_goes_with_no_refills(tmp_path, said):
    trained(tmp_path, stop_at_reward=2, quiet=False)
    assert "once a completion has a reward of at least 2" in said()
    with refused("perhaps the first that reached it"):
        trained(tmp_path, stop_at_reward=2, estimator=Estimator(zero_spread="refill"))
