"""The memory that `--check` tells is that of the run, within a fifth, if completions stay as long."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from toy_tasks import load
from toy_tasks.models import tiny_llama

UNITS = {"MiB": 2**20, "GiB": 2**30}
PLAIN = ["--mixed-precision", "no", "--training-attention", "as_loaded", "--max-completion-length", "48"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Some 20 million parameters, so that the run takes more than the libraries alone.

    No completion ends early. Else there are fewer rows of a length in some steps than in others, and they
    become shorter as the policy learns.
    """
    folder = tmp_path_factory.mktemp("model")
    _, tokenizer = load("vowels").build(0)
    tokenizer.eos_token = None
    tiny_llama(tokenizer, layers=6, hidden=512, heads=8, context=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def program(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "tokenrl", "train", "--task", "vowels", "--overwrite", "--cpu", *flags],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, 2), done.stderr[-2000:]
    return " ".join(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--num-generations", "8"],
        ["--num-generations", "8", "--lora-r", "8"],
        ["--num-generations", "16", "--micro-batch-size", "16", "--estimator.beta", "0.1"],
    ],
    ids=["all at once", "adapter", "micro-batches and a reference"],
)
def test_the_memory_that_is_told_is_that_of_the_run(model, tmp_path, options):
    run = tmp_path / "run"
    flags = ["--model", str(model), "--output-dir", str(run), *PLAIN, *options, "--prompts-per-step", "8"]
    flags += ["--eval-size", "8", "--eval-generations", "0"]
    told = re.search(r"memory about ([\d.]+) (\w+) of the computer", program(*flags, "--check"))
    program(*flags, "--max-steps", "4")
    rows = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    peak = rows[-1]["peak_memory_gib"] * 2**30
    assert float(told[1]) * UNITS[told[2]] == pytest.approx(peak, rel=0.2)
