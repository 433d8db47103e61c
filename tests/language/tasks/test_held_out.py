"""Which rows are trained on and which are held out: none is lost, and a run says how many of either."""

from __future__ import annotations

import json
import random
import re
import sys
from hashlib import sha256
from types import ModuleType

import datasets
import pytest
from hypothesis import given, settings, strategies as st

from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.stream import few_prompts
from tokenrl.language.tasks.task import PromptTask, find_task, load_task


class Coins:
    """Puzzles as most generators of reasoning-gym make them: item i depends on seed + i alone."""

    def __init__(self, seed=0, size=500):
        self.seed, self.size = seed, size

    def __iter__(self):
        for i in range(self.seed, self.seed + self.size):
            yield {"question": f"{i}?", "answer": str(random.Random(i).randrange(9))}


@pytest.fixture
def gym(monkeypatch):
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    package.create_dataset = lambda name, **options: Coins(**options)
    factory.DATASETS = {"coins": (Coins, None)}
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def prompts(rows):
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("size", "seed", "held_out"), [(64, 0, None), (500, 0, 400), (8, 2**30 - 1, None)]
)
def test_training_loses_no_puzzle_to_the_held_out_ones(gym, size, seed, held_out):
    task = load_task(f"reasoning_gym:coins(size={size}, seed={seed})", eval_size=held_out)
    trained = {*prompts(task.train_prompts)}
    assert len(trained) == len(task.train_prompts) == size
    assert not trained & {*prompts(task.eval_prompts)} and task.pass_threshold == 1.0


def pay(completions, **columns):
    return [0.0] * len(completions)


def own_task():
    rows = [{"prompt": str(i)} for i in range(40)]
    return PromptTask("own", rows[:20], rows[20:], pay, 4)


@pytest.mark.parametrize("task", ["sort_digits", "reasoning_gym:coins", own_task()])
def test_the_number_of_held_out_prompts_can_be_set(gym, task):
    whole, few, many = (
        find_task(TaskArguments(task=task, eval_size=size))[0] for size in (None, 5, 200)
    )
    assert len(few.eval_prompts) == 5 < len(whole.eval_prompts)
    assert few.train_prompts == whole.train_prompts
    assert isinstance(task, str) or len(task.eval_prompts) == 20  # the user's object is not changed
    if task == "reasoning_gym:coins":  # which draws as many as are asked for
        assert len(many.eval_prompts) == 200
    else:
        assert {*prompts(few.eval_prompts)} < {*prompts(whole.eval_prompts)}


# ---- no row is lost ----


def loaded(data, **options):
    task = load_task(data, reward=pay, **options)
    return list(task.train_prompts), list(task.eval_prompts)


def numbered(names):
    return [{"prompt": name, "number": number} for number, name in enumerate(names)]


ROW_LISTS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=2, max_size=30)


