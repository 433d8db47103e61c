"""Measures seconds and memory of a training step against TRL, shape by shape, on one machine.

Both train the same new model on the same prompts, with the same group size, completion length, reward,
learning rate, AdamW and number of updates, without a KL. TRL gets the best of four settings: float32 or
bfloat16 (autocast), with the attention `sdpa` or `eager`. The first round tries all four, the later ones only
the one that was fastest. tokenrl has its default flags, to which `--tokenrl` adds others. Neither recomputes
activations.

Rounds alternate (TRL, tokenrl, TRL, tokenrl ...), so that a machine that slows down slows both. Each
measurement is a process of its own (`one_trainer.py`, which holds the shapes), and its first 3 steps are left
out (of fewer than 6 steps, the first). The table has medians over rounds, the ratio of the seconds with its
range, and the most memory of any round: of the process, or on a GPU of its tensors.

    pip install -c constraints.txt -e '.[benchmarks]'
    python recipes/benchmarks/step_against_trl.py
    python recipes/benchmarks/step_against_trl.py --work fixed lora --estimator rloo
    python recipes/benchmarks/step_against_trl.py --work 135m --tokenrl mixed_precision=bf16 seed=1
    python recipes/benchmarks/step_against_trl.py --scaling

`--scaling` measures tokenrl alone, around the model of 1 M parameters, with three sizes of one thing at a
time: the exponent e of seconds = constant x size^e, by least squares of the logarithms.

Look for: ratios above 1, where tokenrl takes less. They should grow with the prompt, which tokenrl reads once
for its group, and with the vocabulary. Exponents are at most near 1, and below 1 where a part of the cost is
fixed. Measure on a quiet machine: on a busy one, threads that wait for each other make TRL, which uses them
all, up to ten times slower, and the ratio says nothing. OMP_NUM_THREADS=1 gives both one thread.
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
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from one_trainer import WORK, Shape

from tokenrl.language import TrainArguments  # without torch, so that this process stays small

CHILD = Path(__file__).with_name("one_trainer.py")
SETTINGS = [(bf16, attention) for bf16 in (False, True) for attention in ("sdpa", "eager")]
LARGE = ("memory",)  # only where asked for
SIZES: dict[str, list[Shape]] = {
    "prompts": [Shape(prompts=n) for n in (4, 8, 16)],
    "group": [Shape(group=n) for n in (4, 8, 16)],
    "length": [Shape(length=n) for n in (16, 32, 64)],
    "vocabulary": [Shape(vocabulary=n) for n in (96, 1_000, 10_000)],
    "parameters": [Shape(hidden=n, intermediate=4 * n) for n in (64, 128, 256)],
}
HEADING = (
    f"{'shape':13} {'TRL at its best':15} {'TRL s':>8} {'tokenrl s':>9} {'ratio (min to max)':>21} "
    f"{'TRL MB':>8} {'tokenrl MB':>10} {'ratio':>6}"
)


@dataclass
class Comparison:
    """The rounds of one shape: (seconds a step, peak in MB) of both, by round; None where one failed."""

    name: str
    setting: tuple[bool, str] | None = None  # of TRL: whether bfloat16, and the attention
    trl: list[tuple[float, float] | None] = field(default_factory=list)
    tokenrl: list[tuple[float, float] | None] = field(default_factory=list)


def run(asked: dict[str, Any], *program: str) -> dict[str, Any] | None:
    """Measure in a new process, of `CHILD` or another; None if that failed, which is told on stderr."""
    command = [sys.executable, *(program or [str(CHILD)]), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    killed = "It was killed, perhaps for want of memory." if done.returncode < 0 else ""
    print(f"  failed: {json.dumps(asked)}\n{done.stderr[-1500:]}{killed}", file=sys.stderr, flush=True)
    return None


def steady(values: Sequence[float], steps: int) -> float:
    """The median without the first of the `steps`."""
    return statistics.median(values[-steps:][3 if steps >= 6 else 1 :])


def seconds_and_peak(found: dict[str, Any] | None, steps: int) -> tuple[float, float] | None:
    return None if found is None else (steady(found["seconds"], steps), found["peak_mb"])


def compare(name: str, args: argparse.Namespace) -> Comparison:
    """Measure both in turn; once all settings of TRL have failed, it is not tried again."""
    comparison = Comparison(name)
    asked = {"shape": asdict(WORK[name]), "steps": args.steps, "estimator": args.estimator}
    for number in range(args.rounds):
        settings = SETTINGS if number == 0 else [comparison.setting] if comparison.setting else []
        found = {}
        for bf16, attention in settings:
            result = run(asked | {"who": "trl", "bf16": bf16, "attention": attention})
            found[bf16, attention] = seconds_and_peak(result, args.steps)
            tell(f"{name}, round {number + 1}: TRL {words((bf16, attention))}", found[bf16, attention])
        done = {setting: measured for setting, measured in found.items() if measured}
        if number == 0 and done:
            comparison.setting = min(done, key=lambda setting: done[setting][0])
        comparison.trl.append(done.get(comparison.setting) if comparison.setting else None)
        result = run(asked | {"who": "tokenrl", "options": args.tokenrl})
        comparison.tokenrl.append(seconds_and_peak(result, args.steps))
        tell(f"{name}, round {number + 1}: tokenrl", comparison.tokenrl[-1])
    return comparison


def tell(what: str, measured: tuple[float, float] | None) -> None:
    """Show progress on stderr, so that stdout has nothing but the table."""
    result = f"{measured[0]:.3f} s, {measured[1]:,.0f} MB" if measured else "failed"
    print(f"  {what}: {result}", file=sys.stderr, flush=True)


def words(setting: tuple[bool, str] | None) -> str:
    return f"{'bfloat16' if setting[0] else 'float32'} {setting[1]}" if setting else "failed"


def table_row(comparison: Comparison) -> str:
    """A line of the table; the ratios are of rounds in which neither failed."""

    def cells(rounds: list[tuple[float, float] | None]) -> tuple[str, str, float]:
        done = [measured for measured in rounds if measured]
        if not done:
            return "failed", "", math.nan
        peak = max(peak for _, peak in done)
        return f"{statistics.median(seconds for seconds, _ in done):.3f}", f"{peak:,.0f}", peak

    pairs = zip(comparison.trl, comparison.tokenrl, strict=True)
    ratios = [a[0] / b[0] for a, b in pairs if a and b]
    (theirs, their_mb, a), (ours, our_mb, b) = cells(comparison.trl), cells(comparison.tokenrl)
    times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
    peaks = f"{a / b:.2f}" if a / b > 0 else ""
    return (
        f"{comparison.name:13} {words(comparison.setting):15} {theirs:>8} {ours:>9} {times:>21} "
        f"{their_mb:>8} {our_mb:>10} {peaks:>6}"
    ).rstrip()


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The e of the best constant x size^e."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def scaling(args: argparse.Namespace) -> list[str]:
    """Measure each size in each round, and return the lines of the table."""
    found: dict[Shape, list[dict[str, Any]]] = {shape: [] for shapes in SIZES.values() for shape in shapes}
    for number in range(args.rounds):
        for shape, results in found.items():
            asked = {"shape": asdict(shape), "steps": args.steps, "estimator": args.estimator}
            result = run(asked | {"who": "tokenrl", "options": args.tokenrl})
            tell(f"round {number + 1}: {shape}", seconds_and_peak(result, args.steps))
            results += [result] if result else []
    return [
        f"{'grows':11} {'sizes':>28} {'seconds a step':>22} {'exponent':>8}",
        *(scaling_row(name, [found[shape] for shape in SIZES[name]], args.steps) for name in SIZES),
    ]


def scaling_row(name: str, results: list[list[dict[str, Any]]], steps: int) -> str:
    """A line of the table, from the rounds of each size."""
    if not all(results):
        return f"{name:11} failed"
    if name == "parameters":
        sizes = [rounds[0]["parameters"] for rounds in results]
    else:
        sizes = [getattr(shape, name) for shape in SIZES[name]]
    seconds = [statistics.median(steady(one["seconds"], steps) for one in rounds) for rounds in results]
    return (
        f"{name:11} {', '.join(f'{size:,}' for size in sizes):>28} "
        f"{', '.join(f'{one:.3f}' for one in seconds):>22} {exponent(sizes, seconds):8.2f}"
    )


def heading(args: argparse.Namespace) -> str:
    """The machine, the versions and the settings."""
    found = run({"who": "machine"}) or {"threads": "?", "gpu": None}
    names = ["torch", "transformers"] + ["trl"] * (not args.scaling)
    return (
        f"{found['gpu'] or platform.machine()}, {os.cpu_count()} cores, "
        f"{found['threads']} threads; {', '.join(f'{name} {version(name)}' for name in names)}; "
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
    usual = [name for name in WORK if name not in LARGE]
    parser.add_argument(
        "--work", nargs="+", choices=WORK, default=usual, metavar="NAME", help=", ".join(WORK)
    )
    parser.add_argument("--estimator", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps of each measurement, 2 or more")
    parser.add_argument("--tokenrl", nargs="+", type=option, default=[], metavar="KEY=VALUE")
    parser.add_argument("--scaling", action="store_true", help="how tokenrl's step grows, without TRL")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 2:
        parser.error("--rounds must be 1 or more, and --steps 2 or more.")
    args.tokenrl = dict(args.tokenrl)
    if unknown := args.tokenrl.keys() - {field.name for field in fields(TrainArguments)}:
        parser.error(f"--tokenrl: tokenrl.train has no option {', '.join(sorted(unknown))}.")
    print(heading(args), flush=True)
    if args.scaling:
        print("\n".join(scaling(args)))
        return
    print(HEADING, flush=True)
    for name in args.work:
        print(table_row(compare(name, args)), flush=True)


if __name__ == "__main__":
    main()
