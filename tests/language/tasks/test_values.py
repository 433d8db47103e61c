"""Values arrive as they were written: in every format, in tables of Arrow, and in fingerprints."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy
import pandas
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from refusals import refused

from tokenrl.language.preferences.pairs import load_pairs
from tokenrl.language.rewards.library import ExactMatch
from tokenrl.language.tasks.files import format_of
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.records import fingerprint
from tokenrl.language.tasks.sources import TaskArguments, read_splits
from tokenrl.language.tasks.task import PromptTask, find_task

pytestmark = pytest.mark.usefixtures("alone")

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
    assert repr(list(read_splits(name)["train"])) == repr(alike(rows))


@EACH
@given(
    columns=st.lists(
        st.one_of(st.just(TEXTS), st.just(NUMBERS), st.just(SCALARS)), min_size=2, max_size=3
    ),
    data=st.data(),
)
def test_each_cell_of_csv_is_the_text_that_stands_there(columns, data):
    rows = data.draw(st.lists(st.tuples(*columns), min_size=1, max_size=6))
    names = [f"c{i}" for i in range(len(columns))]
    texts = [[None if cell is None else str(cell) for cell in row] for row in rows]
    with open("a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *texts])
    assert [[*row.values()] for row in read_splits("a.csv")["train"]] == texts


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


ANSWERS = ["007", "NA", "2005-07-22", " 7", "a,b", "a\tb", "None", ""]
"""Texts of a column that a table of one type would change, and an empty cell."""
JSON_LINES = "".join(
    json.dumps({"prompt": f"p{i}", "answer": text or None}) + "\n" for i, text in enumerate(ANSWERS)
)


def cells(separator):
    file = io.StringIO()
    rows = [("prompt", "answer"), *((f"p{i}", answer) for i, answer in enumerate(ANSWERS))]
    csv.writer(file, delimiter=separator).writerows(rows)
    return file.getvalue()


CONTENTS = {
    "a.csv": cells(","),
    "a.tsv": cells("\t"),
    "a.jsonl": JSON_LINES,
    "a.json": JSON_LINES,
}
PACKED = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def answers(source):
    return [row["answer"] for row in read_splits(source)["train"]]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_gives_its_texts_alone_in_a_folder_and_compressed_and_anew_once_it_changes(
    name, packed
):
    os.mkdir("folder")
    path = f"folder/{name}{packed}"
    assert not packed or format_of(Path(path)) == Path(name).suffix
    texts = [answer or None for answer in ANSWERS]
    for first in ("007", "008"):
        with PACKED[packed](path, "wt", encoding="utf-8", newline="") as file:
            file.write(CONTENTS[name].replace("007", first))
        os.utime(path, (0, 0))  # as a copy that keeps the time
        assert answers("folder") == answers(path) == [first, *texts[1:]]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("prompt;answer\n1,5?;2\n", [{"prompt": "1,5?", "answer": "2"}]),
        ('"prompt";"answer"\n"a;b";"c"\n', [{"prompt": "a;b", "answer": "c"}]),
        ("prompt,answer\na;b,c|d\n", [{"prompt": "a;b", "answer": "c|d"}]),
        ("prompt;answer\na\n", [{"prompt": "a", "answer": None}]),
        ('prompt;answer\n"a\nb";"c ""d"""\n', [{"prompt": "a\nb", "answer": 'c "d"'}]),
        # in quotes, also over two lines, and within the name of a column
        ('"a;b;c", answer\nx, 1\n', [{"a;b;c": "x", " answer": " 1"}]),
        ('"a,b\nc,d";answer\n"1,5";2\n', [{"a,b\nc,d": "1,5", "answer": "2"}]),
        (
            "choose (a|b|c),answer\nx|y,1\nz,2\n",
            [{"choose (a|b|c)": "x|y", "answer": "1"}, {"choose (a|b|c)": "z", "answer": "2"}],
        ),
        (
            "prompt, long;answer\n1,5;2\na;b\n",
            [{"prompt, long": "1,5", "answer": "2"}, {"prompt, long": "a", "answer": "b"}],
        ),
        ("a;b,c;d\n1;2,3;4\n", [{"a": "1", "b,c": "2,3", "d": "4"}]),
        ("prompt\na;b\n", [{"prompt": "a;b"}]),
    ],
)
def test_the_header_of_csv_shows_what_divides_its_cells(text, rows):
    Path("a.csv").write_text(text)
    assert read_splits("a.csv")["train"] == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # no program's quotes; those of one that quotes all; those that hold a tab or a line end
        (
            '"Hi" she said\t1\n"open\t2\nthird\t3\nfourth"\t4\n\nlast "\t5',
            ['"Hi" she said', '"open', "third", 'fourth"', 'last "'],
        ),
        ('"a"\t"1"\r\n"say ""b"""\t2\r\n ""\t3\r\n', ["a", 'say "b"', None]),
        ('"a\tb"\t1\n"c\nd"\t2\ne\t3\n', ["a\tb", "c\nd", "e"]),
    ],
)  # fmt: skip
def test_a_quote_in_front_of_a_cell_between_tabs_swallows_no_row(text, expected):
    Path("a.tsv").write_bytes(b"prompt\tanswer\n" + text.encode())
    rows = read_splits("a.tsv")["train"]
    assert rows.columns["prompt"] == expected
    assert rows.columns["answer"] == [str(i + 1) for i in range(len(expected))]
    assert rows.locations[-1] == f"line {text.rstrip().count(chr(10)) + 2}"


