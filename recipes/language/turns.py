"""Trains the toy environments over seeds, and draws what the policies learn: to halve, and to call a tool.

`guess_number` finds one of 15 numbers in four turns. The base guesses at random among the numbers that are
left; training makes the middle the first guess. `calculator` adds three numbers of three digits, too hard for
the model's head. The base calls the tool in one episode of six; training makes it the rule. Runs that are in
the folder already are read, not trained again.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from tokenrl import load_policy, train
from tokenrl.runs import read_metrics


def first_guess(run: Path) -> str:
    """Return the likeliest first guess of a policy, and its probability."""
    policy = load_policy(run / "model")
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([policy.encode("01-15:")])).logits[0, -1]
    probability, token = logits.softmax(-1).max(-1)
    return f", first guess {policy.tokenizer.decode(token)} with probability {probability:.2f}"


def main(
    seeds: int = 5, max_steps: int | None = None, output_dir: Path = Path("runs/turns")
) -> None:
    """Train both toy environments over seeds, print what each seed has learnt, and draw the curves.

    Args:
        seeds: Runs of each environment; those that are there already are read.
        max_steps: Updates of a run; by default those that the task recommends.
        output_dir: Directory of the runs and of turns.png.
    """
    steps = {} if max_steps is None else {"max_steps": max_steps}
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("guess_number", "calculator"), strict=True)
    for axes, task in panels:
        curves = []
        for seed in range(seeds):
            run = output_dir / f"{task}_{seed}"
            if not (run / "summary.json").exists():
                train(task=task, seed=seed, output_dir=run, eval_every=1000, quiet=True, **steps)
            summary = json.loads((run / "summary.json").read_text())
            before, after = summary["eval_before"], summary["eval_after"]
            line = f"{task} {seed}: greedy {before['reward_greedy']:.2f} -> {after['reward_greedy']:.2f}"
            line += f", turns {before['episodes/turns']:.2f} -> {after['episodes/turns']:.2f}"
            print(line + (first_guess(run) if task == "guess_number" else ""), flush=True)
            rows = [row for row in read_metrics(run / "metrics.jsonl") if "reward" in row]
            curves.append([(row["reward"], row["episodes/turns"] - 1) for row in rows])
        colours = {"reward": "#0072B2"} | (
            {"calls per episode": "#D55E00"} if task == "calculator" else {}
        )
        for column, (label, colour) in zip(
            np.moveaxis(np.array(curves), 2, 0), colours.items(), strict=False
        ):
            axes.plot(column.T, color=colour, alpha=0.2, linewidth=0.7)
            axes.plot(column.mean(axis=0), color=colour, label=label)
        axes.set(title=task, xlabel="step", ylim=(-0.05, 1.05))
        axes.legend()
    figure.savefig(output_dir / "turns.png", dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
