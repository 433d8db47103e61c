"""Train a language model with your own task and your own rewards.

    python recipes/language/train_lm.py                                     the task below and a tiny model
    python recipes/language/train_lm.py --estimator grpo --max-steps 200    another estimator
    python recipes/language/train_lm.py --task addition                     any task of `tokenrl train`
    python recipes/language/train_lm.py --model DIR_OR_HUB_NAME --lora-r 16 a pretrained model, with LoRA

A task consists of prompts and a reward; a reward is a function that returns one number for each completion.
The options here are those that one changes first. `tokenrl train --help` lists the others; each of them can
be added under its own name to the call of `tokenrl.train` below.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from itertools import pairwise

import tyro

import tokenrl
from tokenrl import PromptTask
from toy_tasks.models import TinyModel


# Rewards are called by keyword: f(prompts=[...], completions=[...], completion_ids=[...], and a list for each
# other column of the rows). Take what you need and leave the rest to **_. Several rewards are added.
def alternates(completions: list[str], **_) -> list[float]:
    """From 0 to 1: the share of neighbours (of five at least) that are an even digit beside an odd one."""
    parities = [[int(c) % 2 if c.isdigit() else None for c in text] for text in completions]
    pairs = [[{a, b} == {0, 1} for a, b in pairwise(row)] for row in parities]
    return [sum(row) / max(5, len(row)) for row in pairs]


def six_long(completion_ids: list[list[int]], **_) -> list[float]:
    """From -1 to 0: how far the completion is from seven tokens, which are six digits and the end."""
    return [-min(1.0, abs(len(ids) - 7) / 7) for ids in completion_ids]


def zigzag() -> PromptTask:
    """The task: after `27>`, write six digits that alternate between even and odd, as 250147."""
    rows = [{"prompt": f"{number:02d}>"} for number in range(100)]
    train, held_out = [row for i, row in enumerate(rows) if i % 5], rows[::5]
    return PromptTask("zigzag", train, held_out, [alternates, six_long], max_completion_length=10)


def main(
    task: str = "zigzag",
    reward: tuple[str, ...] = (),
    model: str | None = None,
    estimator: str = "rloo",
    lora_r: int = 0,
    max_steps: int = 100,
    prompts_per_step: int = 16,
    seed: int = 0,
    output_dir: str = "runs/train_lm",
    overwrite: bool = False,
) -> None:
    """Train a language model on a task and rewards of your own.

    Args:
        task: zigzag (above), a toy task, module:attribute, a JSON/CSV/Parquet file, or a `datasets` name.
        reward: module:function or file.py:function, for a task without a reward, or instead of its own.
        model: Directory or hub name; without one, a tiny model made on the spot.
        estimator: Preset, such as rloo or grpo.
        lora_r: Rank of a LoRA adapter; 0 trains all weights.
        max_steps: Rollouts to train on.
        prompts_per_step: Prompts per step, with 8 completions each.
        seed: Seed of the order of prompts and of sampling.
        output_dir: Run directory: metrics, completions, report, model.
        overwrite: Replace an earlier run in output_dir.
    """
    is_zigzag = task == "zigzag"
    # a recipe: called with a seed it gives (model, tokenizer)
    tiny = TinyModel(tokens=tuple("0123456789>"))
    preset = tokenrl.Estimator.preset(estimator)
    result = tokenrl.train(
        task=zigzag() if is_zigzag else task,
        reward=reward,
        model=tiny(seed) if is_zigzag and model is None else model,
        estimator=preset,
        lora_r=lora_r,
        max_steps=max_steps,
        prompts_per_step=prompts_per_step,
        num_generations=8,
        learning_rate=5e-4 if is_zigzag and model is None else None,
        seed=seed,
        output_dir=output_dir,
        overwrite=overwrite,
    )
    print(f"bias of the gradient: {preset.bias_status} ({preset.bias_reason})")
    for name in ("reward", "reward_greedy"):
        print(f"{name}: {result.eval_before[name]:.3f} -> {result.eval_after[name]:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
