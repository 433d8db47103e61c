"""Checks and measures tokenrl on your GPU (CUDA, or Apple's MPS), and prints tables in Markdown.

Nearly all numbers on our pages come from CPUs, so tables from a GPU are welcome: send what this program
prints as an issue. It downloads nothing: the models have random weights and are made here. It takes ten
minutes at most (`--minutes`); what does not fit into them is left out and named. Each measurement is a
process of its own, of this program's second file `gpu_parts.py` or of `one_trainer.py`; if it fails, its
line says why and the rest goes on.

1. Numbers: the same training in float32 (without TF32), with the same seed, on the CPU and on the GPU, for
   three estimators. Rounding alone may lie between them. It can also flip a token, which changes all that
   follows, so metrics are compared for as long as the completions agree (if that is not long, `--seed 1`).
2. Precision: how far log-probabilities of the same tokens in TF32 and bfloat16 are from those in float32.
   The logits of random weights are nearly equal, so they are scaled to a standard deviation of 3.
3. Speed: seconds of a step and peak memory for models of 1 M to 1.5 B parameters, tokenrl with its default
   flags, beside TRL where it is installed, with the attention `sdpa` and in bfloat16 where the GPU has it.
   Tokens a second are those of completions.

    python recipes/benchmarks/on_your_gpu.py --output table.md
    pip install -c constraints.txt -e '.[benchmarks]'        # for TRL beside it
    python recipes/benchmarks/on_your_gpu.py --cpu --tiny    # tries the program out, without a GPU

Look for: the verdict "equal up to rounding" three times. "float32 again" says whether the device repeats its
own numbers. On a CPU, the gaps of bfloat16 are .035 nats in the mean and .19 at most.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_parts import ESTIMATORS
from one_trainer import GPU_WORK, Shape
from step_against_trl import steady

RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""Rounding may change a metric by this share of its largest value on the CPU, and by this much beside it.

Attention by another formula, on a CPU, changed metrics by far less; bfloat16 changed the norm of the gradient
by more.
"""
FOLDER = Path(__file__).parent
TINY = Shape(
    prompts=2, group=4, length=4, layers=1, hidden=16, intermediate=16, heads=2, kv_heads=1
)
LEAST_SECONDS = 10.0
"""A measurement with less time than this is left out; importing torch takes as long on some machines."""
PACKAGES = "tokenrl-lm", "torch", "transformers", "accelerate", "trl"
Rows = list[dict[str, float | None]]


