"""Prompts that are given from Python: every form, what becomes of them, and the refusals."""

from __future__ import annotations

from collections import UserDict

import datasets
import pandas
import pytest
from folders import read_json
from refusals import refused

import tokenrl
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.records import fingerprint
from tokenrl.language.tasks.task import load_task
from toy_tasks.models import TinyModel

ROWS = [
    {"prompt": f"{x}{y}>", "answer": x, "marks": {"deep": [x, y]}} for x in "abcd" for y in "abcd"
]


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def exact(prompts, completions, answer, **columns):
    return [float(text[:1] == a) for text, a in zip(completions, answer, strict=True)]


def dataset(rows=ROWS):
    return datasets.Dataset.from_list(rows)


def tiny():
    return TinyModel(tuple("abcd>"), layers=1, hidden=16, heads=2, context=16)(0)


def start(tmp_path, **options):
    defaults = {"model": tiny(), "reward": exact, "output_dir": tmp_path / "run", "max_steps": 2}
    defaults |= {
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 3,
        "quiet": True,
    }
    return tokenrl.train(**(defaults | options))


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
        lambda rows: dataset([{**row, "prompt": ""} for row in rows]).with_transform(_restored),
    ],
)
def test_every_form_gives_the_same_disjoint_prompts(make):
    task = load_task(make(ROWS), reward=exact)
    assert task.train_prompts and task.eval_prompts
    rows = [*task.train_prompts, *task.eval_prompts]
    assert sorted(rows, key=lambda row: row["prompt"]) == ROWS
    assert task.name == "in-memory:" + fingerprint({"train": ROWS})


def _restored(batch):
    """A transform, which makes the prompt only when rows are read."""
    return batch | {"prompt": ["".join(m["deep"]) + ">" for m in batch["marks"]]}


def test_the_splits_of_a_dict_become_training_and_held_out_prompts():
    splits = {"train": dataset(), "validation": dataset(ROWS[:3]), "test": dataset(ROWS[:1])}
    task = load_task(datasets.DatasetDict(splits), reward=exact)
    assert [row["prompt"] for row in task.eval_prompts] == ["aa>", "ab>", "ac>"]
    assert [row["prompt"] for row in task.train_prompts] == [row["prompt"] for row in ROWS]
    assert task.origin["rows"] == {"train": 16, "validation": 3, "test": 1}


# ---- conversations ----


@pytest.mark.parametrize("make", [list, dataset])
def test_the_assistants_last_turn_is_the_answer_and_leaves_the_prompt(make):
    rows = [
        {"messages": chat(("system", "s"), ("user", f"u{i}"), ("assistant", f"a{i}"))}
        for i in range(4)
    ]
    task = load_task(make(rows), reward=exact, eval_size=1)
    for row in [*task.train_prompts, *task.eval_prompts]:
        number = row["prompt"][1]["content"][1:]
        assert row["prompt"] == chat(("system", "s"), ("user", "u" + number))
        assert row["answer"] == row["completion"] == "a" + number
        assert row["messages"][-1]["content"] == "a" + number


def test_an_own_answer_is_kept_and_a_question_alone_is_the_whole_prompt():
    rows = [
        {"messages": chat(("user", f"u{i}"), ("assistant", "long")), "answer": str(i)}
        for i in range(4)
    ]
    for row in load_task(rows, reward=exact).eval_prompts:
        assert row["answer"] == row["prompt"][0]["content"][1]
    rows = [{"messages": chat(("user", f"u{i}"))} for i in range(4)]
    for row in load_task(rows, reward=exact).train_prompts:
        assert row["prompt"] == row["messages"] and "answer" not in row


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (chat(("user", "u")), r"row 0 end with a turn of the assistant.* row 2 do not"),
        (chat(("assistant", "a")), "row 2: the prompt is an empty list"),
        (None, "row 2: of the column 'messages', the prompt is None"),
        ("text", "row 2: of the column 'messages', it is text"),
        ([{"role": "user", "content": ["u"]}], "message 0 of the prompt has content"),
    ],
)
def test_conversations_that_cannot_be_used_are_refused_with_their_row(messages, words):
    good = [{"messages": chat(("user", f"u{i}"), ("assistant", "a"))} for i in range(2)]
    with refused(words):
        load_task([*good, {"messages": messages}], reward=exact)


