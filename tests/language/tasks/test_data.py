"""Tasks from every source a user can name, the refusals on the way, and the order of the prompts."""

import itertools
import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import given, settings, strategies as st
from refusals import refused

from tokenrl.cli import main
from tokenrl.language.preferences.pairs import load_pairs
from tokenrl.language.tasks.sources import read_splits
from tokenrl.language.tasks.stream import PromptStream, RowOrder, batch_orders
from tokenrl.language.tasks.task import load_task

pytestmark = pytest.mark.usefixtures("alone")

ROWS = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(20)]


def reward(completions, answer, **kwargs):
    return [
        float(completion == right) for completion, right in zip(completions, answer, strict=True)
    ]


# ---- places ----


@pytest.mark.parametrize(
    ("bad", "command"),
    [
        ("the cat " * 40, "train --reward length(target=3) --max-completion-length 8"),
        ("the cat " * 40, "sft"),
        (None, "train --reward length(target=3) --prompt-template {prompt}"),
    ],
)
def test_a_row_is_named_by_its_line_whatever_is_held_out_or_blank(bad, command, saved, capsys):
    rows = [{"prompt": bad if n == 6 else f"{n} a", "completion": "two"} for n in range(10)]
    lines = [*map(json.dumps, rows)]
    Path("data.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]))
    words = f"--task data.jsonl --model {saved(kind='chat')} --max-steps 1"
    assert main([*command.split(), *words.split()]) == 2
    assert "of line 8" in " ".join(capsys.readouterr().err.split())


# ---- sources ----


def test_folders_saved_datasets_and_their_evaluation_splits(tmp_path):
    (tmp_path / "folder").mkdir()
    test = [{"prompt": "new", "answer": "x"}, ROWS[3]]
    for split, rows in (("train", ROWS), ("test", test)):
        datasets.Dataset.from_list(rows).to_json(f"folder/{split}.jsonl")
    task = load_task("folder", reward=reward)
    assert [*task.train_prompts] == ROWS and [*task.eval_prompts] == test
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk("saved")
    task = load_task("saved", reward=reward)
    assert len(task.train_prompts) + len(task.eval_prompts) == 20
    datasets.DatasetDict(first=rows, second=rows.take(2)).save_to_disk("both")
    task = load_task("both", split="first", eval_split="second", reward=reward)
    assert (len(task.train_prompts), len(task.eval_prompts)) == (20, 2)
    with refused(r"no split 'frist'.*'first'"):
        load_task("both", split="frist", reward=reward)


@pytest.fixture
def hub(monkeypatch):
    """A builder of `datasets` for every name on the hub; its `calls` are the names, with configurations."""
    builder = SimpleNamespace(name="parquet", config=SimpleNamespace(), calls=[])
    builder.info = SimpleNamespace(features=None)
    builder.download_and_prepare = lambda: None
    named = lambda *name: builder.calls.append(name) or builder  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset_builder", named)
    return builder


def test_a_hub_name_reaches_datasets_with_its_configuration(hub):
    hub.as_dataset = lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    load_task("owner/name", reward=reward, eval_size=2)
    hub.name, hub.info.features = "json", {"prompt": "string"}
    load_task("owner/name:main", reward=reward, eval_size=2)
    assert hub.calls == [("owner/name", None), ("owner/name", "main")]


def test_no_error_of_the_hub_reaches_the_user_raw(hub):
    def as_dataset():
        raise RuntimeError("generation\n  failed") from ConnectionError("no route")

    hub.as_dataset = as_dataset
    with refused("generation failed caused by ConnectionError: no route"):
        load_task("owner/name", reward=reward)


def test_a_task_of_the_users_own_module_or_file(tmp_path):
    (tmp_path / "my_helper.py").write_text("NAME = 'helped'")
    (tmp_path / "my_task.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        @dataclass(frozen=True)
        class Mine:
            name: str = "mine"
            train_prompts: tuple = ({"prompt": "a"}, {"prompt": ""})
            eval_prompts: tuple = ({"prompt": [{"role": "user", "content": "b"}]},)
            reward: object = len
        def build():
            from my_helper import NAME
            return Mine(NAME)
        task = Mine()
        class box:
            inner = task
        def broken():
            raise OSError("no disk")
        """)
    )
    assert load_task("my_task:task").name == "mine"
    assert load_task("my_task:build").name == "helped"
    assert load_task("my_task:box.inner") == load_task("my_task:task")
    assert load_task(f"{tmp_path}/my_task.py:task").name == "mine"
    other = load_task("my_task:task", reward=reward)
    assert other.reward is reward and load_task("my_task:task").reward is len
    (tmp_path / "bad_task.py").write_text("import not_installed_anywhere")
    (tmp_path / "notes.txt").write_text("text")
    for name, words in {
        "my_task:broken": "OSError: no disk",
        "my_task:tsk": r"has no tsk.*'task'",
        "nothing": "There is no task 'nothing'",
        "no_module:task": "there is no module no_module",
        "missing.jsonl": "there is no such file",
        "bad_task:task": "ModuleNotFoundError.*not_installed_anywhere",
        "notes.txt": r"cannot read '.txt' files; allowed are \.json",
    }.items():
        with refused(words):
            load_task(name, reward=reward)


# ---- refusals ----


EMPTY = {"a.jsonl": "", "a.csv": "", "b.csv": "prompt,answer\n", "a.json": "[]"}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_data_is_refused(name):
    Path(name).write_text(EMPTY[name])
    with refused(f"'{name}'"):
        load_task(name, reward=reward)


@pytest.mark.parametrize("read", [read_splits, load_pairs])
@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'null\n{"prompt": "a"}\n', "line 1 of .* is null"),
        ("a.json", b'[{"prompt": "a"}, 3]', "item 2 of .* is 3: a row is an object"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": "b",}\n',
            "line 3 of .* is no JSON: Expecting property name",
        ),
        (
            "a.csv",
            b'prompt,answer\n"a\nb",1\nc,d,e\n',
            "Line 4 of .* has 3 cells, and there are 2 columns",
        ),
        ("a.csv", b'prompt,answer\n"a,1\n', "unexpected end of data"),
        ("a.csv", b"prompt,prompt\na,b\n", "Two columns of .* are called 'prompt'"),
        ("a.json", b'[{"prompt": "a"}, {"prompt": "\\ud800"}]', "item 2 of .* is no UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "Line 2 of .* is no UTF-8"),
        ("a.csv", b"prompt,answer\nnull,1\n\xe9t\xe9,2\n", "Line 3 of .* is no UTF-8"),
        ("folder/train.jsonl", b'null\n{"prompt": "a"}\n', "line 1 of .*train.jsonl is null"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused_with_its_line(tmp_path, read, name, content, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_bytes(content)
    with refused(place):
        read(name.partition("/")[0])


# ---- the stream ----


def prompts_of(rows, size, seed):
    stream = PromptStream([{"prompt": number} for number in range(rows)], seed)
    return stream, lambda: [row["prompt"] for _, row in stream.draw_prompts(size)]


def batches_of(rows, size, seed):
    batches = RowOrder(rows, seed, batch_orders)
    return batches, lambda: batches.draw(size)


@pytest.mark.parametrize("make", [prompts_of, batches_of])
@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 7), size=st.integers(1, 9), skip=st.integers(0, 9), seed=st.integers(0, 5)
)
def test_rows_repeat_nothing_within_an_epoch_and_continue_exactly(make, rows, size, skip, seed):
    whole, deal = make(rows, size, seed)
    first, deal_first = make(rows, size, seed)
    second, deal_second = make(rows, size, seed)
    steps = [deal() for _ in range(20)]
    dealt = [*itertools.chain(*steps)]
    for start in range(0, len(dealt) - rows + 1, rows):
        assert sorted(dealt[start : start + rows]) == list(range(rows))
    for _ in range(skip):
        deal_first()
    deal_second()  # a state replaces whatever has been given out
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [deal_second() for _ in range(20 - skip)] == steps[skip:]
    assert second.state_dict() == whole.state_dict()


def test_positions_and_epochs_count_what_was_given_out_and_another_order_is_refused():
    stream, other = (prompts_of(20, 1, 0)[0] for _ in range(2))
    for count in (3, 4, 25):  # within an epoch, over its end, and what is peeked at is drawn next
        peeked = stream.peek(count + 2)[:count]
        assert peeked == stream.draw_prompts(count) == other.draw_prompts(count)
    assert [number for number, _ in stream.draw_prompts(2)] == [32, 33]
    assert stream.epoch == 34 / 20
    for rows, seed, fault in ((19, 0, "num_rows 20 and this run has 19"), (20, 1, "seed 0 and")):
        with refused(fault):
            prompts_of(rows, 1, seed)[0].load_state_dict(stream.state_dict())


@pytest.mark.parametrize("make", [prompts_of, batches_of])
def test_epochs_and_seeds_have_orders_of_their_own(make):
    streams = [make(30, 30, seed)[1] for seed in (0, 1)]
    orders = [tuple(deal()) for deal in (streams[0], streams[0], streams[1])]
    assert len({*orders, tuple(range(30))}) == 4