@dataclass
class Budget:
    """Runs measurements as processes until the time `ends` (of `time.monotonic`)."""

    ends: float

    def run(self, label: str, job: dict[str, Any], program: str = "gpu_parts.py") -> dict[str, Any]:
        """The result of a program's process, or its `error` in a line."""
        remaining, began = self.ends - time.monotonic(), time.monotonic()
        if remaining < LEAST_SECONDS:
            return {"error": "left out, since the time was used up"}
        command = [sys.executable, str(FOLDER / program), json.dumps(job)]
        settings = os.environ | {"HF_HUB_OFFLINE": "1"}
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, timeout=remaining, env=settings
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done in the {remaining:.0f} s that were left"}
        finally:
            print(f"  {label}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if process.returncode == 0 and process.stdout.strip():
            return dict(json.loads(process.stdout.splitlines()[-1]))
        print(process.stderr[-3000:], file=sys.stderr, flush=True)
        return {"error": reason(process.stderr, process.returncode)}


def reason(text: str, code: int) -> str:
    """Why a process failed, in a line, by what it wrote on stderr."""
    if re.search("out of memory|not enough memory", text):
        return "out of memory"
    if code < 0:
        return f"ended by signal {-code}" + (", perhaps for want of memory" if code == -9 else "")
    lines = [line for line in text.splitlines() if line.strip()] or ["no message"]
    errors = [
        line for line in lines if re.match(r"[\w.]*(Error|Exception|Refused|Stopped|Exit)\b", line)
    ]
    return (errors or lines)[-1]


# ---- the tables ----


def table(heading: str, *rows: list[str]) -> str:
    """A heading and a table in Markdown, of which the first row names the columns."""
    cells = [[" ".join(cell.replace("|", "/").split())[:300] for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join([f"**{heading}**", "", *(f"| {' | '.join(row)} |" for row in cells), ""])


def machine_table(about: dict[str, Any], args: argparse.Namespace) -> str:
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} is not installed")
    git = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    flags = [flag for flag in ("cpu", "tiny") if getattr(args, flag)]
    return table(
        "tokenrl on a device",
        ["device", about["name"]],
        ["its memory", f"{about['memory'] / 2**30:.1f} GiB"],
        ["processor", f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"],
        ["versions", f"Python {platform.python_version()}, {', '.join(packages)}"],
        ["commit of tokenrl", commit or "none"],
        ["asked for", ", ".join([*flags, f"{args.minutes:g} minutes", f"seed {args.seed}"])],
    )


def agreeing_steps(here: Rows, there: Rows) -> int:
    """How many steps from the first on have equal rewards and lengths of completions."""
    for number, (a, b) in enumerate(zip(here, there, strict=False)):
        for name in ("reward", "completions/mean_length"):
            if not math.isclose(a[name] or 0, b[name] or 0, rel_tol=1e-6, abs_tol=1e-9):
                return number
    return min(len(here), len(there))


def differences(here: Rows, there: Rows) -> dict[str, tuple[float, float]]:
    """By metric the largest difference between rows, and the most that rounding explains."""
    largest: dict[str, tuple[float, float]] = {}
    for name in sorted({*here[-1], *there[-1]}):
        pairs = [(a.get(name), b.get(name)) for a, b in zip(here, there, strict=True)]
        unequal = [abs(a - b) if None not in (a, b) else math.inf for a, b in pairs if a != b]
        sizes = [abs(a) for a, _ in pairs if a is not None]
        largest[name] = max(unequal, default=0.0), RELATIVE * max(sizes, default=0.0) + ABSOLUTE
    return largest


def verdict(here: Rows, there: Rows) -> tuple[str, dict[str, tuple[float, float]]]:
    """Whether two trainings are equal up to rounding, in words, and how far their metrics are apart."""
    if len(here) != len(there):
        return f"not equal: {len(there)} steps in place of {len(here)}", {}
    steps = agreeing_steps(here, there)
    largest = differences(here[: steps or 1], there[: steps or 1])
    apart = [name for name, (size, most) in largest.items() if size > most]
    if steps == 0:
        return "not equal: the completions of the first step differ", largest
    judged = f"not equal: {', '.join(apart)}" if apart else "equal up to rounding"
    if steps < len(here):
        judged += f" in the first {steps} of {len(here)} steps, after which completions differ"
    return judged, largest


def numbers_tables(here: dict[str, Any], there: dict[str, Any], heading: str) -> str:
    """The verdicts, and the metrics that differ at all."""
    verdicts = [["training", "verdict", "steps with equal completions"]]
    by_metric: dict[str, dict[str, str]] = {}
    for name in ESTIMATORS:
        sides = [side if "error" in side else side[name] for side in (here, there)]
        errors = [side["error"] for side in sides if "error" in side]
        if errors:
            verdicts.append([name, f"failed: {errors[0]}", ""])
            continue
        judged, largest = verdict(*sides)
        verdicts.append([name, judged, f"{agreeing_steps(*sides)} of {len(sides[0])}"])
        for metric, (size, _) in largest.items():
            by_metric.setdefault(metric, {})[name] = f"{size:.1e}" if size else "0"
    rows = [
        [metric, *(sizes.get(name, "") for name in ESTIMATORS)]
        for metric, sizes in by_metric.items()
        if {*sizes.values()} != {"0"}
    ]
    columns = ["largest difference of", *ESTIMATORS]
    equal = f"{len(by_metric) - len(rows)} of {len(by_metric)} metrics do not differ at all"
    verdict_table = table(heading, *verdicts) + "\n"
    if not rows:
        return f"{verdict_table}{equal}.\n"
    return verdict_table + table(f"Differences: {equal}", columns, *rows)


def gaps_table(gaps: dict[str, Any], heading: str) -> str:
    if "error" in gaps:
        return table(heading, ["failed", gaps["error"]])
    rows = [
        [name, f"{values[0]:.1e}", f"{values[1]:.1e}"]
        if values
        else [name, "there is none here", ""]
        for name, values in gaps.items()
    ]
    return table(heading, ["precision", "mean, nats", "largest, nats"], *rows)


def speed_row(name: str, ours: dict[str, Any], theirs: dict[str, Any], steps: int) -> list[str]:
    """A line of the table of speed: seconds, those of sampling, tokens a second and memory; and of TRL."""
    row, seconds = [name], []
    for result in (ours, theirs):
        if "error" in result:
            row += [result["error"], "", ""]
            continue
        seconds.append(steady(result["seconds"], steps))
        rate = statistics.median(result["tokens"]) / seconds[-1]
        row += [f"{seconds[-1]:.3f}", f"{rate:,.0f}", f"{result['peak_mb']:,.0f}"]
    row.insert(2, f"{steady(ours['sampling'], steps):.3f}" if "sampling" in ours else "")
    return [*row, f"{seconds[1] / seconds[0]:.2f}" if len(seconds) == 2 else ""]


def speed_table(args: argparse.Namespace, budget: Budget, bf16: bool) -> str:
    shapes = {"tiny": TINY} if args.tiny else {name: GPU_WORK[name] for name in args.work}
    steps, rows = steps_of(args), list[list[str]]()
    installed = importlib.util.find_spec("trl") is not None
    for name, shape in shapes.items():
        job = {"shape": asdict(shape), "steps": steps, "cpu": args.cpu}
        ours = budget.run(f"speed, {name}, tokenrl", job | {"who": "tokenrl"}, "one_trainer.py")
        theirs = {"error": "not installed"}
        if installed:
            job |= {"who": "trl", "bf16": bf16}
            theirs = budget.run(f"speed, {name}, TRL", job, "one_trainer.py")
        rows.append(speed_row(name, ours, theirs, steps))
    columns = ["shape", "tokenrl: s a step", "sampling s", "tokens/s", "peak MB"]
    columns += [
        f"TRL ({'bfloat16' if bf16 else 'float32'}): s a step",
        "tokens/s",
        "peak MB",
        "ratio of s",
    ]
    work = words(next(iter(shapes.values())))  # they differ in the model alone
    left_out = 1 if args.tiny else 3
    heading = f"Speed of GRPO, {work}, medians of {steps} steps without the first {left_out}"
    return table(heading, columns, *rows)


def words(shape: Shape) -> str:
    completions = f"{shape.prompts} x {shape.group} completions of {shape.length} tokens"
    return f"{completions}, prompts of {shape.prompt}"


def steps_of(args: argparse.Namespace) -> int:
    return 2 if args.tiny else 6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="a file for the tables, beside stdout")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="the most time that all of it takes"
    )
    parser.add_argument(
        "--work", nargs="+", choices=GPU_WORK, default=list(GPU_WORK), metavar="NAME"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the trainings whose numbers are compared"
    )
    parser.add_argument("--cpu", action="store_true", help="measure the CPU in place of a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few steps, as a trial")
    args = parser.parse_args()
    budget = Budget(time.monotonic() + 60 * args.minutes)
    common = {"cpu": args.cpu, "tiny": args.tiny, "seed": args.seed, "steps": steps_of(args)}
    about = budget.run("the device", common | {"part": "describe_device"})
    if "error" in about or (about["kind"] == "cpu" and not args.cpu):
        missing = about.get("error", "neither CUDA nor Apple's MPS")
        print(
            f"torch has no GPU here ({missing}). To try this program: --cpu --tiny.",
            file=sys.stderr,
        )
        return 2
    sections: list[str] = []

    def show(section: str) -> None:
        print(section, flush=True)
        sections.append(section)
        if args.output:
            args.output.write_text("\n".join(sections))

    show(machine_table(about, args))
    kind, job = about["kind"], common | {"part": "train_estimators"}
    here = budget.run("numbers, cpu", job | {"cpu": True})
    there = budget.run(f"numbers, {kind}", job)
    show(numbers_tables(here, there, f"Numbers of {kind} beside the CPU's, task vowels, float32"))
    tiny = {"shape": asdict(TINY)} if args.tiny else {}
    gaps = budget.run("precision", common | {"part": "measure_gaps", "work": "gpu-135m"} | tiny)
    name = "tiny" if args.tiny else "gpu-135m"
    show(gaps_table(gaps, f"Gaps in log-probability to float32, {name}"))
    show(speed_table(args, budget, about["bf16"]))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
