"""Tasks of reasoning-gym: the package itself where it is installed, and refusals."""

from __future__ import annotations

import sys

import pytest
from refusals import refused

from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.task import load_task


def test_a_puzzle_is_a_task_with_its_own_score():
    gym = pytest.importorskip("reasoning_gym")
    spec = "reasoning_gym:basic_arithmetic(size=20, seed={}, max_digits=1)"
    task, again, other = (load_task(spec.format(seed), eval_size=6) for seed in (3, 3, 5))
    far = gym.create_dataset("basic_arithmetic", size=6, seed=3 + 2**31, max_digits=1)
    assert [row["prompt"] for row in task.eval_prompts] == [entry["question"] for entry in far]
    assert again.train_prompts == task.train_prompts != other.train_prompts
    row = task.train_prompts[0]
    rewards = Rewards(task.reward)
    rewards.check_columns(row)
    right = row["answer"]
    texts = [right, f"I think <answer> {right}\n</answer> done", "x", "<answer>x</answer> 1"]
    columns = {"entry": [row["entry"]] * 4, "answer": [right] * 4}
    scores = rewards([row["prompt"]] * 4, texts, [[1]] * 4, columns).total
    assert scores[:2].tolist() == [1, 1] and scores[2:].max() < 0.1


def test_a_data_set_of_puzzles_is_data_beside_a_reward_of_the_users():
    gym = pytest.importorskip("reasoning_gym")
    data = gym.create_dataset("leg_counting", size=12, seed=1)
    task = load_task(data, reward=len, prompt_column="question", eval_size=3)
    rows = [*task.train_prompts, *task.eval_prompts]
    assert sorted(row["question"] for row in rows) == sorted(entry["question"] for entry in data)
    assert all(row["prompt"] == row["question"] and row["metadata"]["animals"] for row in rows)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("leg_countin", "no puzzle 'leg_countin'.*Did you mean 'leg_counting'"),
        ("leg_counting(sizes=3)", "leg_counting refuses these options .*sizes.* It takes .*size"),
        ("leg_counting(size=print(1))", "cannot be read"),
        (None, "pip install reasoning-gym"),
    ],
)
def test_a_puzzle_that_there_is_not_is_refused(spec, words, monkeypatch):
    if spec is None:
        for module in ("reasoning_gym", "reasoning_gym.factory"):
            monkeypatch.setitem(sys.modules, module, None)
    else:
        pytest.importorskip("reasoning_gym")
    with refused(words):
        load_task(f"reasoning_gym:{spec}")
