"""`sync_every`: training samples from weights of earlier steps, evaluations from the present ones."""

import pytest
from tiny_models import make_policy, make_task

from tokenrl import evaluate, train
from tokenrl.runs.metrics import read_metrics

SIZES = {"prompts_per_step": 4, "num_generations": 2, "max_completion_length": 5, "seed": 2}
SIZES |= {"learning_rate": 3e-3, "eval_every": 0, "eval_generations": 1, "cpu": True, "quiet": True}


def trained(folder, **options):
    options = SIZES | {"model": make_policy(), "task": make_task(), "max_steps": 5} | options
    result = train(output_dir=folder, **options)
    return result, read_metrics(folder / "metrics.jsonl")


def gaps(rows):
    return [row["sampling/logp_difference/mean"] for row in rows if row["step"]]


def test_each_third_step_samples_from_the_present_weights(tmp_path):
    run, rows = trained(tmp_path / "lagged", sync_every=3, estimator="rloo,importance=sequence")
    for step, gap in enumerate(gaps(rows), start=1):
        assert (gap < 1e-6) == (step % 3 == 1), step
    _, present = trained(tmp_path / "present", max_steps=2)
    assert max(gaps(present)) < 1e-6 and rows[2] != present[2]
    # of the last weights, whatever the copy holds
    final = evaluate(model=tmp_path / "lagged", task=make_task(), num_generations=1, seed=2)
    assert final.metrics["reward"] == pytest.approx(run.eval_after["reward"])
