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

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenrl

TEXT = {"type": "string", "minLength": 200, "maxLength": 250}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "text": TEXT, "age": {"type": "integer"}},
    "required": ["name", "text", "age"],
}
WORK: Mapping[str, dict[str, Any]] = {
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
        run = tokenrl.train(output_dir=folder, overwrite=True, **fixed | options)
        files = [Path(folder, f"{name}.jsonl") for name in ("timings", "metrics")]
        timings, metrics = ([*map(json.loads, file.open())] for file in files)
    lengths = {row["step"]: row.get("completions/mean_length") for row in metrics}
    rows = 8 * options["prompts_per_step"]
    times = [
        row["step_seconds"] / (rows * lengths[row["step"]])
        for row in timings
        if "step_seconds" in row and 2 < row["step"] <= run.steps
    ]
    return statistics.median(times)


def main() -> None:
    """Print the ratio of each pair, and their median."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="the large model; without it only the tiny one is timed")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    for name, options in WORK.items():
        if name == "large":
            if args.model is None:
                continue
            options = options | {"model": args.model}
        ratios = []
        for pair in range(args.pairs):
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
    main()
