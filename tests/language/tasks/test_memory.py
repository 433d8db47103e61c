"""Prompts that are given from Python: every form, what becomes of them, and the refusals."""

from __future__ import annotations

from collections import UserDict

import datasets
import pandas
import pyarrow
import pytest
import torch
from folders import read_json
from refusals import refused
from tiny_models import letters_trained

from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.records import fingerprint
from tokenrl.language.tasks.task import load_task

ROWS = [
    {"prompt": f"{x}{y}>", "answer": x, "marks": {"deep": [x, y]}} for x in "abcd" for y in "abcd"
]


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def exact(prompts, completions, answer, **columns):
    return [float(text[:1] == a) for text, a in zip(completions, answer, strict=True)]


class Items:
    """Rows by their number, as datasets of torch and of reasoning-gym have them; iteration would not end."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return dict(self.rows[number % len(self.rows)])


def dataset(rows=ROWS):
    return datasets.Dataset.from_list(rows)


def start(tmp_path, task, **options):
    """A run of that model on these data, whose rewards compare the first letters."""
    return letters_trained(tmp_path / "run", task, **({"reward": exact} | options))


# ---- what is taken ----


@pytest.mark.parametrize(
    "make",
    [
        dataset,
        list,
        tuple,
        lambda rows: [UserDict(row) for row in rows],
        lambda rows: {"train": rows},
        pandas.DataFrame,
        lambda rows: {"train": pandas.DataFrame(rows).set_index("prompt")},
        lambda rows: datasets.DatasetDict(train=dataset(rows)),
        lambda rows: dataset(rows).with_format("numpy"),
        lambda rows: Items(rows),
        lambda rows: {"train": torch.utils.data.Subset(Items(rows), range(len(rows)))},
        lambda rows: dataset([{**row, "prompt": ""} for row in rows]).with_transform(_restored),
    ],
)
def test_every_form_gives_the_same_disjoint_prompts(make):
    source = make(ROWS)
    for _ in range(2):  # the user's rows are copied
        task = load_task(source, reward=exact)
        assert task.train_prompts and task.eval_prompts
        rows = [*task.train_prompts, *task.eval_prompts]
        assert sorted(rows, key=lambda row: row["prompt"]) == ROWS
        assert task.name == "in-memory:" + fingerprint({"train": ROWS})
        rows[0]["prompt"] = "spoilt"


def _restored(batch):
    """A transform, which makes the prompt only when rows are read."""
    return batch | {"prompt": ["".join(m["deep"]) + ">" for m in batch["marks"]]}


# ---- conversations ----


@pytest.mark.parametrize("make", [list, dataset])
@pytest.mark.parametrize("own", [{}, {"answer": "7"}])
def test_the_assistants_last_turn_is_the_answer_and_leaves_the_prompt(make, own):
    turns = ("system", "s"), ("user", "u"), ("assistant", "a")
    row = {"messages": chat(*turns), **own}
    task = load_task(make([row] * 4), reward=exact, eval_size=1)
    expected = {"completion": "a", "answer": "a", **row, "prompt": chat(*turns[:2])}
    assert all(row == expected for row in (*task.train_prompts, *task.eval_prompts))


def test_a_question_alone_is_the_whole_prompt():
    rows = [{"messages": chat(("user", f"u{i}"))} for i in range(4)]
    for row in load_task(rows, reward=exact).train_prompts:
        assert row["prompt"] == row["messages"] and "answer" not in row


# ---- refusals ----


class Broken(Items):
    def __getitem__(self, number):
        return {"prompt": 1 / (2 - number)}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Items([]), r"Items.* it must be .*an object with __len__ and __getitem__ whose items"),
        (range(3), r"range\(0, 3\) \(range\); it must be"),
        (pyarrow.table({"prompt": ["a"]}), r"of pyarrow table.to_pylist\(\)"),
        (Broken(ROWS), r"it raised ZeroDivisionError.* \(test_memory.py, line"),
    ],
)
def test_an_object_without_rows_as_its_items_is_refused(data, words):
    with refused(words):
        memory_splits(data)


# ---- fingerprints ----


def test_the_fingerprint_follows_rows_their_order_and_their_splits():
    others = [
        ROWS,
        ROWS[:-1],
        ROWS[::-1],
        [{**row, "answer": "z"} for row in ROWS],
        {"train": ROWS, "test": ROWS},
        *({"train": ROWS[:n], "test": ROWS[n:]} for n in (2, 3)),
    ]
    assert len({fingerprint(memory_splits(data)) for data in others}) == 7


# ---- whole runs ----


def test_a_run_on_a_dataset_trains_and_its_columns_reach_the_reward_as_lists(tmp_path, refusal):
    rewarded = []

    def reward(prompts, completions, answer, marks, **columns):
        names = "prompt", "answer", "marks"
        rewarded.extend(
            dict(zip(names, row, strict=True)) for row in zip(prompts, answer, marks, strict=True)
        )
        return exact(prompts, completions, answer)

    splits = {"train": dataset(), "validation": dataset(ROWS[:4]), "test": dataset(ROWS[:1])}
    result = start(tmp_path, datasets.DatasetDict(splits), reward=reward)
    assert result.steps == 3 and 0 <= result.eval_after["reward_greedy"] <= 1
    assert len(rewarded) > 32 and all(row in ROWS for row in rewarded)
    config = read_json(tmp_path / "run" / "config.json")
    digits = fingerprint({"train": ROWS, "validation": ROWS[:4], "test": ROWS[:1]})
    assert config["task_rows"]["rows"] == {"train": 16, "validation": 4, "test": 1}
    assert config["task_rows"]["columns"] == ["prompt", "answer", "marks"]
    assert config["task"] == "in-memory:" + digits and digits in config["title"]
    assert config["command"] == ""  # no command can name the rows and the model
    message = refusal("train --config", str(tmp_path / "run"))
    assert f"in-memory:{digits}' was data given from Python" in message
    assert "to_parquet('data.parquet')" in message
