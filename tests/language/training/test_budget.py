"""How many completions a run has generated, and how long it has still to go."""

from __future__ import annotations

from tiny_models import letter_task, letters_trained

from tokenrl.core import Estimator
from tokenrl.runs.metrics import read_metrics


class Counted:
    """A reward that counts the completions it sees; coarse, so that some groups have equal rewards."""

    __name__ = "counted"

    def __init__(self):
        self.completions = 0

    def __call__(self, completion_ids, **_):
        self.completions += len(completion_ids)
        return [float(sum(i % 3 == 0 for i in ids) > 1) for ids in completion_ids]


def test_every_completion_counts(tmp_path):
    reward = Counted()
    estimator = Estimator(baseline="remax", zero_spread="refill")
    options = {"eval_every": 3, "eval_generations": 0, "max_refills": 2, "max_steps": 6}
    letters_trained(tmp_path, letter_task(reward), estimator=estimator, **options)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    evaluated = 3 * 2  # two held-out prompts, greedy, in each evaluation
    assert reward.completions - evaluated == rows[-1]["num_samples"]
    refilled = sum(row.get("refilled", 0) for row in rows)
    assert rows[-1]["num_samples"] >= 6 * (4 * 4 + 4) + refilled > 6 * (4 * 4 + 4)
