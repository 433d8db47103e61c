"""The toy tasks are learnt: what the README says of them, run in full. Slow."""

from __future__ import annotations

import pytest

import tokenrl
import toy_tasks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(3))
def test_the_default_task_is_learnt_from_a_base_that_cannot_do_it(seed, tmp_path):
    result = tokenrl.train(
        task="sort_digits", seed=seed, base_seed=seed, output_dir=tmp_path / "run", quiet=True
    )
    before, after = result.eval_before, result.eval_after
    assert before["reward_greedy"] <= 0.25 and before["reward"] <= 0.35
    assert after["reward_greedy"] >= 0.95 and after["reward"] >= 0.9


OTHERS = [(name, 0) for name in toy_tasks.NAMES if name != "sort_digits"]


@pytest.mark.parametrize(("name", "seed"), [*OTHERS, ("guess_number", 1)])
def test_every_other_task_is_solved(name, seed, tmp_path):
    """Rounding of another machine changes a run as another seed does, so one seed alone says little."""
    task = toy_tasks.load(name)
    result = tokenrl.train(task=name, seed=seed, output_dir=tmp_path / "run", quiet=True)
    assert result.eval_before["reward_greedy"] < task.solved <= result.eval_after["reward_greedy"]


@pytest.mark.parametrize("preset", ["reinforce", "remax", "ppo", "dapo"])
def test_other_estimators_learn_the_default_task(preset, tmp_path):
    result = tokenrl.train(estimator=preset, output_dir=tmp_path / "run", quiet=True)
    assert result.eval_after["reward_greedy"] >= 0.95
