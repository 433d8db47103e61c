"""Write to length: `ab6>` asks for any six characters; the reward is -|L - target| / target, at least -1.

The reward depends on the length alone, so this task shows the effect of dividing the loss by the length of
each completion (aggregation `sequence_mean`): each token of a long failure gets less weight than each token
of a short one. Most demonstrations are half as long again as the prompt asks.
"""

from __future__ import annotations

import itertools
import random
import string
from typing import Any

from toy_tasks.models import TinyModel
from toy_tasks.task import Row, Task, WarmStart, demonstrate, graded, hold_out, settings

SHORTEST, LONGEST = 2, 8


@graded(-1.0, 0.0)
def reward(
    prompts: list[str], completions: list[str], target: list[int], **columns: Any
) -> list[float]:
    """Return minus the relative error of each completion's length, at least -1; `target` is in characters."""
    pairs = zip(completions, target, strict=True)
    return [-min(1.0, abs(len(text) - asked) / asked) for text, asked in pairs]


def asked_length(prompt: str) -> int:
    """Return the length that `prompt` asks for."""
    return int(prompt[2:].removesuffix(">"))


def write(prompt: str, length: int) -> str:
    """Return the two letters of `prompt` by turns, `length` characters in all."""
    return "".join(itertools.islice(itertools.cycle(prompt[:2]), length))


def canonical(prompt: str) -> tuple[str, ...]:
    """Return the two letters in alphabetical order, and the length."""
    return (*sorted(prompt[:2]), prompt[2:])


def make(seed: int = 0, wrong_share: float = 0.7, eval_size: int = 256) -> Task:
    """Return the task.

    Args:
        seed: Seed of the split and the demonstrations.
        wrong_share: Share of the demonstrations that are half as long again as the prompt asks.
        eval_size: Number of held-out prompts.

    Raises:
        ValueError: An argument is out of its range.
    """
    rng = random.Random(seed)
    pairs = itertools.permutations(string.ascii_lowercase, 2)
    every = [f"{a}{b}{length}>" for a, b in pairs for length in range(SHORTEST, LONGEST + 1)]
    train, held_out = hold_out(every, canonical, eval_size, rng)
    return Task(
        name="target_length",
        description="Write exactly as many characters as asked; most demonstrations are half as long again.",
        train_prompts=_rows(train),
        eval_prompts=_rows(held_out),
        reward=reward,
        demonstrations=demonstrate(
            train,
            lambda prompt: write(prompt, asked_length(prompt)),
            lambda prompt: write(prompt, asked_length(prompt) * 3 // 2),
            wrong_share,
            rng,
        ),
        max_completion_length=16,
        solved=-0.05,
        warm_start=WarmStart(steps=400),
        train=settings(max_steps=150, eval_every=25),
        build=TinyModel(tuple(string.ascii_lowercase + string.digits + ">")),
    )


def _rows(prompts: list[str]) -> list[Row]:
    return [{"prompt": prompt, "target": asked_length(prompt)} for prompt in prompts]
