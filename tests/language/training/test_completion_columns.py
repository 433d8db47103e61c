"""The page about the directory of a run names each file, and each column of its tables of completions."""

import re

import pyarrow.parquet as parquet
from folders import RECIPES
from tiny_environments import Safe, chat_policy
from tiny_models import make_policy

import tokenrl

PAGE = RECIPES / "pages" / "reference" / "run_directory.md"
TABLES = PAGE.read_text().partition("## Columns of the completions")[2].partition("\n## ")[0]
QUIET = {"quiet": True, "max_steps": 1}


def scored(completions, log_extra, **_):
    log_extra("size", [len(completion) for completion in completions])
    return [float(i) for i, _ in enumerate(completions)]


def columns_of(folder):
    (file,) = (folder / "completions").glob("*.parquet")
    return {
        re.sub("^rewards/.*", "rewards/NAME", name)
        for name in parquet.read_table(file).column_names
    }


def test_every_file_and_column_of_a_run_is_on_the_page_and_no_other_column(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": text} for text in "abcd"]
    options = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4, **QUIET}
    options |= {"eval_generations": 0, "eval_size": 1, "output_dir": tmp_path / "episodes"}
    task = {"task": rows, "environment": Safe, "reward": [scored]}
    tokenrl.train(model=chat_policy(), **task, **options)
    pairs = [{"prompt": text, "chosen": " cat", "rejected": " the"} for text in ("a", "one", "mat")]
    judge = {"data": pairs, "model": make_policy(), "batch_size": 2, "eval_size": 1}
    tokenrl.train_reward_model(**judge, **QUIET, output_dir=tmp_path / "judge")
    for path in (tmp_path / "episodes").iterdir():
        assert f"`{path.name}" in PAGE.read_text(), path.name
    columns = columns_of(tmp_path / "episodes") | columns_of(tmp_path / "judge")
    rows_of_tables = [line.split("|")[1] for line in TABLES.splitlines() if line.startswith("| `")]
    assert set(re.findall("`([^`]+)`", "".join(rows_of_tables))) == columns - {"answer", "size"}