@given(ROW_LISTS, st.lists(st.sampled_from("abcxyz"), max_size=30), st.none() | st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_no_row_is_lost_between_the_splits_and_what_is_trained_and_evaluated_on(names, held, size):
    rows, test = numbered(names), numbered(held)
    train, evaluation = loaded({"train": rows, "test": test} if test else rows, eval_size=size)
    if test:
        assert train == rows and len(evaluation) == min(len(test), size or 128)
        assert [row for row in test if row in evaluation] == evaluation
        return
    held_out = loaded(rows)[1]  # of at most 30 rows all are evaluated
    assert sorted((*train, *held_out), key=lambda row: row["number"]) == rows
    assert train and held_out[:size] == evaluation
    assert len(rows) / 10 <= len(held_out) <= max(1, 0.4 * len(rows), 2 * (len(rows) < 6))


PROMPTS = [{"prompt": f"{i * i} + {i} ="} for i in range(300)]


@given(st.permutations(range(300)), st.integers(60, 300), st.integers(1, 99))
@settings(max_examples=20, deadline=None)
def test_a_hash_of_the_prompt_alone_holds_it_out(order, count, size):
    """Neither order nor size nor rows that are added nor the form of a chat changes its side."""
    rule = set(prompts(loaded(PROMPTS, eval_size=300)[1]))
    assert 30 < len(rule) < 90
    rows = [PROMPTS[i] for i in order[:count]]
    train, evaluation = loaded(rows, eval_size=size)
    assert not rule & {*prompts(train)} and {*prompts(evaluation)} <= rule
    assert len(evaluation) == min(size, count - len(train))
    chat = loaded(rows, eval_size=size, chat=True)[1]
    assert [row["prompt"][0]["content"] for row in chat] == prompts(evaluation)
    demonstrated, _ = find_task(TaskArguments(task=rows), whole=True)  # as tokenrl sft reads it
    assert demonstrated.train_prompts == train


@pytest.mark.parametrize(
    ("prompts", "digest"), [(997, "f3d30409a3c9"), (60, "8e6f9869e994"), (2, "e8727151bed3")]
)
def test_every_row_stays_on_its_side_in_every_version(prompts, digest):
    """The digests are of what was divided by the texts of prompts and rows themselves."""
    parts = loaded(numbered(str(i % prompts) for i in range(997)))
    assert sha256(json.dumps(parts).encode()).hexdigest()[:12] == digest


def test_of_many_rows_two_thousand_are_held_out():
    train, held_out = loaded([{"prompt": str(i)} for i in range(30_000)], eval_size=30_000)
    assert 1_800 < len(held_out) < 2_200 and len(train) + len(held_out) == 30_000


EQUAL = {"prompt": "Play."}


@pytest.mark.parametrize(
    "rows",
    [
        [EQUAL | {"secret": i} for i in range(1000)],
        [*([EQUAL] * 999), {"prompt": "stray"}],
        [{"prompt": "ab"[i % 2], "secret": i} for i in range(1000)],
        [{"prompt": "ab"[i % 2]} for i in range(1000)],
    ],
)
def test_single_rows_are_held_out_where_a_few_prompts_have_most_of_them(rows):
    task = load_task(rows, reward=pay)
    assert 100 <= 1000 - len(task.train_prompts) <= 400 and len(task.eval_prompts) == 128
    line, warnings = division_of(task, None)
    assert re.search(r"held out of \d+ \(single rows, by their hash, as a few prompts", line)
    assert not warnings


def test_equal_rows_of_few_prompts_stay_together():
    train, held_out = loaded([EQUAL | {"secret": [i % 25]} for i in range(50)])
    assert 5 <= len(held_out) <= 20 and not [row for row in held_out if row in train]


@pytest.mark.parametrize("rows", [[EQUAL], [EQUAL] * 50, datasets.Dataset.from_list([EQUAL] * 3)])
def test_of_one_prompt_evaluations_sample_new_completions(rows):
    task = load_task(rows, reward=pay)
    assert task.train_prompts == [EQUAL] * len(rows) and task.eval_prompts == [EQUAL] * 64
    line, warnings = division_of(task, None)
    assert line.endswith("so evaluations sample new completions of the same prompt)")
    assert not warnings and not few_prompts(task.train_prompts)
    assert len(load_task(rows, reward=pay, eval_size=9).eval_prompts) == 9


# ---- what a run says ----

MIXED = numbered([f"p{i % 30}" for i in range(300)])


@pytest.mark.parametrize(
    ("data", "size", "line", "warning"),
    [
        (
            MIXED,
            None,
            r"2\d\d rows of 2\d prompts to train on, \d+ rows of \d prompts held out \(w",
            "",
        ),
        (
            {"train": numbered(map(str, range(40))), "test": numbered(map(str, range(2, 50)))},
            None,
            "40 rows of 40 prompts to train on, 48 rows of 48 prompts held out$",
            "38 of the 48 held-out rows have prompts that are among the rows to train on, .*eval_split",
        ),
        (
            numbered(map(str, range(301))),
            5000,
            "2.. rows of 2.. prompts",
            "eval_size was given as 5,000, but [4-7]. rows are held out: a fifth of the data",
        ),
        (
            {"train": MIXED, "test": numbered(map(str, range(7)))},
            8,
            "300 rows of 30 prompts",
            "eval_size was given as 8, but 7 rows are held out: there are no more",
        ),
        (MIXED, 5, r"2.* 5 rows of \d prompts held out of \d+ \(whole", ""),
    ],
)
def test_a_line_counts_rows_and_prompts_and_a_warning_tells_of_overlap(data, size, line, warning):
    task = load_task(data, reward=pay, eval_size=size)
    text, warnings = division_of(task, size)
    assert re.match(line, text) and re.search(warning or "^$", " ".join(warnings))
