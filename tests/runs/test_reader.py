"""One reader of a run: what its files say, and files that somebody has edited or a disk has damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from tokenrl.control import train_agent
from tokenrl.files import write_json
from tokenrl.runs import read_run
from tokenrl.runs.metrics import write_completions
from tokenrl.runs.reader import Outcome


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "finished"
    train_agent(env="bandit", max_steps=3, eval_every=2, num_envs=4, output_dir=path, quiet=True)
    return path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_tells_its_kind_and_what_it_has_measured(finished):
    run = read_run(finished)
    assert (run.kind, run.title, run.path) == ("control", run.config["title"], finished)
    assert run.mark is None and replace(run, config={"solved": 0.5}).mark == ("solved", 0.5)
    assert [row["step"] for row in run.metrics] == [0, 1, 2, 3]
    assert [row["step"] for row in run.timings] == [1, 2, 3]
    assert [row["step"] for row in run.evaluations] == [0, 2, 3]
    assert run.evaluations[-1]["reward"] == run.summary["eval_after"]["reward"]
    assert run.series("eval_reward")[0] == [0, 2, 3] and run.completions() == []


def test_evaluations_are_those_of_the_lines_whatever_the_summary_says(run):
    shutil.rmtree(run / "checkpoints")
    rows = [{"step": 0, "eval_reward": 1.0}, {"step": 1, "reward": "Infinity", "kl": None}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2, "re')
    write_json(run / "summary.json", {"steps": 1, "eval_after": {"reward": 2.0}})
    recorded = read_run(run)
    assert recorded.evaluations == [{"step": 0, "reward": 1.0}]
    assert recorded.metrics[1]["reward"] == float("inf") and recorded.series("reward") == ([], [])
    (run / "summary.json").unlink()
    (run / "config.json").unlink()
    assert (read_run(run).summary, read_run(run).config, read_run(run).title) == ({}, {}, "run")


@pytest.mark.parametrize(
    ("most", "indices"), [(16, range(0, 33, 3)), (33, range(33)), (None, range(33))]
)
def test_completions_are_at_most_so_many_of_a_table_and_spread_over_it(run, most, indices):
    write_completions(run / "completions", 7, [{"index": index} for index in range(33)])
    write_completions(run / "completions", 8, [{"index": 5}])
    rows = [{"step": 7, "index": index} for index in indices]
    assert read_run(run).completions(2, most) == [*rows, {"step": 8, "index": 5}]


def test_a_result_is_a_small_table(tmp_path):
    before = {"reward": 0.25, "reward_stderr": 0.125}
    after = {"reward": 1.0, "rewards/<a>/mean": 3.5}
    ended = Outcome(tmp_path, "finished", 0, 3, before, after, 61.2)
    assert repr(ended).splitlines() == [
        "Outcome                before after",
        "reward            0.25 ± 0.12     1",
        "rewards/<a>/mean            -   3.5",
        "finished, 3 steps, 1:01",
        str(tmp_path),
    ]
    page = "".join(ended._repr_html_().split())
    assert "<th>rewards/&lt;a&gt;/mean</th><td>-</td><td>3.5</td>" in page and str(tmp_path) in page
    assert ended.metrics == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert ended.metrics == [{"step": 1, "reward": 0.5}]
