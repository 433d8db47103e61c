"""Measures seconds and memory of a training step against TRL, shape by shape, on one machine.

Both train the same new model on the same prompts, with the same group size, completion length, reward,
learning rate, AdamW and number of updates, without a KL. TRL gets the best of four settings: float32 or
bfloat16 (autocast), with the attention `sdpa` or `eager`. The first round tries all four, the later ones only
the one that was fastest. tokenrl has its default flags, to which `--tokenrl` adds others as an object in
JSON. Neither recomputes activations.

Rounds alternate (TRL, tokenrl, TRL, tokenrl ...), so that a machine that slows down slows both. Each
measurement is a process of its own (`one_trainer.py`, which holds the shapes), and its first 3 steps are left
out (of fewer than 6 steps, the first). The table has medians over rounds, the ratio of the seconds with its
range, and the most memory of any round: of the process, or on a GPU of its tensors.

    pip install -c constraints.txt -e '.[benchmarks]'
    python recipes/benchmarks/step_against_trl.py
    python recipes/benchmarks/step_against_trl.py --work fixed lora
    python recipes/benchmarks/step_against_trl.py --work 135m --tokenrl '{"mixed_precision": "bf16", "seed": 1}'

Look for: ratios above 1, where tokenrl takes less. They should grow with the prompt, which tokenrl reads once
for its group, and with the vocabulary. Measure on a quiet machine: on a busy one, threads that wait for each
other make TRL, which uses them all, up to ten times slower, and the ratio says nothing. OMP_NUM_THREADS=1
gives both one thread.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro
from one_trainer import WORK

TRAINER = Path(__file__).with_name("one_trainer.py")
SETTINGS = [
    {"bf16": bf16, "attention": attention}
    for bf16 in (False, True)
    for attention in ("sdpa", "eager")
]
COLUMNS = ("shape", "TRL at its best", "TRL, s", "tokenrl, s", "ratio of a round (range)")
COLUMNS += ("peak MB: TRL", "tokenrl")
Results = list[dict[str, Any]]
"""What a trainer's processes print by round; `error` where one failed."""


def run(program: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """What a program measures in a new process, or its `error` in a line; progress goes to stderr."""
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, str(program), "--measure", json.dumps(spec)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    print(f"  {json.dumps(spec)}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if process.returncode == 0:
        return dict(json.loads(process.stdout.splitlines()[-1]))
    print(process.stderr[-3000:], file=sys.stderr, flush=True)
    if "out of memory" in process.stderr or process.returncode == -9:
        return {"error": "out of memory"}
    errors = re.findall(r"(?m)^[\w.]+(?:Error|Refused): .*", process.stderr)
    return {"error": (errors or ["failed"])[-1].replace("|", "/")}


def alternate(
    program: Path,
    spec: dict[str, Any],
    settings: Sequence[dict[str, Any]],
    args: Namespace,
) -> tuple[dict[str, Any], Results, Results]:
    """Measure TRL and tokenrl in turn.

    The first round tries all settings of TRL, and the later ones only the fastest. Without TRL, tokenrl is measured
    alone.

    Returns:
        The fastest setting of TRL, and the results of both by round.
    """
    theirs: Results = []
    ours: Results = []
    settings = list(settings) if find_spec("trl") else []
    for number in range(args.rounds):
        spec = spec | {"round": number}
        results = [run(program, spec | {"who": "trl"} | setting) for setting in settings]
        times = [result.get("seconds", math.inf) for result in results]
        fastest = times.index(min(times)) if times else 0
        settings = settings[fastest : fastest + 1]
        theirs.append(results[fastest] if results else {"error": "not installed"})
        ours.append(run(program, spec | {"who": "tokenrl", "options": args.tokenrl}))
    return settings[0] if settings else {}, theirs, ours


def middle(results: Results) -> str:
    """The median of the seconds over rounds, or why there is none."""
    values = [result["seconds"] for result in results if "seconds" in result]
    return f"{statistics.median(values):.3f}" if values else results[0]["error"]


def times(theirs: Results, ours: Results) -> list[str]:
    """Seconds of TRL and of tokenrl, and their ratio with its range, of rounds in which neither failed."""
    pairs = [pair for pair in zip(theirs, ours, strict=True) if all("seconds" in x for x in pair)]
    ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    ratio += f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return [middle(theirs), middle(ours), ratio]


def peaks(*both: Results) -> list[str]:
    """The most memory of any round."""
    return [f"{max(result.get('peak_mb', 0) for result in results):,.0f}" for results in both]


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_heading(columns: Sequence[str], heading: str) -> None:
    """A line above a table, and the names of its columns."""
    print(f"\n{heading}\n")
    print_row(columns)
    print(f"|{'---|' * len(columns)}", flush=True)


def versions(device: dict[str, Any]) -> str:
    """The device, as `one_trainer.py` describes it, and the versions of what is measured."""
    names = ("tokenrl-lm", "torch", "transformers", *(["trl"] if find_spec("trl") else ()))
    return f"{device['name']}; {', '.join(f'{name} {version(name)}' for name in names)}"


def shape_row(
    name: str, args: Namespace, settings: Sequence[dict[str, Any]] = SETTINGS
) -> list[str]:
    """Measure both on a shape; returns a row of the table."""
    spec = {"work": name, "steps": args.steps}
    setting, *both = alternate(TRAINER, spec, settings, args)
    precision = {True: "bfloat16", False: "float32", None: ""}[setting.get("bf16")]
    best = f"{precision} {setting.get('attention', '')}".strip()
    return [name, best, *times(*both), *peaks(*both)]


def main(
    work: tuple[str, ...] = tuple(WORK), rounds: int = 3, steps: int = 10, tokenrl: str = "{}"
) -> None:
    """Measure both trainers on shapes of work.

    Args:
        work: Shapes, of which `one_trainer.py` has further ones.
        rounds: Rounds, each of both trainers.
        steps: Steps of each measurement, 2 or more.
        tokenrl: Further settings of tokenrl, in JSON.
    """
    args = Namespace(rounds=rounds, steps=steps, tokenrl=json.loads(tokenrl))
    print_heading(COLUMNS, versions(run(TRAINER, {"part": "device"})))
    for name in work:
        print_row(shape_row(name, args))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