def test_missing_values_of_a_frame_are_none_and_numbers_are_plain():
    frame = pandas.DataFrame(
        {"prompt": ["a", "b"], "n": [1, 2], "x": [0.5, float("nan")], "t": pandas.array([1, None])}
    )
    rows = memory_splits(frame)["train"]
    assert rows == [
        {"prompt": "a", "n": 1, "x": 0.5, "t": 1},
        {"prompt": "b", "n": 2, "x": None, "t": None},
    ]
    assert {type(row["n"]) for row in rows} == {int}


@pytest.mark.parametrize(
    ("line", "answer"),
    [('a, "b"', "b"), ('a,  "b, ""c"""', 'b, "c"'), ("a, b", " b"), ('a,b "c"', 'b "c"'),
     ('"a, ""x""", "b\nc"', "b\nc"), ('a," ""b"""', ' "b"'), (' "a",b', "b"), ("a, \"b\"\r\n", "b")],
)  # fmt: skip
def test_blanks_before_a_quote_are_none_of_the_cell(line, answer):
    with open("a.csv", "w", newline="") as file:
        file.write(f'prompt, "answer"\n{line}\nz,"x, ""y"", z"\n')
    assert answers("a.csv") == [answer, 'x, "y", z']


NARROW = pyarrow.table({
    "prompt": ["a", "b", "c"],
    "single": pyarrow.array([7.1, None, 7.0], pyarrow.float32()),
    "half": pyarrow.array(numpy.array([7.1, 0.1, 3], numpy.float16)),
    "double": pyarrow.array([7.0, None, 3.0]),
    "nested": pyarrow.array([[{"x": 7.1, "y": 7.1000001}], None, []],
                            pyarrow.list_(pyarrow.struct({"x": pyarrow.float32(), "y": pyarrow.float64()}))),
})  # fmt: skip
WRITTEN = [
    "{'prompt': 'a', 'single': 7.1, 'half': 7.1, 'double': 7.0, 'nested': [{'x': 7.1, 'y': 7.1000001}]}",
    "{'prompt': 'b', 'single': None, 'half': 0.1, 'double': None, 'nested': None}",
    "{'prompt': 'c', 'single': 7.0, 'half': 3.0, 'double': 3.0, 'nested': []}",
]


def test_fractions_of_a_table_are_read_as_they_are_written_whatever_their_precision_and_holes():
    pyarrow.parquet.write_table(NARROW, "a.parquet")
    os.mkdir("folder")
    shutil.copy("a.parquet", "folder")
    data = datasets.Dataset(NARROW)
    data.save_to_disk("saved")
    arrow = NARROW.to_pandas(types_mapper=pandas.ArrowDtype)
    frame = NARROW.drop(["nested"]).to_pandas()  # which has no types inside of lists
    sources = [data.with_format("numpy"), arrow, frame, frame.astype({"single": "Float32"})]
    read = [*map(read_splits, ("a.parquet", "folder", "saved")), *map(memory_splits, sources)]
    for splits in read[:-2]:
        assert [str(row) for row in splits["train"]] == WRITTEN
    flat = [text.partition(", 'nested'")[0] + "}" for text in WRITTEN]
    for splits in read[-2:]:
        assert [str(row) for row in splits["train"]] == flat
    rows = [{"single": numpy.float32(7.1), "nested": [{"x": numpy.float16(7.1)}]}]
    for source in (rows, pandas.DataFrame(rows)):
        (row,) = memory_splits(source)["train"]
        assert str(row) == "{'single': 7.1, 'nested': [{'x': 7.1}]}"


