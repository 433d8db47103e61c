"""Measures seconds and memory of a training step against TRL, shape by shape, on one machine.

Both train the same new model on the same prompts, with the same group size, completion length, reward,
learning rate, AdamW and number of updates, without a KL. TRL gets the best of four settings: float32 or
bfloat16 (autocast), with the attention `sdpa` or `eager`. The first round tries all four, the later ones only
the one that was fastest. tokenrl has its default flags, to which `--tokenrl` adds others. Neither recomputes
activations.

Rounds alternate (TRL, tokenrl, TRL, tokenrl ...), so that a machine that slows down slows both. Each
measurement is a process of its own (`one_trainer.py`, which holds the shapes), and its first 3 steps are left
out (of fewer than 6 steps, the first). The table has medians over rounds, the ratio of the seconds with its
range, and the most memory of any round: of the process, or on a GPU of its tensors. The floor is the time of
the step's matrix products alone (`floor.py`), measured in each round; its shares are floor / seconds.

    pip install -c constraints.txt -e '.[benchmarks]'
    python recipes/benchmarks/step_against_trl.py
    python recipes/benchmarks/step_against_trl.py --work fixed lora --estimator rloo
    python recipes/benchmarks/step_against_trl.py --work 135m --tokenrl mixed_precision=bf16 seed=1

Look for: ratios above 1, where tokenrl takes less. They should grow with the prompt, which tokenrl reads once
for its group, and with the vocabulary. A share of 1 would be a trainer that does nothing but multiply
matrices; small models are far from it, for the many small operations around them. Measure on a quiet machine:
on a busy one, threads that wait for each other make TRL, which uses them all, up to ten times slower, and the
ratio says nothing. OMP_NUM_THREADS=1 gives both one thread.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from one_trainer import GPU_WORK, WORK

CHILD = Path(__file__).with_name("one_trainer.py")
SETTINGS = [(bf16, attention) for bf16 in (False, True) for attention in ("sdpa", "eager")]
COLUMNS = "{:13} {:15} {:>8} {:>9} {:>21} {:>8} {:>10} {:>6} {:>8} {:>10} {:>7}"
HEADING = COLUMNS.format(
    *(
        "shape",
        "TRL at its best",
        "TRL s",
        "tokenrl s",
        "ratio (min to max)",
        "TRL MB",
        "tokenrl MB",
        "ratio",
    ),
    *("floor s", "share: TRL", "tokenrl"),
)


@dataclass
class Comparison:
    """The rounds of one shape: (seconds a step, peak in MB) of both, by round; None where one failed.

    `floor` has the seconds of the matrix products alone, of the rounds in which they were measured.
    """

    name: str
    setting: tuple[bool, str] | None = None  # of TRL: whether bfloat16, and the attention
    trl: list[tuple[float, float] | None] = field(default_factory=list)
    tokenrl: list[tuple[float, float] | None] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)


def run(spec: dict[str, Any], *program: str) -> dict[str, Any] | None:
    """Measure in a new process, of `CHILD` or another; None if that failed, which is told on stderr."""
    command = [sys.executable, *(program or [str(CHILD)]), json.dumps(spec)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode == 0:
        return dict(json.loads(process.stdout.splitlines()[-1]))
    killed = "It was killed, perhaps for want of memory." if process.returncode < 0 else ""
    print(
        f"  failed: {json.dumps(spec)}\n{process.stderr[-1500:]}{killed}",
        file=sys.stderr,
        flush=True,
    )
    return None


def steady(values: Sequence[float], steps: int) -> float:
    """The median without the first of the `steps`."""
    return statistics.median(values[-steps:][3 if steps >= 6 else 1 :])


def seconds_and_peak(result: dict[str, Any] | None, steps: int) -> tuple[float, float] | None:
    return None if result is None else (steady(result["seconds"], steps), result["peak_mb"])


def compare(name: str, args: argparse.Namespace) -> Comparison:
    """Measure both in turn; once all settings of TRL have failed, it is not tried again."""
    comparison = Comparison(name)
    shape = (WORK | GPU_WORK)[name]
    spec = {"shape": asdict(shape), "steps": args.steps, "estimator": args.estimator}
    for number in range(args.rounds):
        settings = SETTINGS if number == 0 else [comparison.setting] if comparison.setting else []
        by_setting = {}
        for bf16, attention in settings:
            result = run(spec | {"who": "trl", "bf16": bf16, "attention": attention})
            by_setting[bf16, attention] = seconds_and_peak(result, args.steps)
            tell(
                f"{name}, round {number + 1}: TRL {words((bf16, attention))}",
                by_setting[bf16, attention],
            )
        done = {setting: measured for setting, measured in by_setting.items() if measured}
        if number == 0 and done:
            comparison.setting = min(done, key=lambda setting: done[setting][0])
        comparison.trl.append(done.get(comparison.setting) if comparison.setting else None)
        result = run(spec | {"who": "tokenrl", "options": args.tokenrl})
        comparison.tokenrl.append(seconds_and_peak(result, args.steps))
        tell(f"{name}, round {number + 1}: tokenrl", comparison.tokenrl[-1])
        # 0: all completions at full length
        tokens = statistics.median(result["tokens"]) if result else 0
        length = tokens / (shape.prompts * shape.group)
        products = run({"who": "floor", "shape": spec["shape"], "length": length})
        comparison.floor += [products["floor"]] if products else []
    return comparison


def tell(label: str, measured: tuple[float, float] | None) -> None:
    """Show progress on stderr, so that stdout has nothing but the table."""
    result = f"{measured[0]:.3f} s, {measured[1]:,.0f} MB" if measured else "failed"
    print(f"  {label}: {result}", file=sys.stderr, flush=True)


def words(setting: tuple[bool, str] | None) -> str:
    return f"{'bfloat16' if setting[0] else 'float32'} {setting[1]}" if setting else "failed"


def table_row(comparison: Comparison) -> str:
    """A line of the table; the ratios are of rounds in which neither failed."""

    def cells(rounds: list[tuple[float, float] | None]) -> tuple[float, float]:
        done = [measured for measured in rounds if measured] or [(math.nan, math.nan)]
        return statistics.median(seconds for seconds, _ in done), max(peak for _, peak in done)

    def written(values: Sequence[float], form: str) -> list[str]:
        return ["" if math.isnan(value) else f"{value:{form}}" for value in values]

    pairs = zip(comparison.trl, comparison.tokenrl, strict=True)
    ratios = [a[0] / b[0] for a, b in pairs if a and b]
    (theirs, their_mb), (ours, our_mb) = cells(comparison.trl), cells(comparison.tokenrl)
    times = (
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        if ratios
        else ""
    )
    least = statistics.median(comparison.floor or [math.nan])
    seconds = [text or "failed" for text in written((theirs, ours), ".3f")]
    row = [comparison.name, words(comparison.setting), *seconds, times]
    row += written((their_mb, our_mb), ",.0f") + written((their_mb / our_mb,), ".2f")
    row += written((least,), ".3f") + written((least / theirs, least / ours), ".2f")
    return COLUMNS.format(*row).rstrip()


def heading(args: argparse.Namespace) -> str:
    """The machine, the versions and the settings."""
    machine = run({"who": "machine"}) or {"threads": "?", "gpu": None}
    names = "torch", "transformers", "trl"
    versions = [f"{name} {version(name)}" for name in names if find_spec(name)]
    return (
        f"{machine['gpu'] or platform.machine()}, {os.cpu_count()} cores, "
        f"{machine['threads']} threads; {', '.join(versions)}; "
        f"{args.estimator}, rounds {args.rounds}, steps {args.steps}"
        + (f"; tokenrl with {json.dumps(args.tokenrl)}" if args.tokenrl else "")
    )


def option(text: str) -> tuple[str, Any]:
    """The key and the value of KEY=VALUE; a value that is no JSON is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} should be KEY=VALUE, such as threads=2")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = f"{', '.join(WORK)} (these are the default), {', '.join(GPU_WORK)}"
    names = {"choices": [*WORK, *GPU_WORK], "default": list(WORK), "metavar": "NAME", "help": words}
    parser.add_argument("--work", nargs="+", **names)
    parser.add_argument("--estimator", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of each measurement, 2 or more"
    )
    parser.add_argument("--tokenrl", nargs="+", type=option, default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 2:
        parser.error("--rounds must be 1 or more, and --steps 2 or more.")
    args.tokenrl = dict(args.tokenrl)
    print(heading(args), flush=True)
    print(HEADING, flush=True)
    for name in args.work:
        print(table_row(compare(name, args)), flush=True)


if __name__ == "__main__":
    main()
