"""What is no task, or holds a row that cannot be used: refused in one paragraph that names the row."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import datasets
import pandas
import pytest
from refusals import refused

from tokenrl.language.rewards.library import ExactMatch, NumericAnswer
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import PromptTask, find_task

GOOD = {"prompt": "\U0001f600", "answer": "a"}
USER = {"role": "user", "content": "u"}
DATA = [
    ([], "'train' is empty: give at least one row, such as"),
    ({}, "no split 'train'"),
    (datasets.DatasetDict(test=datasets.Dataset.from_list([GOOD])), "no split 'train'.* Available: test"),
    ([{"question": "a"}], r"no column 'prompt'.*question.*prompt_template.*--prompt-template"),
    (["a", "b"], r"row 0 is 'a' \(str\); a row is a dict. Of texts write task=\[\{"),
    ({"prompt": ["a"], "answer": ["x"]}, r"key 'prompt'.* task=\[row\].*from_dict"),
    (datasets.Dataset.from_list([GOOD]).to_iterable_dataset(), r"IterableDataset.*list\(data.take\(N"),
    ((row for row in [GOOD]), r"\(generator\); it must be a name, a task object, a datasets.Dataset"),
    (5, r"task is 5 \(int\)"),
    (None, "task is None"),
    (SimpleNamespace(train_prompts=[GOOD]), "is a SimpleNamespace without name, eval_prompts: m"),
    (PromptTask("a", 5, [GOOD]), "it raised TypeError: 'int' object is not iterable"),
    (PromptTask("a", ["b"], [GOOD]), r"train_prompts, row 0 is 'b' \(str\); a row is a dict"),
    (PromptTask("a", [GOOD], []), "eval_prompts is empty"),
    (PromptTask("a", [GOOD], [GOOD]), "has no reward.*reward=function"),
    (PromptTask("a", [GOOD], [GOOD], len, solved="0.9"), "solved is '0.9'; give a number, or None"),
    (lambda: 1 / 0, "task '<lambda>' was read: it raised ZeroDivisionError"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "words"), DATA)
def test_what_is_no_task_is_refused(task, words):
    with refused(words):
        find_task(TaskArguments(task=task))


ROWS = [
    ({"prompt": None}, "the prompt is None"),
    ({"prompt": float("nan")}, r"nan \(float\)"),
    ({"prompt": True}, r"True \(bool\)"),
    ({"prompt": []}, "an empty list"),
    ({"prompt": USER}, "dict"),
    ({"prompt": ["a"]}, r"message 0 of the prompt is 'a' \(str\)"),
    ({"prompt": [USER, {"role": "user"}]}, "message 1 of the prompt has content None"),
    ({"prompt": [{"content": "a"}]}, "message 0 of the prompt has role None"),
    ({"prompt": [USER | {"content": ["u"]}]}, "message 0 of the prompt has content"),
    ({"prompt": "a\ud800"}, r"the prompt holds '\\ud800', which UTF-8 cannot write"),
    ({"prompt": [USER | {"content": "\udcff"}]}, r"message 0 of the prompt has content '\\udcff'"),
    ({"answer": threading.Lock()}, "column 'answer' holds .* cannot be copied"),
    ({"answer": [{"k": (x for x in "ab")}]}, "column 'answer' holds .* cannot be copied"),
]
ANSWERS = [True, ["a"], {"a": 1}, b"7", pandas.Timestamp("2005-07-22")]
ROWS += [
    ({"answer": x}, "the answer in the column 'answer' is .*text or a number") for x in ANSWERS
]


@pytest.mark.parametrize(("row", "words"), ROWS)
@pytest.mark.parametrize("reward", [ExactMatch(), NumericAnswer()])
def test_a_row_that_cannot_be_used_is_refused_with_its_number_in_either_split(row, words, reward):
    splits = [GOOD], [GOOD, GOOD | row]
    for order in (splits, splits[::-1]):
        with refused(f"row 1: .*{words}"):
            find_task(TaskArguments(task=PromptTask("mine", *order, reward)))


CHATS = [
    ([USER], r"row 0 end with a turn of the assistant.* row 1 do not"),
    ([{"role": "assistant", "content": "a"}], "row 1: the prompt is an empty list"),
    (None, "row 1: of the column 'messages', the prompt is None"),
    ("text", "row 1: of the column 'messages', it is text"),
]


@pytest.mark.parametrize(("messages", "words"), CHATS)
def test_conversations_that_cannot_be_used_are_refused_with_their_row(messages, words):
    good = [USER, {"role": "assistant", "content": "a"}]
    with refused(words):
        find_task(TaskArguments(task=[{"messages": good}, {"messages": messages}], reward=(len,)))