def test_arrays_of_numpy_are_lists_whatever_holds_them():
    turns = [{"role": "user", "content": "q"}]
    answer = {"ground_truth": "7", "scores": [0.5, 2.0]}
    rows = [{"prompt": turns, "answer": answer, "count": 3}] * 6
    pandas.DataFrame(rows).to_parquet("a.parquet")  # as verl writes its data
    frame = pandas.read_parquet("a.parquet")
    assert isinstance(frame["prompt"][0], numpy.ndarray)
    data = datasets.Dataset.from_parquet("a.parquet", cache_dir="cache")
    for source in (
        frame.to_dict("records"),
        datasets.Dataset.from_pandas(frame),
        data.with_format("numpy"),
        data.with_transform(lambda batch: {k: [numpy.asarray(v) for v in batch[k]] for k in batch}),
    ):
        assert ordered(list(memory_splits(source)["train"])) == ordered(rows)
    by_hand = {"prompt": numpy.array(turns, object), "count": numpy.int64(3)}
    by_hand["share"] = [numpy.float64(7.1)]
    (row,) = memory_splits([by_hand])["train"]
    assert repr(row) == repr({"prompt": turns, "count": 3, "share": [7.1]})
    with refused(r"row 0: the prompt is array\(.*\(ndarray\)"):
        find_task(TaskArguments(task=PromptTask("t", [by_hand], [by_hand], ExactMatch())))


REPEATED = {
    "a.jsonl": ('{"prompt": "a"}\n{"prompt": "b", "answer": 1, "answer": 2}\n', "line 2 .*'answer'"),
    "b.jsonl": ('{"prompt": "}",\n "m": [{"prompt": "\\\"{", "m":\n {"x": 1,\n"x": 2}}]}', "line 1 .*'x'"),
    "a.json": ('[{"answer": "answer"},\n {"m": {"answer": 1}, "answer": 1},\n {"a": 1, "\\u0061": 2}]', "gives 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("read", [read_splits, load_pairs])
def test_a_key_that_stands_twice_in_an_object_is_refused_with_its_row(name, read):
    text, words = REPEATED[name]
    os.mkdir("folder")
    for path in (name, f"folder/{name}"):
        with open(path, "w") as file:
            file.write(text)
        with refused(words):
            read(path.partition("/")[0])


def ordered(value):
    """A value with its keys in order: early releases of pyarrow sort them where they make a table of rows."""
    return json.dumps(value, sort_keys=True)


CALLS = [{"city": "Bern"}, {"a": 1, "b": {"c": [2]}}, {}]


def test_tables_pad_messages_with_nulls_that_no_template_sees_and_lists_keep_theirs():
    rows = []
    for arguments in CALLS:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        rows.append({"prompt": [{"role": "user", "content": "q"}, turn], "tools": [call]})
    data = datasets.Dataset.from_list(rows)
    data.to_parquet("a.parquet")
    data.save_to_disk("saved")
    # What is empty in one row has no type of its own, so Arrow drops it; all else comes back.
    frames = [pandas.read_parquet("a.parquet"), data.to_pandas()]
    sources = read_splits("a.parquet"), read_splits("saved"), *map(memory_splits, [data, *frames])
    for read in sources:
        for column in (lambda row: row["prompt"][1]["tool_calls"], lambda row: row["tools"]):
            calls = [column(row)[0]["function"]["arguments"] for row in read["train"]]
            assert calls == CALLS
    explicit = [{"prompt": [{"role": "user", "content": "q", "tool_calls": [{"a": None}]}]}]
    assert memory_splits(explicit)["train"] == explicit


UNORDERED = """
from dataclasses import dataclass
from tokenrl.files import canonical

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
