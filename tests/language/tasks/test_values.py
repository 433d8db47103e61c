"""Values arrive as they were written: in every format, in tables of Arrow, and in fingerprints."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import datasets
import pandas
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tokenrl.errors import Refused
from tokenrl.language.preferences.pairs import load_pairs
from tokenrl.language.rewards.library import ExactMatch, NumericAnswer
from tokenrl.language.supervised.defaults import demonstrations
from tokenrl.language.tasks.records import fingerprint, remarks
from tokenrl.language.tasks.sources import TaskArguments, memory_splits, read_splits
from tokenrl.language.tasks.task import PromptTask, find_task

TEXTS = st.one_of(
    st.sampled_from(
        ["2005-07-22", "2005-07-22T10:00:00Z", "12:30", "007", "7.0", "1e5", "-0", "1_000"]
    ),
    st.sampled_from(
        ["NA", "None", "null", "nan", "inf", "true", "False", " 7", "\u0663", "a,b", 'a"b', "a\nb"]
    ),
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=5
    ),
)
NUMBERS = st.one_of(
    st.integers(), st.integers(2**60, 2**70), st.floats(allow_nan=False, allow_infinity=False)
)
SCALARS = st.one_of(TEXTS, NUMBERS, st.booleans(), st.none())
NESTED = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6
)


def table(values):
    """Rows of two columns with values each, the second one often absent."""
    row = st.fixed_dictionaries({"prompt": TEXTS, "answer": values}, optional={"notes": values})
    return st.lists(row, min_size=1, max_size=6)


def alike(rows):
    """The rows with None in the columns that they lack."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


EACH = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@EACH
@given(rows=table(NESTED), indent=st.sampled_from([None, 1]))
def test_json_gives_what_json_loads_gives(name, rows, indent):
    with open(name, "w", encoding="utf-8") as file:
        if name == "a.json":
            json.dump(rows, file, indent=indent)
        else:
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert repr(read_splits(name)["train"]) == repr(alike(rows))


@EACH
@given(
    columns=st.lists(
        st.one_of(st.just(TEXTS), st.just(NUMBERS), st.just(SCALARS)), min_size=2, max_size=3
    ),
    data=st.data(),
)
def test_each_cell_of_csv_is_a_number_that_is_written_so_or_the_text_that_stands_there(
    columns, data
):
    rows = data.draw(st.lists(st.tuples(*columns), min_size=1, max_size=6))
    names = [f"c{i}" for i in range(len(columns))]
    with open("a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [names, *(["" if v is None else str(v) for v in row] for row in rows)]
        )
    for name, cells in zip(names, zip(*rows, strict=True), strict=True):
        values = [row[name] for row in read_splits("a.csv")["train"]]
        assert [None if v is None else str(v) for v in values] == [
            None if c is None else str(c) for c in cells
        ]
        written = [c for c in cells if c is not None]
        if written and all(type(c) in (int, float) for c in written):
            assert values == list(cells)


TYPED = st.one_of(
    *(
        st.lists(st.none() | kind, min_size=1, max_size=6)
        for kind in (
            TEXTS,
            st.integers(-(2**62), 2**62),
            st.floats(allow_nan=False),
            st.booleans(),
            st.lists(TEXTS),
        )
    )
)


@EACH
@given(values=TYPED)
def test_parquet_and_datasets_give_the_values_of_their_columns(values):
    rows = [{"prompt": f"p{i}", "answer": value} for i, value in enumerate(values)]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet("a.parquet")
    assert read_splits("a.parquet")["train"] == memory_splits(data)["train"] == rows


def test_whole_numbers_with_holes_are_whole_after_pandas_too():
    frame = pandas.DataFrame(
        {"prompt": ["a", "b", "c"], "answer": [1, None, 3], "share": [1.0, None, 0.5]}
    )
    frame.to_parquet("a.parquet")
    for rows in (
        read_splits("a.parquet")["train"],
        memory_splits(datasets.Dataset.from_pandas(frame))["train"],
    ):
        assert repr([row["answer"] for row in rows]) == "[1, None, 3]"
        assert repr([row["share"] for row in rows]) == "[1.0, None, 0.5]"


CALLS = [{"city": "Bern"}, {"a": 1, "b": {"c": [2]}}, {}]


