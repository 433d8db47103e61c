"""Measures what dividing rows into passes by length saves, in updates of `tokenrl train` and of `tokenrl sft`.

A Llama of half a million, one or five million parameters learns from 64 completions of one prompt, of at most 64
tokens. Their lengths are all equal, uniform between half of the longest and the whole, or geometric with a
median of half of the longest. One run computes each update in one pass, because a pass is said to cost a billion
tokens. The other divides it by the rule. Both have the same completions, and they alternate in one process, so
that a machine that slows down slows both.

    python recipes/benchmarks/padding.py
    python recipes/benchmarks/padding.py --sizes 1 --rounds 5

Look for: the ratio of the seconds of an update, undivided over divided. It should be 1 where all lengths are
equal, and above 1 where padding was computed. It is the median over rounds, with the range.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from one_trainer import LETTERS, Shape, make_model, steady

import tokenrl
from tokenrl.language import TransformersGenerator, wrap
from tokenrl.runs import read_run

ROWS, LONGEST, STEPS = 64, 64, 5
SIZES = {
    "0.5": Shape(hidden=96, intermediate=384),
    "1": Shape(),
    "5": Shape(layers=6, hidden=256, intermediate=1024, heads=8, kv_heads=8),
}
"""Models by their millions of parameters."""
SPREADS = {
    "equal": lambda share: 1.0,
    "uniform": lambda share: 0.5 + share / 2,
    "geometric": lambda share: 0.25**share,
}
"""Lengths by their rank, from 0 to 1, as shares of the longest."""


def lengths_of(spread: str) -> list[int]:
    """The lengths of all completions in any order, the same for equal arguments."""
    shares = [SPREADS[spread](rank / (ROWS - 1)) for rank in range(ROWS)]
    return random.Random(0).sample([round(LONGEST * share) for share in shares], ROWS)


class Cut:
    """Samples with the usual generator, and cuts the completions to the lengths of a spread."""

    def __init__(self, policy: Any, rows_at_once: int | None = None, *, spread: str) -> None:
        self.usual = TransformersGenerator(policy, rows_at_once)
        self.lengths = torch.tensor(lengths_of(spread))
        self.sync, self.close = self.usual.sync, self.usual.close

    def generate(self, prompt_ids: Any, sampling: Any, draws: Any) -> Any:
        rows = self.usual.generate(prompt_ids, sampling, draws)
        ends = self.lengths[: len(rows)]
        mask = rows.mask & (torch.arange(rows.mask.shape[1]) < ends[:, None])
        names = "completion_ids", "sampling_logprobs", "logprobs", "entropy"
        columns = {name: torch.where(mask, getattr(rows, name), 0) for name in names}
        return replace(rows, mask=mask, **columns)


def update_seconds(kind: str, size: str, spread: str, **options: Any) -> tuple[float, float]:
    """Seconds of an update in a run of its own, and the share of padding."""
    model, tokenizer = make_model(SIZES[size])
    policy = wrap(model, tokenizer)
    policy.eos_ids = ()
    row = {"prompt": "!"}
    options |= {"model": policy, "max_steps": STEPS, "eval_every": 0, "quiet": True, "cpu": True}
    options |= {"learning_rate": 1e-4}
    with tempfile.TemporaryDirectory() as folder:
        if kind == "sft":
            letters = random.Random(1)
            rows = [
                row | {"completion": "".join(letters.choices(LETTERS[1:], k=length - 1))}
                for length in lengths_of(spread)
            ]
            tokenrl.sft(task=rows, batch_size=ROWS, output_dir=f"{folder}/run", **options)
        else:
            tokenrl.train(
                task=[row] * 2,
                reward=lambda completions, **_: [hash(text) % 7 for text in completions],
                estimator="rloo",
                prompts_per_step=1,
                num_generations=ROWS,
                max_completion_length=LONGEST,
                generator=partial(Cut, spread=spread),
                output_dir=f"{folder}/run",
                **options,
            )
        run = read_run(f"{folder}/run")
        name = "step_seconds" if kind == "sft" else "update"
        return steady([step[name] for step in run.timings]), run.series("padding")[1][-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--kinds", nargs="+", choices=["train", "sft"], default=["train", "sft"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| update | M parameters | lengths | padding: one pass, divided | s | ratio (range) |")
    print("|---|---|---|---|---|---|")
    for kind, size, spread in itertools.product(args.kinds, args.sizes, SPREADS):
        ratios = []
        for _ in range(args.rounds):
            whole, padding = update_seconds(kind, size, spread, pass_overhead=10**9)
            divided, rest = update_seconds(kind, size, spread)
            ratios.append(whole / divided)
        cells = [kind, size, spread, f"{padding:.2f}, {rest:.2f}", f"{whole:.3f}, {divided:.3f}"]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {' | '.join([*cells, ratio])} |", flush=True)


if __name__ == "__main__":
    main()
