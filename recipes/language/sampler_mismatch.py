"""Does a sampler that differs from the trainer break a run, and does a correction save it? Six seeds of each.

    python recipes/language/sampler_mismatch.py                                 weights up to 7 updates old
    python recipes/language/sampler_mismatch.py --mismatches bits=3 temperature=1.3 --corrections none

A mismatch is `old=8` (the sampler gets new weights at every eighth step), `bits=4` (its weights are rounded
to so many bits; 16: bfloat16), or a `temperature`, `top_p` or `min_p` of which the trainer knows nothing.
Evaluations are greedy, by the weights of the trainer. Look for the arm whose curves fall while it trains, and
for what weights of whole sequences make of it.
Runs that are in the folder already are read, not trained again. `recipes/pages/explain/off_policy.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import tyro
from matplotlib.figure import Figure

import tokenrl
from tokenrl.lab import judge_scores
from tokenrl.language import (
    TransformersGenerator,
)
from tokenrl.runs import read_run

CORRECTIONS = {
    "none": ("", "#D55E00"),
    "token": (",importance=token,importance_cap=2", "#E69F00"),
    "geometric": (",importance=geometric", "#CC79A7"),
    "sequence": (",importance=sequence,importance_cap=2", "#009E73"),
}
APART = ("logp_difference/mean", "effective_sample_size")


class Engine:
    """Samples from a copy of the weights, which differs from the policy or is sampled in another way."""

    def __init__(self, policy, rows_at_once=None, *, mismatch: str) -> None:
        self.kind, _, value = mismatch.partition("=")
        self.value, self.syncs = float(value or 0), 0
        self.copy = replace(policy, model=deepcopy(policy.model))
        if mismatch == "bits=16":
            self.copy.model.bfloat16()
        self.greedy = TransformersGenerator(policy)
        self.engine = TransformersGenerator(self.copy)

    def sync(self, policy) -> None:
        self.syncs += 1
        if self.kind == "old" and (self.syncs - 1) % self.value:
            return
        for copied, weight in zip(
            self.copy.model.parameters(), policy.model.parameters(), strict=True
        ):
            copied.data.copy_(weight.data)  # which rounds to bfloat16
            # each row to its own multiples
            if self.kind == "bits" and self.value < 16 and weight.ndim == 2:
                unit = weight.data.abs().amax(1, keepdim=True).clamp(min=1e-9) / (
                    2 ** (self.value - 1) - 1
                )
                copied.data.copy_((weight.data / unit).round() * unit)
        self.engine.sync(self.copy)

    def generate(self, prompt_ids, sampling, draws):
        if draws is None:  # greedy, as in evaluations
            return self.greedy.generate(prompt_ids, sampling, draws)
        changed = {self.kind: self.value} if hasattr(sampling, self.kind) else {}
        rollout = self.engine.generate(prompt_ids, replace(sampling, **changed), draws)
        return replace(rollout, logprobs=None, entropy=None)  # which are numbers of the trainer

    def close(self) -> None:
        self.engine.close()


def main(
    mismatches: tuple[str, ...] = ("old=8",),
    corrections: tuple[str, ...] = ("none", "token", "geometric", "sequence"),
    task: str = "sort_digits",
    seeds: int = 6,
    max_steps: int = 60,
    output_dir: Path = Path("runs/sampler_mismatch"),
) -> None:
    """Train what is not there yet, print a row for each arm and the verdicts, and draw the curves."""
    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axes, scores = figure.subplots(), []
    print("sampler, correction    before   after   least    most  nats/token   effective")
    for mismatch, correction in [("same", "none"), *product(mismatches, corrections)]:
        runs, arm = [], f"{mismatch} {correction}"
        changes, colour = CORRECTIONS[correction]
        for seed in range(seeds):
            folder = output_dir / "_".join((task, *arm.split(), str(seed)))
            ended = folder.exists() and read_run(folder).summary.get("exit_reason")
            if ended != "finished":
                tokenrl.train(
                    task=task, estimator="rloo" + changes, seed=seed,
                    generator=partial(Engine, mismatch=mismatch), max_steps=max_steps,
                    eval_every=max(1, max_steps // 12), eval_generations=0, stop_after_zero_spread=0,
                    output_dir=folder, overwrite=True, quiet=True,
                )  # fmt: skip
            runs.append(read_run(folder))
        # [seeds, 2, evaluations]
        curves = np.array([run.series("eval_reward_greedy") for run in runs])
        ends = curves[:, 1, -1]
        numbers = [curves[:, 1, 0].mean(), ends.mean(), ends.min(), ends.max()]
        nats, share = (
            fmean(x for run in runs for x in run.series(f"sampling/{n}")[1]) for n in APART
        )
        print(
            f"{arm:20}", *(f"{x:7.3f}" for x in numbers), f"{nats:11.1e} {share:11.2f}", flush=True
        )
        scores += [(arm, seed, end) for seed, end in enumerate(ends)]
        colour = "#555555" if mismatch == "same" else colour
        axes.plot(*curves.transpose(1, 2, 0), color=colour, alpha=0.3, linewidth=0.7)
        axes.plot(*curves.mean(axis=0), color=colour, label=arm)
    axes.set(xlabel="step", ylabel="greedy reward, held out", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(output_dir / "sampler_mismatch.png")
    for difference in judge_scores(scores, margin=0.02).families[0].differences:
        bounds = difference.adjusted
        interval = f"[{bounds.low:+.3f}, {bounds.high:+.3f}]"
        print(f"{difference.arm} - same: {bounds.value:+.3f} {interval} {difference.verdict}")


if __name__ == "__main__":
    tyro.cli(main)
