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

With `--until-reward`, both start from the same warm-started model of a toy task and train until the mean of
four evaluations reaches a held-out reward, with the round as the seed. The seconds count from the start of
the process, with imports and loading, without the evaluations. TRL then has float32 and `sdpa`.

    pip install -c constraints.txt -e '.[benchmarks]'
    python recipes/benchmarks/step_against_trl.py
    python recipes/benchmarks/step_against_trl.py --work fixed lora --estimator rloo
    python recipes/benchmarks/step_against_trl.py --work 135m --tokenrl mixed_precision=bf16 seed=1
    python recipes/benchmarks/step_against_trl.py --until-reward sort_digits reverse_text

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

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from one_race import recent_reward
from one_trainer import GPU_WORK, WORK

CHILD = Path(__file__).with_name("one_trainer.py")
RACER = str(CHILD.with_name("one_race.py"))
SETTINGS: list[dict[str, Any]] = [
    {"bf16": bf16, "attention": attention}
    for bf16 in (False, True)
    for attention in ("sdpa", "eager")
]
COLUMNS = ("shape", "TRL at its best", "TRL, s", "tokenrl, s", "ratio of a round (range)")
COLUMNS += ("peak MB: TRL", "tokenrl")
TARGETS = {"sort_digits": 0.95, "reverse_text": 0.85}
"""Tasks, and the held-out reward of greedy completions that is to be reached."""
RACE_COLUMNS = ("task", "held-out reward", "TRL, s (steps)", "tokenrl, s (steps)")
RACE_COLUMNS += ("ratio of a seed (range)", "reached by both")
Results = list[dict[str, Any] | None]
"""The results of one trainer by round; None where it failed."""


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


def alternate(
    label: str,
    spec: dict[str, Any],
    settings: Sequence[dict[str, Any]],
    args: argparse.Namespace,
    *program: str,
) -> tuple[dict[str, Any] | None, Results, Results]:
    """Measure TRL and tokenrl in turn.

    The first round tries all settings of TRL, and the later ones only the fastest. Without TRL, or once all
    its settings have failed, only tokenrl is measured.

    Returns:
        The fastest setting of TRL, and the results of TRL and of tokenrl by round.
    """
    theirs: Results = []
    ours: Results = []
    settings = list(settings) if find_spec("trl") else []
    for number in range(args.rounds):
        finished = []
        for setting in settings:
            result = measured(
                spec | {"who": "trl"} | setting,
                f"{label}, round {number + 1}: TRL {words(setting)}",
                program,
            )
            if result:
                finished.append((steady(result["seconds"], args.steps), setting, result))
        fastest = min(finished, key=lambda entry: entry[0], default=None)
        theirs.append(fastest[2] if fastest else None)
        if number == 0:
            settings = [fastest[1]] if fastest else []
        job = spec | {"who": "tokenrl", "options": args.tokenrl}
        ours.append(measured(job, f"{label}, round {number + 1}: tokenrl", program))
    return settings[0] if settings else None, theirs, ours


def measured(spec: dict[str, Any], label: str, program: Sequence[str]) -> dict[str, Any] | None:
    """Measure, and show progress on stderr, so that stdout has nothing but the table."""
    result = run(spec, *program)
    outcome = "failed"
    if result:
        seconds = steady(result["seconds"], spec["steps"])
        outcome = f"{seconds:.3f} s, {result['peak_mb']:,.0f} MB"
    print(f"  {label}: {outcome}", file=sys.stderr, flush=True)
    return result


def words(setting: dict[str, Any] | None) -> str:
    if setting is None:
        return "failed" if find_spec("trl") else "not installed"
    return f"{'bfloat16' if setting['bf16'] else 'float32'} {setting['attention']}"


def with_range(ratios: Sequence[float]) -> str:
    """The median of ratios with its range; nothing where there are none."""
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def times(theirs: Results, ours: Results, steps: int) -> list[str]:
    """Seconds of TRL and of tokenrl, and their ratio, which is of rounds in which neither failed."""
    cells = []
    for results, missing in ((theirs, words(None)), (ours, "failed")):
        seconds = [steady(result["seconds"], steps) for result in results if result]
        cells.append(f"{statistics.median(seconds):.3f}" if seconds else missing)
    pairs = [(a, b) for a, b in zip(theirs, ours, strict=True) if a and b]
    ratios = [steady(a["seconds"], steps) / steady(b["seconds"], steps) for a, b in pairs]
    return [*cells, with_range(ratios)]


