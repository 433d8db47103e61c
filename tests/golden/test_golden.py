"""The golden runs are those of earlier commits, and the comparison of two runs notices every change.

Both commits run on this machine, since a sampled token may fall the other way on another processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from artifacts import artifacts, difference, equal
from golden_runs import HERE, ROOT, RUNS, environment
from safetensors.torch import save

REFERENCES = dict.fromkeys(RUNS, "efe7b45a") | {"cartpole": "900fe61"}
REFERENCES |= dict.fromkeys(("cartpole_critic", "pendulum"), "0bc9c1e")
REFERENCES |= dict.fromkeys(("data_file", "remax_graded"), "bb584444")
"""For each run the commit that was last meant to move its numbers, or one since which they have not moved.

Commits before 26 November 2026 cannot sample with transformers 5.24.
"""


@pytest.mark.slow
@pytest.mark.parametrize("commit", dict.fromkeys(REFERENCES.values()))
def test_the_golden_runs_are_those_of_the_commit_that_last_moved_them(commit):
    if subprocess.run(["git", "cat-file", "-e", commit], cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"the history of this clone has no commit {commit}")
    names = [name for name in RUNS if REFERENCES[name] == commit]
    argv = [sys.executable, str(HERE / "compare.py"), commit, "--only", *names]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


FIRST, SECOND = {"step": 0, "a": 1.0}, {"step": 1, "a": -0.0}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def summary(reward, seconds):
    return json.dumps({"eval_after": {"reward": reward}, "wall_seconds": seconds})


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "metrics.jsonl",
            lines(FIRST, {"step": 1, "a": 0.5}),
            "metrics.jsonl, line 2: a -0.0 became 0.5",
        ),
        ("metrics.jsonl", lines(FIRST), "metrics.jsonl, 2 lines became 1"),
        ("metrics.jsonl", lines({"b": 2}, SECOND), "metrics.jsonl, line 1: step is missing"),
        ("metrics.jsonl", lines(FIRST | {"b": 2}, SECOND), None),  # what only the second run has
        ("summary.json", summary(1.0, 4), None),  # a clock
        ("summary.json", summary(1.5, 3), "summary.json, line 1: eval_after.reward 1.0 became 1.5"),
        ("model.safetensors", save({"w": torch.ones(3)}), "model.safetensors, line 1: w a tensor"),
    ],
)
def test_a_change_is_named(tmp_path, file, text, said):
    (tmp_path / "metrics.jsonl").write_text(lines(FIRST, SECOND))
    (tmp_path / "summary.json").write_text(summary(1.0, 3))
    (tmp_path / "model.safetensors").write_bytes(save({"w": torch.zeros(3)}))
    before = artifacts(tmp_path)
    assert difference({}, before) == "the first run left nothing that could be compared"
    (tmp_path / file).write_bytes(text.encode() if isinstance(text, str) else text)
    assert (difference(before, artifacts(tmp_path)) or "").startswith(said or "")
    assert (difference(before, artifacts(tmp_path)) is None) == (said is None)
    (tmp_path / file).unlink()
    assert difference(before, artifacts(tmp_path)) == f"{file} is missing"


@pytest.mark.parametrize(
    ("name", "value", "same", "different"),
    [
        ("reward", 1.0, 1.00001, 1.00002),
        ("reward", 0.0, 1e-6, 2e-6),
        ("kl", 1.0, 1.0001, 1.0003),
        ("gradient/norm", 1.0, 1.0001, 1.0003),
        ("reward", float("nan"), float("nan"), 0.0),
        ("reward", True, True, False),
        ("completion", "1234", "1234", "1243"),
    ],
)
def test_rounding_is_no_difference(name, value, same, different):
    assert equal(name, value, same)
    assert not equal(name, value, different)


def test_code_from_another_tree_is_refused(tmp_path):
    command = [sys.executable, str(HERE / "launch.py"), "--version"]
    shadow = environment(tmp_path, tmp_path) | {"PYTHONPATH": os.fspath(ROOT)}
    done = subprocess.run(command, env=shadow, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "imported" in done.stderr