# ---- refusals ----


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "'train' is empty: give at least one row, such as"),
        ({}, "no split 'train'"),
        (datasets.DatasetDict(test=dataset()), "no split 'train'.* Available: test"),
        (
            dataset([{"question": "a"}]),
            r"no column 'prompt'.*question.*prompt_template.*--prompt-template",
        ),
        (dataset([{"prompt": "a"}, {"prompt": None}]), r"row 1: the prompt is None"),
        (["a", "b"], r"row 0 is 'a' \(str\); a row is a dict. Of texts write task=\[\{"),
        ({"prompt": ["a", "b"], "answer": ["x", "y"]}, r"key 'prompt'.* task=\[row\].*from_dict"),
        (dataset().to_iterable_dataset(), r"IterableDataset.*from_list\(list\(data.take\(N\)\)\)"),
        (
            (row for row in ROWS),
            r"\(generator\); it must be a name, a task object, a datasets.Dataset",
        ),
        (5, r"task is 5 \(int\)"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_paragraph(data, words):
    with refused(words):
        load_task(data, reward=exact)


def test_data_without_a_reward_or_with_the_wrong_columns_for_it_is_refused(tmp_path):
    with refused("task is None"):
        start(tmp_path, task=None)
    assert not (tmp_path / "run" / "config.json").exists()
    with refused(r"The task 'in-memory:.*' has no reward.*reward=function"):
        start(tmp_path, task=dataset(), reward=())
    with refused("'answer'"):
        start(tmp_path, task=dataset().remove_columns("answer"))


# ---- fingerprints ----


def test_the_fingerprint_is_that_of_the_rows_not_of_the_object_that_holds_them():
    same = {fingerprint(memory_splits(data)) for data in (ROWS, dataset(), {"train": tuple(ROWS)})}
    assert len(same) == 1
    others = [
        ROWS[:-1],
        ROWS[::-1],
        [{**row, "answer": "z"} for row in ROWS],
        {"train": ROWS, "test": ROWS},
    ]
    others += [{"train": ROWS[:n], "test": ROWS[n:]} for n in (2, 3)]
    assert len({*same, *(fingerprint(memory_splits(data)) for data in others)}) == 7


# ---- whole runs ----


def test_a_run_on_a_dataset_trains_and_its_columns_reach_the_reward_as_lists(tmp_path, refusal):
    triples = []

    def reward(prompts, completions, answer, marks, **columns):
        triples.extend(zip(prompts, answer, marks, strict=True))
        return exact(prompts, completions, answer)

    result = start(
        tmp_path, task=datasets.DatasetDict(train=dataset(), test=dataset(ROWS[:4])), reward=reward
    )
    assert result.steps == 2 and 0 <= result.eval_after["reward_greedy"] <= 1
    assert len(triples) > 32
    for prompt, answer, marks in triples:
        assert {"prompt": prompt, "answer": answer, "marks": marks} in ROWS
    config = read_json(tmp_path / "run" / "config.json")
    digits = fingerprint({"train": ROWS, "test": ROWS[:4]})
    assert config["task_rows"]["rows"] == {"train": 16, "test": 4}
    assert config["task_rows"]["columns"] == ["prompt", "answer", "marks"]
    assert config["task"] == "in-memory:" + digits and digits in config["title"]
    assert config["command"] == ""  # no command can name the rows and the model
    message = refusal("train --config", str(tmp_path / "run"))
    assert f"in-memory:{digits}' was data given from Python" in message
    assert "to_parquet('data.parquet')" in message


def test_the_users_rows_are_copied_not_changed():
    rows = [dict(row) for row in ROWS]
    for row in load_task(rows, reward=exact).train_prompts:
        row["prompt"] = "spoilt"
    assert rows == ROWS
