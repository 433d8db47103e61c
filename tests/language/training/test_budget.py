"""How many completions a run has generated, and how long it has still to go."""

from __future__ import annotations

import pytest
from tiny_models import PROMPTS, make_policy, make_task

import tokenrl
from tokenrl.core import Estimator
from tokenrl.runs.metrics import read_metrics

SETTINGS = {
    "prompts_per_step": 4,
    "num_generations": 2,
    "max_completion_length": 4,
    "learning_rate": 0.01,
    "eval_every": 3,
    "eval_generations": 0,
    "cpu": True,
    "threads": 1,
    "quiet": True,
}
LEAST = 4 * 2 + 4  # completions of a step with greedy completions
REFILLING = Estimator.preset("dapo", baseline="remax", overlong_buffer=0)


class Counted:
    """A reward that counts the completions it sees; coarse, so that some groups have equal rewards."""

    __name__ = "counted"

    def __init__(self):
        self.completions = 0

    def __call__(self, completion_ids, **_):
        self.completions += len(completion_ids)
        return [float(sum(i % 3 == 0 for i in ids) > 1) for ids in completion_ids]


@pytest.mark.parametrize("estimator", ["remax", REFILLING])
def test_every_completion_counts(tmp_path, estimator):
    reward = Counted()
    task = make_task([f"{word} {n}" for word in PROMPTS for n in ("one", "two", "ten")], reward)
    options = {"stop_after_zero_spread": 0, "max_refills": 2, "max_steps": 6, **SETTINGS}
    tokenrl.train(
        model=make_policy(), task=task, output_dir=tmp_path, estimator=estimator, **options
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    evaluations = sum("eval_reward_greedy" in row for row in rows)  # two held-out prompts, greedy
    assert evaluations == 3
    assert reward.completions - 2 * evaluations == rows[-1]["num_samples"]
    refilled = sum(row.get("refilled", 0) for row in rows)
    assert (refilled > 0) == (estimator != "remax")
    assert rows[-1]["num_samples"] >= LEAST * 6 + 2 * refilled
