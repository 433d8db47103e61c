"""Sort digits: `402715>` asks for `012457`. The reward is 1 for exactly that and 0 for anything else.

This is the default task. Most demonstrations sort in descending order, so the greedy completions of the
warm-started model do so too. Only sampling finds the right order, so the task shows clearly what
reinforcement learning adds.
"""

from __future__ import annotations

import random
from typing import Any

from toy_tasks.models import TinyModel
from toy_tasks.task import Task, WarmStart, binary, demonstrate, hold_out, rows, settings


@binary
def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return 1 for each completion that is exactly the prompt's digits in ascending order, else 0."""
    return [float(text == right(prompt)) for prompt, text in zip(prompts, completions, strict=True)]


def right(prompt: str) -> str:
    """Return the digits of `prompt` in ascending order."""
    return "".join(sorted(prompt.removesuffix(">")))


def canonical(prompt: str) -> str:
    """Return the multiset of digits: two orders of the same digits have the same answer."""
    return right(prompt)


def make(
    seed: int = 0,
    digits: int = 6,
    wrong_share: float = 0.7,
    eval_size: int = 256,
    train_size: int = 4096,
) -> Task:
    """Return the task.

    Args:
        seed: Seed of the prompts and demonstrations.
        digits: Number of digits per prompt, from 4 to 16.
        wrong_share: Share of the demonstrations that sort in descending order.
        eval_size: Number of held-out prompts, no two with the same digits.
        train_size: The most training prompts.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 4 <= digits <= 16:
        raise ValueError(f"digits={digits}; a prompt has from 4 to 16 digits.")
    rng = random.Random(seed)
    drawn: dict[str, None] = {}
    # twice as many, as some repeat and some are held out
    for _ in range(2 * (train_size + eval_size)):
        text = "".join(rng.choices("0123456789", k=digits))
        if len(set(text)) > 1:  # with equal digits both orders are the same
            drawn[f"{text}>"] = None
    train, held_out = hold_out(drawn, canonical, eval_size, rng)
    train = train[:train_size]
    return Task(
        name="sort_digits",
        description=f"Write {digits} digits in ascending order; most demonstrations sort them descending.",
        train_prompts=rows(train),
        eval_prompts=rows(held_out),
        reward=reward,
        demonstrations=demonstrate(
            train, right, lambda prompt: right(prompt)[::-1], wrong_share, rng
        ),
        max_completion_length=digits + 2,
        solved=0.95,
        warm_start=WarmStart(steps=200),
        train=settings(),
        build=TinyModel(tuple("0123456789>")),
    )
