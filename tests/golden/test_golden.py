"""The golden runs are those of earlier commits, and the comparison of two runs notices every change.

Both commits run on this machine, since a sampled token may fall the other way on another processor.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from compare import HERE, ROOT, artifacts, difference, equal
from safetensors.torch import save_file

COMMIT = "66547b66"
"""The commit that was last meant to move numbers of the runs, or one since which they have not moved.

Commits before 26 November 2026 cannot sample with transformers 5.24.
"""


@pytest.mark.slow
def test_the_golden_runs_are_those_of_the_commit_that_last_moved_them():
    if subprocess.run(["git", "cat-file", "-e", COMMIT], cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"the history of this clone has no commit {COMMIT}")
    argv = [sys.executable, str(HERE / "compare.py"), COMMIT]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def left(folder, rows=2, reward=0.5, **more):
    """Artifacts of a made-up run."""
    (folder / "model").mkdir(parents=True)
    lines = [json.dumps({"step": n, "reward": reward} | more) for n in range(rows)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    save_file({"w": torch.full((3,), reward)}, folder / "model" / "model.safetensors")
    return artifacts(folder)


def test_a_change_is_named(tmp_path):
    before = left(tmp_path / "before")
    assert "left nothing" in difference({}, before)
    assert difference(before, left(tmp_path / "more", loss=1)) == ""
    assert "loss 1 became None" in difference(left(tmp_path / "loss", loss=1), before)
    assert "metrics.jsonl, 2 lines became 1" in difference(before, left(tmp_path / "few", 1))
    other = left(tmp_path / "other", reward=1.5)
    assert difference(before, other) == "metrics.jsonl, line 1: reward 0.5 became 1.5"
    other["metrics.jsonl"] = before["metrics.jsonl"]
    assert difference(before, other).startswith("model.safetensors, line 1: w tensor")


@pytest.mark.parametrize(
    ("name", "value", "same", "different"),
    [
        ("reward", 1.0, 1.00001, 1.00003),
        ("reward", 0.0, 1e-6, 2e-6),
        ("eval_kl", 1.0, 1.0001, 1.0003),
        ("reward", math.nan, math.nan, 0.0),
        ("completion", "1234", "1234", "1243"),
    ],
)
def test_rounding_is_no_difference(name, value, same, different):
    assert equal(name, value, same)
    assert not equal(name, [value], [different])
