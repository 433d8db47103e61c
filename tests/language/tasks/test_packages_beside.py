"""Tasks of the package reasoning-gym, which is beside this one."""

from __future__ import annotations

import sys

import pytest

from tokenrl.errors import Refused
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.task import load_task


def test_a_puzzle_is_a_task_with_its_own_score():
    gym = pytest.importorskip("reasoning_gym")
    task = load_task("reasoning_gym:basic_arithmetic(size=20, seed=3, max_digits=1)", eval_size=6)
    far = gym.create_dataset("basic_arithmetic", size=6, seed=3 + 2**31, max_digits=1)
    assert [row["prompt"] for row in task.eval_prompts] == [entry["question"] for entry in far]
    assert 0 < len(task.train_prompts) <= 20 and len(task.eval_prompts) == 6
    again = load_task("reasoning_gym:basic_arithmetic(size=20, seed=3, max_digits=1)", eval_size=6)
    other = load_task("reasoning_gym:basic_arithmetic(size=20, seed=5, max_digits=1)", eval_size=6)
    assert again.train_prompts == task.train_prompts and other.train_prompts != task.train_prompts
    row = task.train_prompts[0]
    rewards = Rewards(task.reward)
    rewards.check_columns(row)
    texts = [
        row["answer"],
        f"I think <answer> {row['answer']}\n</answer> done",
        "x",
        "<answer>x</answer> 1",
    ]
    columns = {"entry": [row["entry"]] * 4, "answer": [row["answer"]] * 4}
    scores = rewards([row["prompt"]] * 4, texts, [[1]] * 4, columns).total
    assert scores[:2].tolist() == [1, 1] and scores[2:].max() < 0.1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("leg_countin", "no puzzle 'leg_countin'.*Did you mean 'leg_counting'"),
        ("leg_counting(sizes=3)", "leg_counting refuses these options .*sizes.* It takes .*size"),
        ("leg_counting(min_animals=0)", "leg_counting refuses these options"),
        ("leg_counting(size=print(1))", "cannot be read"),
    ],
)
def test_a_puzzle_that_there_is_not_is_refused(spec, words):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(Refused, match=words) as caught:
        load_task("reasoning_gym:" + spec)
    assert "\n" not in str(caught.value)


def test_without_the_package_its_name_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(Refused, match="pip install reasoning-gym"):
        load_task("reasoning_gym:leg_counting")
