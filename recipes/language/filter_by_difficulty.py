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

from dataclasses import replace

import tyro

import tokenrl
from tokenrl.language import load_task, warm_started_base


def main(
    task: str = "sort_digits",
    model: str | None = None,
    low: float = 0.1,
    high: float = 0.9,
    prompts: int = 512,
    samples: int = 8,
    max_steps: int = 60,
    output_dir: str = "runs/filtered",
) -> None:
    """Measure prompts, keep those that are solved sometimes, and train on them.

    Args:
        task: A toy task, module:attribute, or a data file.
        model: Directory or hub name; without one, the toy task's own tiny model.
        low: Least mean reward of a prompt that is kept.
        high: Greatest mean reward of a prompt that is kept.
        prompts: The most training prompts that are measured, and trained on.
        samples: Completions by which a prompt's mean reward is measured.
        max_steps: Rollouts to train on.
        output_dir: Directory of the run.
    """
    loaded = load_task(task)
    model = model or str(warm_started_base(loaded))
    rows = loaded.train_prompts[:prompts]
    measured = replace(loaded, eval_prompts=rows)
    table = tokenrl.evaluate(model=model, task=measured, num_generations=samples).by_prompt
    chosen = [row for row, rate in zip(rows, table["reward"], strict=True) if low <= rate <= high]
    print(f"kept {len(chosen)} of {len(rows)} prompts")
    filtered = replace(loaded, train_prompts=chosen)
    tokenrl.train(model=model, task=filtered, max_steps=max_steps, output_dir=output_dir)


if __name__ == "__main__":
    tyro.cli(main)
