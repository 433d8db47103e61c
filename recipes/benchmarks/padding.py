"""Measures what it saves to divide rows into passes by length, in updates of `tokenrl train` and `tokenrl sft`.

A Llama of about half a million, one or five million parameters learns from 64 completions of one prompt. `sft`
learns from lengths that are all 64, uniform between 32 and 64, or geometric between 16 and 64, with a median of
32. `train` samples at most 64 tokens, of which none, one or two in 96 end a completion; with two, half of the
completions are shorter than 33. Runs that compute an update in one pass alternate with runs that divide it.

    python recipes/benchmarks/padding.py

Look for: ratios of the seconds of an update in one pass to those of a divided update, as the median and the range
of five pairs. They should be 1 for equal lengths, and above 1 where much of the pass was padding.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import sys
from statistics import median
from tempfile import TemporaryDirectory

from one_trainer import Shape, make_model, steady

import tokenrl
from tokenrl.language import wrap
from tokenrl.runs import read_run

SIZES = {"0.5": (4, 96), "1": (4, 128), "5": (6, 256)}
LENGTHS = {
    "equal": [64] * 64,
    "uniform": [32 + row // 2 for row in range(1, 65)],
    "geometric": [round(64 * 0.25 ** (row / 63)) for row in range(64)],
}


def measured(kind, size, ends, **options):
    """Seconds of an update, and its padding."""
    layers, hidden = SIZES[size]
    shape = Shape(layers=layers, hidden=hidden, intermediate=4 * hidden, ends=ends)
    options["model"] = policy = wrap(*make_model(shape))
    policy.eos_ids = policy.eos_ids if ends else ()
    rows = [{"prompt": "!", "completion": "#" * (n - 1)} for n in [*LENGTHS.values()][ends]]
    if kind == "train":
        rows = [{"prompt": "!"}] * 2
        options |= {
            "estimator": "rloo",
            "prompts_per_step": 1,
            "num_generations": 64,
            "max_completion_length": 64,
            "reward": lambda completions, **_: [*range(len(completions))],
        }
    else:
        options["batch_size"] = 64
    with TemporaryDirectory() as folder:
        options |= {"max_steps": 5, "eval_every": 0, "cpu": True, "quiet": True}
        getattr(tokenrl, kind)(task=rows, output_dir=f"{folder}/run", **options)
        run = read_run(f"{folder}/run")
        name = {"train": "update", "sft": "step_seconds"}[kind]
        return steady([row[name] for row in run.timings]), median(run.series("padding")[1])


print(
    "| update | parameters | lengths | padding, one pass | divided | seconds, one pass | divided | ratio (range) |\n"
    "|---|---|---|---|---|---|---|---|"
)
for kind in ("train", "sft"):
    for size in sys.argv[1:] or SIZES:
        for ends, spread in enumerate(LENGTHS):
            ratios = []
            for _ in range(5):
                whole, padding = measured(kind, size, ends, pass_overhead=10**9)
                divided, rest = measured(kind, size, ends)
                ratios.append(whole / divided)
            ratios.sort()
            print(
                f"| {kind} | {size} M | {spread} | {padding:.2f} | {rest:.2f} | {whole:.3f} | {divided:.3f} "
                f"| {ratios[2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                flush=True,
            )
