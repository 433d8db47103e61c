"""AGENTS.md shows four common changes as diffs: here each is made in a copy of the package, which then runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIFFS = dict(
    re.findall(
        r"^To add (an? [\w ]+),.*?^```diff\n(.*?)^```",
        (ROOT / "AGENTS.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
)
MOST_FILES = {
    "a baseline": 3,
    "a reward": 2,
    "an option of decoding": 2,
    "a metric with its rule": 3,
}
MOST_LINES = 16

BASELINE = """
from tokenrl import Estimator, measure_bias
verdict = measure_bias(Estimator(baseline="midpoint"))
assert verdict.ok and verdict.found == "exact", verdict
"""
REWARD = """
from tokenrl.language import load_reward
reward = load_reward('contains(text="ab")')
assert reward(prompts=["", ""], completions=["cab", "c"]) == [1.0, 0.0] and reward.binary
"""
OPTION = """
import torch
from tokenrl import Refused, train
from tokenrl.language.rollout.distribution import Distribution
logits = torch.tensor([0.6, 0.3, 0.1]).log()
chances = Distribution(least_p=0.2).log_probabilities(logits).exp()
assert torch.allclose(chances, torch.tensor([2 / 3, 1 / 3, 0.0])), chances
options = {"task": "sort_digits", "max_steps": 2, "least_p": 0.05, "quiet": True}
options |= {"model": "tiny", "reward": "length(target=3, unit='characters')", "eval_every": 0}
metrics = train(output_dir="run", **options).metrics
assert metrics[1]["sampling/logp_difference/mean"] < 1e-5, metrics
try:
    train(output_dir="other", generator="vllm", **options)
except Refused as refusal:
    assert "least_p was given as 0.05; vllm does not sample with it" in str(refusal), refusal
else:
    raise AssertionError("vLLM ignores the option")
"""
METRIC = """
from tokenrl import train
from tokenrl.control import ControlArguments
from tokenrl.language.rewards.calls import RESERVED
from tokenrl.runs import all_metrics
from tokenrl.runs.findings import observe
from tokenrl.runs.rules import judge
assert "completions/single" in {metric.name for metric in all_metrics()}
options = {"task": "sort_digits", "max_completion_length": 1, "max_steps": 2, "quiet": True}
rows = train(output_dir="run", model="tiny", eval_every=0, **options).metrics
assert rows[1]["completions/single"] == 1.0, rows[1]
(finding,) = judge(observe(rows, ControlArguments()), "single-tokens")
assert finding.text == "100% of the completions have a single token.", finding
"""
PROGRAMS = dict(zip(MOST_FILES, (BASELINE, REWARD, OPTION, METRIC), strict=True))


def apply(diff: str, root: Path) -> None:
    """Apply a diff whose hunks are found by their lines, each of which has one place in its file."""
    for part in diff.split("+++ b/")[1:]:
        name, _, hunks = part.partition("\n")
        text = (root / name).read_text()
        for hunk in hunks.split("@@\n")[1:]:
            lines = [line or " " for line in hunk.splitlines()]
            old, new = (
                "".join(f"{line[1:]}\n" for line in lines if line[0] in kept)
                for kept in (" -", " +")
            )
            assert text.count(old) == 1, f"{name} has {text.count(old)} places for\n{old}"
            text = text.replace(old, new)
        (root / name).write_text(text)


@pytest.mark.parametrize("change", MOST_FILES)
def test_a_change_has_few_files_and_lines(change):
    diff = DIFFS[change]
    assert diff.count("+++ b/") <= MOST_FILES[change]
    assert len(re.findall(r"^\+(?!\+\+ b/)", diff, re.MULTILINE)) <= MOST_LINES


@pytest.mark.slow
@pytest.mark.parametrize("change", MOST_FILES)
def test_a_change_that_is_shown_works(tmp_path, change):
    for package in ("tokenrl", "toy_tasks"):
        shutil.copytree(ROOT / package, tmp_path / package)
    apply(DIFFS[change], tmp_path)
    run = [sys.executable, "-c", PROGRAMS[change]]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def test_a_diff_without_its_place_is_noticed(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(AssertionError, match="has 0 places"):
        apply("+++ b/a.py\n@@\n-y = 1\n+y = 2\n", tmp_path)