def peak(results: Results) -> str:
    """The most memory of any round."""
    peaks = [result["peak_mb"] for result in results if result]
    return f"{max(peaks):,.0f}" if peaks else ""


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_heading(args: argparse.Namespace, columns: Sequence[str]) -> None:
    """The machine, the versions and the settings, and the names of the columns."""
    machine = run({"who": "machine"}) or {"threads": "?", "gpu": None}
    names = "torch", "transformers", "trl"
    versions = [f"{name} {version(name)}" for name in names if find_spec(name)]
    options = f"; tokenrl with {json.dumps(args.tokenrl)}" if args.tokenrl else ""
    print(
        f"{machine['gpu'] or platform.machine()}, {os.cpu_count()} cores, "
        f"{machine['threads']} threads; {', '.join(versions)}; "
        f"rounds {args.rounds}, steps {args.steps}{options}\n"
    )
    print_row(columns)
    print(f"|{'---|' * len(columns)}", flush=True)


def shape_row(name: str, args: argparse.Namespace) -> list[str]:
    """Measure both on a shape; returns a row of the table."""
    shape = asdict((WORK | GPU_WORK)[name])
    spec = {"shape": shape, "steps": args.steps, "estimator": args.estimator}
    setting, theirs, ours = alternate(name, spec, SETTINGS, args)
    return [name, words(setting), *times(theirs, ours, args.steps), peak(theirs), peak(ours)]


def race_row(name: str, args: argparse.Namespace) -> list[str]:
    """Train with both in turn until the held-out reward, with a seed for each round; returns a row."""
    import torch  # noqa: F401  # before tokenrl, which then sets no variable that both would inherit

    import tokenrl.language as language

    model = str(language.warm_started_base(language.load_task(name)))
    spec = {"task": name, "model": model, "target": TARGETS[name], "prompts": 16, "steps": 200}
    spec |= {"estimator": args.estimator, "options": args.tokenrl}
    races = []
    for seed in range(args.rounds):
        started = [
            run(spec | {"who": who, "seed": seed, "started": time.time()}, RACER)
            for who in ("trl", "tokenrl")
        ]
        races.append([result["history"] for result in started if result])
    return [name, *race_cells(TARGETS[name], races)]


def race_cells(target: float, races: Sequence[Sequence[Any]]) -> list[str]:
    """The cells of a row, of the seeds with which both reached the target.

    Args:
        target: the held-out reward.
        races: by seed the histories of TRL and of tokenrl; fewer where one failed.
    """
    both = [race for race in races if len(race) == 2 and min(map(recent_reward, race)) >= target]
    reached = f"{len(both)} of {len(races)} seeds"
    if not both:
        return [f"{target:.2f}", "", "", "", reached]
    start = statistics.median(ours[0][2] for _, ours in both)
    cells = [f"{start:.3f} to {target:.2f}"]
    for histories in zip(*both, strict=True):
        steps, seconds, _ = map(statistics.median, zip(*(h[-1] for h in histories), strict=True))
        cells.append(f"{seconds:.1f} ({steps:.0f})")
    return [*cells, with_range([theirs[-1][1] / ours[-1][1] for theirs, ours in both]), reached]


def option(text: str) -> tuple[str, Any]:
    """The key and the value of KEY=VALUE; a value that is no JSON is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} should be KEY=VALUE, such as threads=2")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parsed(parser: argparse.ArgumentParser, steps: int) -> argparse.Namespace:
    """The arguments, with those that all benchmarks against TRL have."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=steps, help="steps of each measurement, 2 or more"
    )
    parser.add_argument("--tokenrl", nargs="+", type=option, default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 2:
        parser.error("--rounds must be 1 or more, and --steps 2 or more.")
    args.tokenrl = dict(args.tokenrl)
    return args


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = f"{', '.join(WORK)} (these are the default), {', '.join(GPU_WORK)}"
    names = {
        "choices": [*WORK, *GPU_WORK],
        "default": list(WORK),
        "metavar": "NAME",
        "help": shapes,
    }
    parser.add_argument("--work", nargs="+", **names)
    parser.add_argument("--estimator", choices=("grpo", "rloo"), default="grpo")
    until = "instead: the seconds until a held-out reward of these tasks"
    parser.add_argument("--until-reward", nargs="+", choices=TARGETS, metavar="TASK", help=until)
    args = parsed(parser, steps=10)
    print_heading(args, RACE_COLUMNS if args.until_reward else COLUMNS)
    for name in args.until_reward or args.work:
        print_row(race_row(name, args) if args.until_reward else shape_row(name, args))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
