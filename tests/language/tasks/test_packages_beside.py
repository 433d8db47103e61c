"""Two packages beside: rewards with math-verify as they are published for TRL, and tasks of reasoning-gym."""

from __future__ import annotations

import re
import sys

import pytest
from refusals import refused

from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.task import load_task

QUESTION = [
    {"role": "system", "content": "Think."},
    {"role": "user", "content": "What is 1/2 + 1/4?"},
]


def accuracy_reward(completions, solution, **kwargs):
    """As users of TRL write it: None where the solution itself cannot be parsed."""
    math_verify = pytest.importorskip("math_verify")
    rewards = []
    for completion, gold_text in zip(completions, solution, strict=True):
        gold = math_verify.parse(gold_text)
        if not gold:
            rewards.append(None)
            continue
        rewards.append(float(math_verify.verify(gold, math_verify.parse(completion[0]["content"]))))
    return rewards


def format_reward(completions, **kwargs):
    pattern = re.compile(r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>", re.DOTALL)
    return [
        1.0 if pattern.fullmatch(completion[0]["content"]) else 0.0 for completion in completions
    ]


@pytest.mark.parametrize("timeout", [None, pytest.param(120.0, marks=pytest.mark.slow)])
def test_a_published_pair_of_rewards_works_without_change(timeout):
    pytest.importorskip("math_verify")
    form = "<think>\nhm\n</think>\n<answer>\n{}\n</answer>"
    texts = [form.format(r"$\frac{3}{4}$"), "$0.75$", form.format("$1$"), r"$\boxed{3/4}$", "$2$"]
    solution = [
        r"$\frac{3}{4}$",
        "$3/4$",
        r"$\frac{3}{4}$",
        r"\boxed{\frac{3}{4}}",
        "no mathematics here",
    ]
    rewards = Rewards([accuracy_reward, format_reward], [1.0, 0.5], timeout=timeout)
    rewards.check_columns(["prompt", "solution"])
    result = rewards([QUESTION] * 5, texts, [[1]] * 5, {"solution": solution})
    accuracy = [None if value != value else value for value in result.values[:, 0].tolist()]
    assert accuracy == [1, 1, 0, 1, None] and result.values[:, 1].tolist() == [1, 0, 1, 0, 0]
    assert result.total.tolist() == [1.5, 1, 0.5, 1, 0] and result.valid.all()


# ---- reasoning-gym ----


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
    with refused(words):
        load_task("reasoning_gym:" + spec)


def test_without_the_package_its_name_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with refused("pip install reasoning-gym"):
        load_task("reasoning_gym:leg_counting")
