"""How many prompts are held out, and that puzzles made by program share none with the training set."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from tokenrl.errors import Refused
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.stream import few_prompts
from tokenrl.language.tasks.task import PromptTask, find_task, load_task


@dataclass
class CoinConfig:
    seed: int = 0
    size: int = 500
    sides: int = 1000


class Coins:
    """Puzzles as most generators of reasoning-gym make them: item i depends on seed + i alone."""

    def __init__(self, seed=0, size=500, sides=1000):
        self.seed, self.size, self.sides = seed, size, sides

    def __iter__(self):
        for i in range(self.size):
            number = random.Random(self.seed + i).randrange(self.sides)
            yield {
                "question": f"{self.seed + i if self.sides == 1000 else number}?",
                "answer": str(number),
            }

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


@pytest.fixture
def gym(monkeypatch):
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    package.create_dataset = lambda name, **options: Coins(**options)
    factory.DATASETS = {"coins": (Coins, CoinConfig)}
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def prompts(rows):
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("options", "held_out"),
    [("size=64", None), ("size=500", 400), ("size=8, seed=1073741823", None)],
)
def test_training_loses_no_puzzle_to_the_held_out_ones(gym, options, held_out):
    task = load_task(f"reasoning_gym:coins({options})", eval_size=held_out)
    size = int(options.partition("size=")[2].partition(",")[0])
    assert len(set(prompts(task.train_prompts))) == len(task.train_prompts) == size
    assert not set(prompts(task.train_prompts)) & set(prompts(task.eval_prompts))
    assert task.pass_threshold == 1.0


def test_questions_that_repeat_are_held_out_once_and_not_trained_on(gym):
    task = load_task("reasoning_gym:coins(size=64, sides=8)", eval_size=3)
    held = prompts(task.eval_prompts)
    assert len(held) == len(set(held)) <= 3 and not set(held) & set(prompts(task.train_prompts))
    (warning,) = few_prompts(task.train_prompts)
    assert f"only {len(set(prompts(task.train_prompts)))} distinct prompts" in warning
    with pytest.raises(
        Refused, match=r"too few distinct prompts: 8 to evaluate on, 0 training rows"
    ):
        load_task("reasoning_gym:coins(size=64, sides=8)")
    for option in ("size=1073741824", "seed=1073741824"):
        with pytest.raises(Refused, match=r"at most 1,073,741,823"):
            load_task(f"reasoning_gym:coins({option})")


def own_task():
    rows = [{"prompt": str(i)} for i in range(40)]
    return PromptTask("own", rows[:20], rows[20:], lambda completions: [0.0] * len(completions), 4)


@pytest.mark.parametrize("task", ["sort_digits", "sentiment", "reasoning_gym:coins", own_task()])
def test_the_number_of_held_out_prompts_can_be_set(gym, task):
    whole, _ = find_task(TaskArguments(task=task))
    few, _ = find_task(TaskArguments(task=task, eval_size=5))
    assert len(few.eval_prompts) == 5 < len(whole.eval_prompts)
    assert few.train_prompts == whole.train_prompts
    assert isinstance(task, str) or len(task.eval_prompts) == 20  # the user's object is not changed
    if task != "reasoning_gym:coins":  # which draws as many as are asked for
        assert set(prompts(few.eval_prompts)) < set(prompts(whole.eval_prompts))
    else:
        assert len(find_task(TaskArguments(task=task, eval_size=200))[0].eval_prompts) == 200


def test_a_warning_tells_of_few_prompts():
    rows = [{"prompt": str(i)} for i in range(13)]  # 16 less a fifth
    assert (len(few_prompts(rows)), len(few_prompts(rows[1:]))) == (0, 1)
    chat = [{"prompt": [{"role": "user", "content": "hello"}]}] * 30
    assert few_prompts(chat)[0].startswith("only 1 distinct prompt in 30 training rows")
