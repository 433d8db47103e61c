"""--quiet: a run that succeeds prints nothing, neither its own lines nor those of the libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tokenrl.cli import main

STEP = "--prompts-per-step 2 --num-generations 2 --eval-generations 0 --max-steps 1 --max-completion-length 6"
RUNS = {
    "train": f"train --task rows.jsonl --reward exact_match --lora-r 2 {STEP}".split(),
    "control": ["control", "--env", "CartPole-v1", "--max-steps", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_quiet_run_prints_nothing(name, files, tmp_path):
    """A process of its own, because libraries warn only once and read the environment when imported."""
    model = [] if name == "control" else ["--model", "model"]
    words = [*RUNS[name], *model, "--quiet", "--output-dir", str(tmp_path / "run")]
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "tokenrl", *words]
    done = subprocess.run(command, cwd=files, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_warns_of_few_prompts_and_a_quiet_one_does_not(files, workplace, capsys, said):
    rows = (files / "rows.jsonl").read_text().splitlines()[:6]
    (workplace / "rows.jsonl").write_text("\n".join(rows))
    run = [*RUNS["train"], "--model", str(files / "model"), "--check"]
    run += ["--num-generations", "16"]
    assert main(run) == 2  # an untrained model is never right
    assert "only 4 distinct prompts in 4 training rows" in said()
    assert main([*run, "--quiet"]) == 2
    output = capsys.readouterr()  # it still says what is wrong
    assert output.out == "" and "1. no-signal: In none of 2 groups of 16" in output.err
