"""Train only on prompts that a model solves sometimes: measure each of them first, and filter.

    python recipes/language/filter_by_difficulty.py                     a toy task and its own tiny model
    python recipes/language/filter_by_difficulty.py --task addition --low 0.2 --high 0.8
    python recipes/language/filter_by_difficulty.py --model DIR_OR_HUB_NAME --samples 16

A prompt that is always or never solved gives its completions equal rewards, from which nothing is learnt.
Dropping prompts changes their distribution, and with it the objective: training then maximises the mean
reward over the prompts that are kept. The gradient of each of these stays the same, and so does its bias.
With p the chance of a right answer, the error of a measured rate is sqrt(p (1 - p) / samples). DAPO's refill
(`--estimator dapo`) is the same idea online: it replaces groups of equal rewards while it trains.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import dataclass, replace

import tyro

import tokenrl
from tokenrl.language import load_task, warm_started_base


@dataclass
class Args:
    """Which prompts are kept."""

    task: str = "sort_digits"
    """A toy task, module:attribute, or a data file."""
    model: str | None = None
    """Directory or hub name; without one, the toy task's own tiny model."""
    low: float = 0.1
    """Least mean reward of a prompt that is kept."""
    high: float = 0.9
    """Greatest mean reward of a prompt that is kept."""
    prompts: int = 512
    """The most training prompts that are measured, and trained on."""
    samples: int = 8
    """Completions by which a prompt's mean reward is measured."""
    max_steps: int = 60
    """Rollouts to train on."""
    output_dir: str = "runs/filtered"
    """Directory of the run."""


def main(args: Args) -> None:
    """Measure, filter, train."""
    task = load_task(args.task)
    model = args.model or str(warm_started_base(task))
    prompts = task.train_prompts[: args.prompts]
    measured = replace(task, eval_prompts=prompts)
    rates = tokenrl.evaluate(model=model, task=measured, num_generations=args.samples).by_prompt[
        "reward"
    ]
    chosen = [
        prompt for prompt, rate in zip(prompts, rates, strict=True) if args.low <= rate <= args.high
    ]
    print(
        f"kept {len(chosen)} of {len(rates)} prompts, with mean rewards from {args.low} to {args.high}"
    )
    filtered = replace(task, train_prompts=chosen)
    tokenrl.train(model=model, task=filtered, max_steps=args.max_steps, output_dir=args.output_dir)


if __name__ == "__main__":
    main(tyro.cli(Args))
