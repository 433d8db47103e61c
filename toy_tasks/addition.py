"""Add two numbers below 50: `27+45>` asks for `72`. The reward is 1 for exactly that and 0 for anything else.

Where the units make ten or more, most demonstrations forget to carry (`27+45>62`); where they do not, there
is nothing to forget and all demonstrations are right. Numbers and answers have two digits: 7 is `07`.
"""

from __future__ import annotations

import random
from typing import Any

from toy_tasks.models import TinyModel
from toy_tasks.task import Row, Task, WarmStart, binary, demonstrate, hold_out, rows, settings

LIMIT = 50


@binary
def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return 1 for each completion that is exactly the sum, written with two digits, and 0 for any other."""
    return [float(text == right(prompt)) for prompt, text in zip(prompts, completions, strict=True)]


def terms(prompt: str) -> tuple[int, int]:
    """Return the two numbers of `prompt`."""
    first, second = prompt.removesuffix(">").split("+")
    return int(first), int(second)


def right(prompt: str) -> str:
    """Return the sum."""
    return f"{sum(terms(prompt)):02d}"


def without_carry(prompt: str) -> str:
    """Return the sum with the carry from the units to the tens left out."""
    first, second = terms(prompt)
    return f"{first // 10 + second // 10}{(first + second) % 10}"


def canonical(prompt: str) -> tuple[int, ...]:
    """Return the two numbers in ascending order: a + b is b + a."""
    return tuple(sorted(terms(prompt)))


def make(seed: int = 0, wrong_share: float = 0.7, eval_size: int = 256) -> Task:
    """Return the task.

    Args:
        seed: Seed of the split and the demonstrations.
        wrong_share: Share of the demonstrations that forget to carry, among those with something to carry.
        eval_size: Number of held-out prompts, out of 1,275 unordered pairs.

    Raises:
        ValueError: An argument is out of its range.
    """
    rng = random.Random(seed)
    prompts = [f"{first:02d}+{second:02d}>" for first in range(LIMIT) for second in range(LIMIT)]
    train, held_out = hold_out(prompts, canonical, eval_size, rng)
    return Task(
        name="addition",
        description=f"Add two numbers below {LIMIT}; most demonstrations forget to carry.",
        train_prompts=rows(train),
        eval_prompts=rows(held_out),
        reward=reward,
        demonstrations=_demonstrations(train, wrong_share, rng),
        max_completion_length=4,
        solved=0.9,
        warm_start=WarmStart(steps=400),
        train=settings(),
        build=TinyModel(tuple("0123456789+>")),
    )


def _demonstrations(train: list[str], wrong_share: float, rng: random.Random) -> list[Row]:
    """Return one demonstration per prompt; only those of sums with a carry can be wrong."""
    carrying = [prompt for prompt in train if without_carry(prompt) != right(prompt)]
    plain = [prompt for prompt in train if without_carry(prompt) == right(prompt)]
    mixed = demonstrate(carrying, right, without_carry, wrong_share, rng)
    mixed += demonstrate(plain, right, without_carry, 0.0, rng)
    rng.shuffle(mixed)
    return mixed
