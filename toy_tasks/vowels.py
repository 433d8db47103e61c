"""Write vowels: whatever the prompt, the reward is the share of the completion's characters that are vowels.

Only the first eight characters can count as vowels, so a completion must also end. Without that rule the best
policy would never end, and every completion would be cut off at the length limit.

This is the only task without demonstrations. A random policy writes a vowel about one time in five, and so
dense a reward is enough to learn from random weights. The task is useful as the first run of a new setup.
"""

from __future__ import annotations

import itertools
import random
import string
from typing import Any

from toy_tasks.models import TinyModel
from toy_tasks.task import Task, graded, hold_out, rows, settings

VOWELS = "aeiou"
LONGEST = 8  # characters that can count


@graded(0.0, 1.0)
def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return for each completion the vowels among its first eight characters over all its characters."""
    pairs = zip(prompts, completions, strict=True)
    return [sum(map(text[:LONGEST].count, VOWELS)) / max(len(text), 1) for _, text in pairs]


def canonical(prompt: str) -> str:
    """Return the letters of the prompt in alphabetical order."""
    return "".join(sorted(prompt.removesuffix(">")))


def make(seed: int = 0, eval_size: int = 128, train_size: int = 2048) -> Task:
    """Return the task.

    Args:
        seed: Seed of the prompts, which are three random letters.
        eval_size: Number of held-out prompts.
        train_size: The most training prompts.

    Raises:
        ValueError: An argument is out of its range.
    """
    rng = random.Random(seed)
    every = [
        "".join(letters) + ">" for letters in itertools.product(string.ascii_lowercase, repeat=3)
    ]
    train, held_out = hold_out(every, canonical, eval_size, rng)
    return Task(
        name="vowels",
        description="Write up to eight vowels, whatever the prompt; learnt from random weights.",
        train_prompts=rows(train[:train_size]),
        eval_prompts=rows(held_out),
        reward=reward,
        demonstrations=[],
        max_completion_length=12,
        solved=0.95,
        warm_start=None,
        train=settings(learning_rate=1e-3, max_steps=100, eval_every=25),
        build=TinyModel(tuple(string.ascii_lowercase + ">")),
    )