def test_tables_pad_messages_with_nulls_that_no_template_sees_and_lists_keep_theirs():
    rows = []
    for arguments in CALLS:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        tool = {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": arguments}},
        }
        rows.append(
            {"prompt": [{"role": "user", "content": "q"}, turn], "tools": [tool], "answer": "x"}
        )
    data = datasets.Dataset.from_list(rows)
    data.to_parquet("a.parquet")
    data.save_to_disk("saved")
    # What is empty in one row has no type of its own, so Arrow drops it; all else comes back.
    for read in (memory_splits(data), read_splits("a.parquet"), read_splits("saved")):
        calls = [
            row["prompt"][1]["tool_calls"][0]["function"]["arguments"] for row in read["train"]
        ]
        assert calls == CALLS
        assert [
            row["tools"][0]["function"]["parameters"]["properties"] for row in read["train"]
        ] == CALLS
    pairs = [
        {"prompt": row["prompt"], "chosen": row["prompt"], "rejected": rows[1]["prompt"]}
        for row in rows
    ]
    for source in (pairs, datasets.Dataset.from_list(pairs)):
        train, held_out = load_pairs(source, eval_size=1)
        assert {json.dumps(pair.chosen) for pair in train + held_out} < {
            json.dumps(row["prompt"]) for row in rows
        }
    explicit = [{"prompt": [{"role": "user", "content": "q", "tool_calls": [{"a": None}]}]}]
    assert memory_splits(explicit)["train"] == explicit


@pytest.mark.parametrize("answer", [True, ["a"], {"a": 1}, b"7", pandas.Timestamp("2005-07-22")])
@pytest.mark.parametrize("reward", [ExactMatch(), NumericAnswer()])
def test_an_answer_that_no_completion_can_equal_is_refused_with_its_row(reward, answer):
    rows = [{"prompt": f"p{i}", "answer": "a"} for i in range(4)]
    bad = [*rows, {"prompt": "p4", "answer": answer}]
    for task in (PromptTask("t", bad, rows, reward), PromptTask("t", rows, bad, reward)):
        with pytest.raises(
            Refused, match=r"row 4: the answer in the column 'answer' is .*text or a number"
        ):
            find_task(TaskArguments(task=task))


@pytest.mark.parametrize(
    ("answer", "completion", "earned"),
    [(7, "7", 1.0), (7.0, "7", 1.0), (7.0, "7.0", 1.0), (7.5, "7", 0.0), (None, "7", None),
     (float("nan"), "nan", None), ("7.0", "7", 0.0)],
)  # fmt: skip
def test_numbers_are_right_as_they_are_written(answer, completion, earned):
    assert ExactMatch()([completion], answer=[answer]) == [earned]


def test_rows_without_a_value_are_counted_by_column():
    with open("a.jsonl", "w") as file:
        for i in range(8):
            row = {"prompt": f"p{i}", "answer": i} | ({"hint": "h"} if i % 4 else {})
            file.write(json.dumps(row | ({"answer": None} if i == 3 else {})) + "\n")
    rows = read_splits("a.jsonl")["train"]
    assert remarks(rows) == [
        "of 8 training rows some have no value in a column: answer (1), hint (2). Rewards get None there."
    ]
    assert remarks([{"prompt": "a", "hint": None}]) == []


UNORDERED = """
from dataclasses import dataclass
from tokenrl.runs.files import canonical

@dataclass(frozen=True)
class Point:
    names: frozenset

print(canonical({"set": {"a", "b", "c", ("d", 1)}, "point": Point(frozenset("xyz")), "map": {1: {"q", "r"}}}))
"""


def test_values_without_an_order_are_written_alike_in_every_process():
    texts = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", UNORDERED], env=environment, capture_output=True, check=True
        )
        texts.add(run.stdout)
    assert len(texts) == 1
    sets = [{"a"}, {"b"}, {"a", "b"}, {1: {"a"}}, {2: {"a"}}]
    assert len({fingerprint({"a": [{"set": value}]}) for value in sets}) == len(sets)


def test_objects_without_a_form_are_said():
    rows = [{"prompt": "p", "tool": object(), "call": lambda: 0, "text": "seen at 0x12"}]
    again = [{"prompt": "p", "tool": object(), "call": lambda: 0, "text": "seen at 0x12"}]
    assert fingerprint({"a": rows}) != fingerprint({"a": [again[0] | {"text": "seen at 0x13"}]})
    assert fingerprint({"a": rows}) == fingerprint({"a": again})
    assert remarks(rows) == [
        "the values of tool, call are objects without a __repr__ of their own: "
        "if they change, a continuation of this run cannot notice it."
    ]


def test_a_column_of_numbers_is_text_where_text_is_needed():
    with open("a.csv", "w") as file:
        file.write(
            "prompt,completion,chosen,rejected\n"
            + "".join(f"{i},{i + 1},{i + 1},{i}.5\n" for i in range(9))
        )
    task, _ = find_task(TaskArguments(task="a.csv", reward=(ExactMatch("chosen"),)))
    assert {row["prompt"] for row in task.train_prompts + task.eval_prompts} == set("012345678")
    row = demonstrations(task)[0]
    assert (row["completion"], int(row["prompt"]) + 1) == (
        str(int(row["prompt"]) + 1),
        int(row["completion"]),
    )
    pairs, _ = load_pairs("a.csv")
    assert (pairs[0].prompt, pairs[0].rejected) == ("0", "0.5")
