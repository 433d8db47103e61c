"""Which rows are trained on and which are held out: none is lost, and a run says how many of either."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from types import ModuleType

import pytest
from hypothesis import given, settings, strategies as st

from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.sources import TaskArguments
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


# ---- no row is lost ----


def pay(completions, **columns):
    return [0.0] * len(completions)


def loaded(data, **options):
    task = load_task(data, reward=pay, **options)
    return list(task.train_prompts), list(task.eval_prompts)


def numbered(names):
    return [{"prompt": name, "number": number} for number, name in enumerate(names)]


ROW_LISTS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=2, max_size=30)


@given(ROW_LISTS, st.lists(st.sampled_from("abcxyz"), max_size=30), st.none() | st.integers(1, 40))
@settings(max_examples=60)
def test_no_row_is_lost_between_the_splits_and_what_is_trained_and_evaluated_on(names, held, size):
    rows, test = numbered(names), numbered(held)
    train, evaluation = loaded({"train": rows, "test": test} if test else rows, eval_size=size)
    if test:
        assert train == rows and len(evaluation) == min(len(test), size or 128)
        assert [row for row in test if row in evaluation] == evaluation
        return
    assert sorted((*train, *evaluation), key=lambda row: row["number"]) == rows
    assert train and evaluation
    one_prompt = len(set(names)) == 1
    assert one_prompt or not set(prompts(train)) & set(prompts(evaluation))
    most = max(1, min(size or 128, len(rows) // (2 if size else 5)))
    assert len(evaluation) <= max(most, 0 if one_prompt else min(Counter(names).values()))


class Dice:
    """Draws its own randomness, so that equal rows are fair."""

    def reset(self, **row):
        return "roll"

    def step(self, text):
        return "", 1.0, True, False, {}


EQUAL = {"prompt": "Play."}


@pytest.mark.parametrize(
    ("rows", "environment", "held_out"),
    [
        ([EQUAL | {"secret": i} for i in range(50)], None, 10),
        ([EQUAL] * 50, Dice, 10),
        ([EQUAL | {"secret": [i % 25]} for i in range(50)], None, 10),
        ([{"prompt": "ab"[i % 2], "secret": i} for i in range(50)], None, 25),
    ],
)
def test_rows_of_few_prompts_are_told_apart_by_all_that_rewards_and_environments_see(
    rows, environment, held_out
):
    train, evaluation = loaded(rows, environment=environment)
    assert (len(train), len(evaluation)) == (50 - held_out, held_out)
    assert rows == [EQUAL] * 50 or not [row for row in evaluation if row in train]
    assert len(set(prompts(rows))) == 1 or not set(prompts(train)) & set(prompts(evaluation))


# ---- what a run says ----

MIXED = numbered([f"p{i % 30}" for i in range(300)])


@pytest.mark.parametrize(
    ("data", "size", "line", "warning"),
    [
        (MIXED, None, "240 rows of 24 prompts to train on, 60 rows of 6 prompts held out, as", ""),
        (
            {"train": numbered(map(str, range(40))), "test": numbered(map(str, range(2, 40)))},
            None,
            "40 rows of 40 prompts to train on, 38 rows of 38 prompts held out",
            "38 of the 38 held-out rows are of prompts that are trained on too.*eval_split",
        ),
        (
            numbered(map(str, range(301))),
            5000,
            "151 rows of 151 prompts",
            "eval_size was given as 5,000, but 150 rows are held out: .*at most half",
        ),
        (
            {"train": MIXED, "test": numbered(map(str, range(7)))},
            8,
            "300 rows of 30 prompts",
            "eval_size was given as 8, but 7 rows are held out: there are no more",
        ),
        (
            MIXED,
            5,
            "290 rows of 29 prompts",
            "given as 5, but 10 rows .* all rows of a prompt together",
        ),
    ],
)
def test_a_line_counts_rows_and_prompts_and_a_warning_tells_of_overlap(data, size, line, warning):
    task = load_task(data, reward=pay, eval_size=size)
    text, warnings = division_of(task, size)
    assert text.startswith(line) and re.search(warning or "^$", " ".join(warnings))
