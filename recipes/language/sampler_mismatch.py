"""Does a sampler that differs from the trainer break a run, and does a correction save it? Six seeds of each.

    python recipes/language/sampler_mismatch.py                                 weights up to 7 updates old
    python recipes/language/sampler_mismatch.py --mismatches bits=3 temperature=1.3 --corrections none
    python recipes/language/sampler_mismatch.py --mismatches bits=16 --lengths 1 8 64 256 --generator vllm

A mismatch is `old=8` (the sampler gets new weights at every eighth step), `bits=4` (its weights are rounded
to so many bits; 16: bfloat16), or a `temperature`, `top_p` or `min_p` of which the trainer knows nothing.
Evaluations are greedy, by the weights of the trainer. Look for the arm whose curves fall while it trains, and
for what weights of whole sequences make of it. `--lengths` trains nothing and measures the mismatch instead.
Runs that are in the folder already are read, not trained again. `recipes/pages/explain/off_policy.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

import tokenrl
from tokenrl.lab import judge_scores
from tokenrl.language import (
    Sampling,
    TransformersGenerator,
    VllmGenerator,
    load_task,
    warm_started_base,
)
from tokenrl.runs import read_run

CORRECTIONS = {
    "none": ("", "#D55E00"),
    "token": (",importance=token,importance_cap=2", "#E69F00"),
    "geometric": (",importance=geometric", "#CC79A7"),
    "sequence": (",importance=sequence,importance_cap=2", "#009E73"),
    "centre": (",importance_centre=true", "#56B4E9"),
}
APART = ("logp_difference/mean", "effective_sample_size")


class Engine:
    """Samples from a copy of the weights, which differs from the policy or is sampled in another way."""

    def __init__(self, policy, rows_at_once=None, *, mismatch: str, backend: str) -> None:
        self.kind, _, value = mismatch.partition("=")
        self.value, self.syncs = float(value or 0), 0
        self.copy = replace(policy, model=deepcopy(policy.model))
        if mismatch == "bits=16":
            self.copy.model.bfloat16()
        self.greedy = TransformersGenerator(policy)
        self.engine = (VllmGenerator.start if backend == "vllm" else TransformersGenerator)(
            self.copy
        )

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


def measure(task, engine_of, lengths: tuple[int, ...]) -> None:
    """Print nats per token and effective samples of 256 completions of the base, which do not end."""
    policy, longest = tokenrl.load_policy(warm_started_base(task, announce=print)), max(lengths)
    policy.model.config.max_position_embeddings = 1024
    engine = engine_of(replace(policy, eos_ids=()))
    engine.sync(policy)
    ids = [policy.encode(row["prompt"]) for row in task.eval_prompts[:32]]
    draws = torch.rand(256, longest, generator=torch.Generator().manual_seed(0))
    rollout = engine.generate(ids, Sampling(longest, 8), draws)
    with torch.no_grad():
        logits = policy.model(torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)).logits
    logprobs = (
        logits[:, -longest - 1 : -1].log_softmax(-1).gather(2, rollout.completion_ids[..., None])
    )
    gaps = (logprobs.squeeze(2) - rollout.sampling_logprobs).double()
    for length in lengths:
        weights = gaps[:, :length].sum(1).exp()
        share = weights.mean() ** 2 / (weights**2).mean()
        print(
            f"{length:4} tokens: {gaps[:, :length].abs().mean():.1e} nats each, effective {share:.4f}"
        )
    engine.close()


def main(
    mismatches: tuple[str, ...] = ("old=8",),
    corrections: tuple[str, ...] = ("none", "token", "geometric", "sequence"),
    task: str = "sort_digits",
    estimator: str = "rloo",
    seeds: int = 6,
    max_steps: int = 60,
    generator: Literal["transformers", "vllm"] = "transformers",
    lengths: tuple[int, ...] = (),
    output_dir: Path = Path("runs/sampler_mismatch"),
) -> None:
    """Train what is not there yet, print a row for each arm and the verdicts, and draw the curves."""
    if lengths:
        return measure(
            load_task(task), partial(Engine, mismatch=mismatches[0], backend=generator), lengths
        )
    axes, scores = (
        (figure := Figure(figsize=(7, 3.6), dpi=150, layout="constrained")).subplots(),
        [],
    )
    print("sampler, correction    before   after   least    most  nats/token   effective")
    for mismatch, correction in [
        ("same", "none"),
        *((m, c) for m in mismatches for c in corrections),
    ]:
        runs, arm = [], f"{mismatch} {correction}"
        for seed in range(seeds):
            folder = output_dir / "_".join((task, estimator, generator, *arm.split(), str(seed)))
            summary = folder / "summary.json"
            if not summary.exists() or json.loads(summary.read_text())["exit_reason"] != "finished":
                tokenrl.train(
                    task=task, estimator=estimator + CORRECTIONS[correction][0], seed=seed,
                    generator=partial(Engine, mismatch=mismatch, backend=generator), max_steps=max_steps,
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
        colour = "#555555" if mismatch == "same" else CORRECTIONS[correction][1]
        if mismatch in ("same", mismatches[0]):
            axes.plot(*curves.transpose(1, 2, 0), color=colour, alpha=0.3, linewidth=0.7)
            axes.plot(*curves.mean(axis=0), color=colour, label=arm)
    axes.set(xlabel="step", ylabel="greedy reward, held out", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(output_dir / "sampler_mismatch.png")
    for difference in judge_scores(scores, margin=0.02).families[0].differences:
        bounds, mean = difference.adjusted, difference.mean.value
        interval = f"[{bounds.low:+.3f}, {bounds.high:+.3f}]"
        print(f"{difference.arm} - same: {mean:+.3f} {interval} {difference.verdict}")


if __name__ == "__main__":
    tyro.cli(main)
