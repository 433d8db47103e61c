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

from dataclasses import dataclass
from itertools import pairwise

import tyro

import tokenrl
from tokenrl import PromptTask
from toy_tasks.models import TinyModel


@dataclass
class Args:
    """The settings that one changes first."""

    task: str = "zigzag"
    """zigzag (below), a toy task, module:attribute, a JSON/CSV/Parquet file, or a `datasets` name."""
    reward: tuple[str, ...] = ()
    """module:function or file.py:function, for a task without a reward, or instead of its own."""
    model: str | None = None
    """Directory or hub name; without one, a tiny model made on the spot."""
    estimator: str = "rloo"
    """Preset: reinforce, reinforce_running_mean, rloo, grpo, dr_grpo or ppo_clip."""
    beta: float = 0.0
    """Weight of the KL to the model that training began from."""
    lora_r: int = 0
    """Rank of a LoRA adapter; 0 trains all weights."""
    max_steps: int = 100
    """Rollouts to train on."""
    prompts_per_step: int = 16
    """Prompts per step."""
    num_generations: int = 8
    """Completions per prompt."""
    learning_rate: float | None = None
    """Peak learning rate. Default: what the task recommends (zigzag: 5e-4), else 1e-5, with LoRA 1e-4."""
    seed: int = 0
    """Seed of the order of prompts and of sampling."""
    output_dir: str = "runs/train_lm"
    """Run directory: metrics, completions, report, model."""
    overwrite: bool = False
    """Replace an earlier run in output_dir."""


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


def main(args: Args) -> None:
    is_zigzag = args.task == "zigzag"
    # a recipe: called with a seed it gives (model, tokenizer)
    tiny = TinyModel(tokens=tuple("0123456789>"))
    estimator = tokenrl.Estimator.preset(args.estimator, beta=args.beta)
    result = tokenrl.train(
        task=zigzag() if is_zigzag else args.task,
        reward=args.reward,
        model=tiny(args.seed) if is_zigzag and args.model is None else args.model,
        estimator=estimator,
        lora_r=args.lora_r,
        max_steps=args.max_steps,
        prompts_per_step=args.prompts_per_step,
        num_generations=args.num_generations,
        learning_rate=args.learning_rate or (5e-4 if is_zigzag and args.model is None else None),
        seed=args.seed,
        output_dir=args.output_dir,
        overwrite=args.overwrite,
    )
    print(f"bias of the gradient: {estimator.bias_status} ({estimator.bias_reason})")
    for name in ("reward", "reward_greedy"):
        print(f"{name}: {result.eval_before[name]:.3f} -> {result.eval_after[name]:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
