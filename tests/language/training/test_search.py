"""The best completions of a run, and the end of a run that has reached a reward."""

from __future__ import annotations

import pytest
from folders import read_json
from tiny_models import letter_task, letters_trained

from tests.runs.pages import Page
from tokenrl.runs.metrics import read_completions

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
