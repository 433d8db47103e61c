"""Times steps of training with a rule for completions beside steps without it, in turn.

    python recipes/benchmarks/allowed_step.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The tiny model of `sort_digits` gets a regular expression. The large one gets a JSON schema of some hundred states, with
a string so long that the rule closes it in the last of 40 tokens: completions are as long as without a rule. A number
is the seconds of a step per sampled token, the median over the steps but the first two.

Look for: the median ratio of the pairs, with the rule over without.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[allowed]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import json
import statistics
import tempfile
from typing import Any

import pandas as pd
import tyro

import tokenrl
from tokenrl.runs import read_run

TEXT = {"type": "string", "minLength": 200, "maxLength": 250}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "text": TEXT, "age": {"type": "integer"}},
    "required": ["name", "text", "age"],
}
WORK = {
    "tiny": {"allowed": "[0-9>]{7}", "max_steps": 40, "prompts_per_step": 32},
    "large": {
        "allowed": json.dumps(SCHEMA),
        "max_completion_length": 40,
        "max_steps": 6,
        "prompts_per_step": 4,
        "warm_start": False,
        "lora_r": 8,
    },
}


def uneven(completions: list[str], **columns: Any) -> list[float]:
    """Reward texts by the sum of their characters modulo 5, so that almost every group learns."""
    return [float(sum(map(ord, text)) % 5) for text in completions]


def seconds_per_token(**options: Any) -> float:
    """Train a few steps, and return the seconds of a step per sampled token."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"task": "sort_digits", "eval_every": 0, "eval_size": 1, "quiet": True}
        fixed["reward"] = uneven
        tokenrl.train(output_dir=folder, overwrite=True, **fixed | options)
        run = read_run(folder)
        rows = pd.DataFrame(run.timings).merge(pd.DataFrame(run.metrics), on="step")
    rows = rows.query("step > 2").dropna(subset=["step_seconds", "completions/mean_length"])
    tokens = 8 * options["prompts_per_step"] * rows["completions/mean_length"]
    return (rows["step_seconds"] / tokens).median()


def main(model: str | None = None, pairs: int = 5) -> None:
    """Print the ratio of each pair, and their median.

    Args:
        model: The large model; without it only the tiny one is timed.
        pairs: Pairs of runs with and without a rule.
    """
    for name, options in WORK.items():
        if name == "large":
            if model is None:
                continue
            options = options | {"model": model}
        ratios = []
        for pair in range(pairs):
            arms = {"with": options, "without": options | {"allowed": ""}}
            order = sorted(arms, reverse=bool(pair % 2))
            seconds = {arm: seconds_per_token(**arms[arm]) for arm in order}
            ratios.append(seconds["with"] / seconds["without"])
            print(
                f"{name}: with {seconds['with'] * 1e6:.0f}, without {seconds['without'] * 1e6:.0f}",
                f"microseconds per token, ratio {ratios[-1]:.3f}",
            )
        print(f"{name}: median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    tyro.cli(main)
