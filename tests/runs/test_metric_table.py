"""The table of metrics: whatever runs record is in it."""

from __future__ import annotations

import pytest
from command_line import completes

from tokenrl.runs import read_run
from tokenrl.runs.metric_table import all_metrics, metric_of

STEP = "--task rows.jsonl --reward exact_match --prompts-per-step 2 --num-generations 2 --max-completion-length 4"
RUNS = {
    "train": f"train {STEP} --estimator grpo --estimator.beta 0.1",
    "critic": f"train {STEP} --estimator ppo --eval-generations 0",
    "sft": "sft --task rows.jsonl --reward exact_match --eval-every 1",
    "reward-model": "reward-model --data rows.jsonl --eval-every 1",
    "control": "control --env bandit --num-envs 4 --eval-episodes 4",
    "pieces": "control --env bandit --estimator ppo --num-envs 4 --num-steps 4 --eval-episodes 4",
}


@pytest.mark.parametrize("kind", RUNS)
def test_everything_that_a_run_records_is_in_the_table(kind, files, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(files)
    words = [
        *RUNS[kind].split(),
        "--max-steps",
        "1",
        "--quiet",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    if "control" not in RUNS[kind]:
        words += ["--model", "model"]
    completes(*words)
    run = read_run(tmp_path / "run")
    names = {name for row in (*run.metrics, *run.timings) for name in row}
    names |= (run.summary["eval_after"] or {}).keys()
    assert {name for name in names if not metric_of(name).meaning} == set()


def test_no_name_has_two_rows():
    names = [metric.name for metric in all_metrics()]
    assert len(set(names)) == len(names)
    assert metric_of("no such metric") not in all_metrics()
